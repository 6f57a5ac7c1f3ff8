"""What the teacher server and the student trainer agree on.

Imports neither of them, and none of torch, transformers or vllm: numpy, msgpack, pydantic and the
standard library are enough to speak the protocol.
"""

__version__ = "0.1.0"

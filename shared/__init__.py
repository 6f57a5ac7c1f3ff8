"""The protocol between the teacher server and the student trainer.

It imports neither of them: numpy, msgpack, pydantic and the standard library suffice to speak it.
"""

__version__ = "0.1.0"

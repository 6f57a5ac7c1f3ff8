"""A coverage-guided fuzzer of everything that reads bytes from the network.

    python -m tests.faults.fuzz_wire -runs=1000000

Takes libFuzzer's options. An input's first byte says what it is read as. Anything but an answer or
a refusal is a finding, as are an input that takes 5 seconds, and a gigabyte of memory.
"""

import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
import psutil

with atheris.instrument_imports(include=["shared", "teacher_server.openai"]):
    from shared import codec, wire
    from shared.errors import ProtocolError
    from shared.protocol import (
        Completion,
        GenerateEnd,
        GenerateEvent,
        GenerateRequest,
        ScoreRequest,
        ScoreSequence,
    )
    from shared.validation import check_generate_request, check_score_request
    from teacher_server.openai.schema import ChatRequest, CompletionRequest

from tests.support import stub

MAX_BYTES = 4096
INFO = stub.info()
REQUESTS = (
    (ScoreRequest, check_score_request),
    (GenerateRequest, check_generate_request),
)
STREAMS = tuple(wire.STREAM_MEDIA_TYPES.values())
WORDS = (
    *("sequences", "token_ids", "completion_start", "requested_token_ids", "top_k", "temperature"),
    *("logprob_dtype", "sample_seed", "prompts", "max_new_tokens", "stop_token_ids", "stream"),
    *("dtype", "shape", "data", "<u4", "<f2", "<f4", "float16", "prompt", "sample", "completion"),
    *("messages", "role", "content", "chat_template_kwargs", "problem", "teacher", "null", "NaN"),
    *(
        "\\xdc\\x20\\x00",
        "\\xdd\\xff\\xff\\xff\\xff",
        "\\xde\\x01\\x00",
        "\\xc6\\xff\\xff\\xff\\xff",
    ),
    *(
        "\\xc4\\x08",
        "\\xd6\\xff",
        "\\xc7\\x00",
        "\\xcb\\x7f\\xf8",
        "\\xcf\\xff",
        "[[[[[[[[",
        "1e999",
    ),
)


def read(data: bytes) -> None:
    """Raises what the server would answer 500 to."""
    kind, body = data[:1], data[1:]
    number = kind[0] % 8 if kind else 0
    try:
        if number < 4:
            model, check = REQUESTS[number % 2]
            media_type = (wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)[number // 2]
            message = wire.load(model, body, media_type, max_bytes=MAX_BYTES)
            check(message, INFO)
            again = wire.dump(message, media_type)
            assert wire.dump(wire.load(model, again, media_type, max_bytes=1 << 20), media_type) \
                == again  # fmt: skip
        elif number < 6:
            spoken = (CompletionRequest, ChatRequest)[number - 4]
            wire.load(spoken, body, wire.JSON_MEDIA_TYPE, max_bytes=MAX_BYTES)
        else:
            size = 1 + len(body) % 7
            chunks = [body[i : i + size] for i in range(0, len(body), size)]
            for _ in wire.stream_messages(chunks, STREAMS[number - 6], max_bytes=MAX_BYTES):
                pass
    except ProtocolError:
        pass


def seeds() -> list[bytes]:
    ids = np.arange(5, dtype=np.uint32)
    sequence = ScoreSequence(
        token_ids=ids, completion_start=3, requested_token_ids=np.zeros((2, 2), np.uint32)
    )
    asked = (
        ScoreRequest(sequences=[sequence], top_k=3, temperature=0.5, sample_seed=7),
        GenerateRequest(prompts=[ids], n=2, max_new_tokens=4, seed=1, stop_token_ids=ids, top_k=2),
    )
    media_types = (wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)
    found = [wire.dump(message, media_type) for media_type in media_types for message in asked]
    found.append(b'{"model":"m","prompt":[[1,2],[3]],"max_tokens":0,"prompt_logprobs":2}')
    found.append(
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],'
        b'"logprobs":true,"top_logprobs":2,"chat_template_kwargs":{"a":[1]}}'
    )
    done = Completion(token_ids=ids, finish_reason="stop", scores=stub.scores(5, 2))
    event = GenerateEvent(prompt=0, sample=1, completion=done, teacher=stub.IDENTITY)
    end = GenerateEnd(teacher=stub.IDENTITY, request_id="r")
    found += [wire.dump(event, stream) + wire.dump(end, stream) for stream in STREAMS]
    bodies = [bytes([number]) + body for number, body in enumerate(found)]
    return [*bodies, b"\0" + codec.encode([[], {}, None, 1.5, b"x", ids])]


def main() -> None:
    process, runs = psutil.Process(), 0
    sizes: list[int] = []

    def one(data: bytes) -> None:
        nonlocal runs
        if runs % 10_000 == 0:
            sizes.append(process.memory_info().rss)
            settled = sizes[len(sizes) // 10]
            sys.stdout.write(f"runs {runs} memory {sizes[-1] / settled:.4f}\n")
            sys.stdout.flush()
        runs += 1
        read(data)

    with tempfile.TemporaryDirectory() as folder:
        corpus, words = Path(folder, "corpus"), Path(folder, "words")
        corpus.mkdir()
        for number, seed in enumerate(seeds()):
            (corpus / str(number)).write_bytes(seed)
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        options = [
            f"-dict={words}", f"-max_len={MAX_BYTES}", "-timeout=5", "-rss_limit_mb=1024",
            f"-artifact_prefix={tempfile.gettempdir()}/", *sys.argv[1:], str(corpus),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

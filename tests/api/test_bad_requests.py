"""Every bad request, over a socket: status, field, and a message with value and limit."""

import json
import re
import socket

import httpx
import pytest

from shared import codec, wire
from shared.identity import tokenizer_identity
from shared.protocol import Capabilities, InfoResponse, Problem
from teacher_server.backends.checkpoint import load_tokenizer

ONE = {"token_ids": [1, 2, 3], "completion_start": 1}


def score(**changes):
    return {"sequences": [ONE], "top_k": 5, **changes}


def one(**changes):
    return score(sequences=[ONE, {**ONE, **changes}])


def generate(**changes):
    return {"prompts": [[1, 2]], "max_new_tokens": 4, **changes}


def problem(response, status):
    assert response.status_code == status, response.text[:300]
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate(response.json())
    assert found.status == status
    assert found.request_id == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return found


@pytest.mark.parametrize("media_type", [wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE])
@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("score", one(token_ids=[1, 272]), "sequences.1.token_ids", "272 is outside.* of 272"),
        ("score", one(token_ids=[-1, 2]), "sequences.1.token_ids", "-1 is outside"),
        ("score", one(token_ids=[]), "sequences.1.token_ids", "no tokens"),
        ("score", one(token_ids=[1] * 257), "sequences.1.token_ids", "257 tokens.*context is 256"),
        ("score", one(completion_start=0), "sequences.1.completion_start", "0 must be from 1 to 2"),
        ("score", one(completion_start=3), "sequences.1.completion_start", "3 must be from 1 to 2"),
        (
            "score",
            one(requested_token_ids=[[1]]),
            "sequences.1.requested_token_ids",
            "1 rows for 2 completion tokens",
        ),
        (
            "score",
            one(requested_token_ids=[[1], [272]]),
            "sequences.1.requested_token_ids",
            "272 is outside",
        ),
        (
            "score",
            one(requested_token_ids=[[1] * 257] * 2),
            "sequences.1.requested_token_ids",
            "257 ids in a row; the limit is 256",
        ),
        ("score", score(top_k=273), "top_k", "273 is over the limit 272"),
        ("score", {"sequences": [ONE], "topk": 5}, "topk", "did you mean 'top_k'"),
        ("score", one(completionstart=1), "sequences.1.completionstart", "'completion_start'"),
        ("generate", generate(max_tokens=5), "max_tokens", "'max_new_tokens'"),
        ("score", score(top_k=2**63), "top_k", "less than 2147483648"),
        ("score", one(completion_start=2**63), "sequences.1.completion_start", "less than"),
        ("generate", generate(sampling_top_k=2**63), "sampling_top_k", "less than"),
        ("generate", generate(n=2**63), "n", "less than"),
        ("generate", generate(top_p=float("nan")), "top_p", "finite number"),
        ("generate", generate(temperature=float("inf")), "temperature", "finite number"),
        (
            "generate",
            generate(stop_token_ids=[7] * 1025),
            "stop_token_ids",
            "1025 stop tokens; the limit is 1024",
        ),
        ("score", score(top_k=0), "top_k", "greater than or equal to 1"),
        ("score", score(temperature=0.0), "temperature", "greater than 0"),
        ("score", score(temperature=1e-7), "temperature", "1e-07 is below 1e-06"),
        ("score", score(sequences=[]), "sequences", "send at least one"),
        ("score", score(sequences=[ONE] * 1025), "sequences", "1025 sequences; the limit is 1024"),
        ("score", score(logprob_dtype="int8"), "logprob_dtype", "float32"),
        ("score", score(modle="x"), "modle", "not permitted"),
        ("score", score(model=1), "model", "valid string"),
        ("score", {}, "sequences", "required"),
        ("generate", generate(prompts=[[1], []]), "prompts.1", "no tokens"),
        ("generate", generate(prompts=[[272]]), "prompts.0", "272 is outside"),
        ("generate", generate(max_new_tokens=255), "prompts.0", "257 tokens; .* context is 256"),
        ("generate", generate(top_p=1.5), "top_p", "less than or equal to 1"),
        ("generate", generate(n=1025), "prompts", "1025 sequences; the limit is 1024"),
        ("generate", generate(temperature=-1.0), "temperature", "greater than or equal to 0"),
        (
            "generate",
            generate(temperature=5e-324),
            "temperature",
            "below 1e-06; use that, or 0 for",
        ),
        ("generate", generate(stop_token_ids=[272]), "stop_token_ids", "272 is outside"),
        ("generate", generate(top_k=273), "top_k", "273 is over the limit 272"),
    ],
)
def test_an_invalid_request_is_refused(teacher, path, body, field, message, media_type):
    json_ = media_type == wire.JSON_MEDIA_TYPE
    sent = {"content": json.dumps(body) if json_ else codec.encode(body)}
    response = httpx.post(f"{teacher.url}/v1/{path}", headers={"content-type": media_type}, **sent)
    refused = problem(response, 422)
    assert refused.field == field
    assert re.search(message, refused.detail)


@pytest.mark.parametrize("number", ["2" * 20, "9" * 4300, "9" * 5000, "-" + "9" * 5000, "1e400"])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("score", '{"sequences":[{"token_ids":[1,2],"completion_start":1}],"top_k":%s}', "top_k"),
        ("generate", '{"prompts":[[1,2]],"n":%s}', "n"),
        ("generate", '{"prompts":[[1,2]],"seed":%s}', "seed"),
        ("generate", '{"prompts":[[1,2]],"temperature":%s}', "temperature"),
        ("generate", '{"prompts":[[1,%s]]}', "prompts.0"),
        ("completions", '{"model":"m","prompt":"a","top_k":%s}', "top_k"),
        ("completions", '{"model":"m","prompt":"a","n":%s}', "n"),
        ("completions", '{"model":"m","prompt":"a","min_p":%s}', "min_p"),
        ("completions", '{"model":"m","prompt":[%s]}', "prompt"),
    ],
)
def test_a_number_of_any_size_is_an_invalid_field(teacher, path, body, field, number):
    response = httpx.post(
        f"{teacher.url}/v1/{path}", content=body % number,
        headers={"content-type": wire.JSON_MEDIA_TYPE},
    )  # fmt: skip
    assert response.status_code == 422, response.text[:300]
    answer = response.json()
    assert (answer["error"]["param"] if path == "completions" else answer["field"]) == field
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"{", wire.JSON_MEDIA_TYPE),
        (b"", wire.JSON_MEDIA_TYPE),
        (b"\xc1", wire.MSGPACK_MEDIA_TYPE),
        (b"\xdd\xff\xff\xff\xff", wire.MSGPACK_MEDIA_TYPE),
        (b"\x91" * 5000, wire.MSGPACK_MEDIA_TYPE),
    ],
)
def test_a_malformed_body_is_refused(teacher, content, media_type):
    headers = {"content-type": media_type}
    problem(httpx.post(f"{teacher.url}/v1/score", content=content, headers=headers), 400)


def test_an_unsupported_type_is_refused(teacher):
    headers = {"content-type": "text/csv"}
    response = httpx.post(f"{teacher.url}/v1/score", content=b"1,2", headers=headers)
    assert "text/csv" in problem(response, 415).detail


def test_unknown_routes_and_methods_are_refused(teacher):
    problem(httpx.get(f"{teacher.url}/v2/score"), 404)
    response = httpx.delete(f"{teacher.url}/v1/score")
    problem(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_while_it_arrives(strict):
    """The server answers and hangs up long before a body of 1 GB could have arrived."""
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            while sent < 1 << 30:
                connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
                sent += 0x4000
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 64 << 20
    response = httpx.post(f"{strict.url}/v1/score", content=b" " * 100_001, headers={
        "content-type": "application/json"})  # fmt: skip
    assert "100001 bytes; the limit is 100000" in problem(response, 413).detail


def test_the_info_states_every_limit(teacher, strict):
    info = InfoResponse.model_validate(httpx.get(f"{teacher.url}/v1/info").json())
    tokenizer = tokenizer_identity(load_tokenizer(str(teacher.folder), trust_remote_code=False))
    assert info.tokenizer == tokenizer
    assert info.vocab_size == 272 > tokenizer.vocab_size
    assert info.max_model_len == 256
    assert info.eos_token_ids == [1]
    assert info.limits.max_top_k == 272
    assert info.teacher.dtype == "float32"
    assert info.teacher.backend == teacher.backend
    assert len(info.teacher.fingerprint) == 64
    assert info.capabilities == Capabilities(
        temperature=True, requested_token_ids=True, generate=True, sample_seed=True
    )
    limits = InfoResponse.model_validate(httpx.get(f"{strict.url}/v1/info").json()).limits
    assert (limits.max_top_k, limits.max_tokens, limits.max_body_bytes) == (50, 8000, 100_000)


def test_the_documentation_is_served(teacher):
    page = httpx.get(f"{teacher.url}/docs")
    assert page.status_code == 200
    assert "openapi.json" in page.text
    assert "//" not in page.text.replace("<!doctype html>", "")  # nothing of another host
    paths = httpx.get(f"{teacher.url}/openapi.json").json()["paths"]
    own = {"/v1/score", "/v1/generate", "/v1/info", "/health", "/ready", "/metrics"}
    spoken = {"/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions"}
    assert own | spoken == set(paths)

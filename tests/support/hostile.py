"""The corpus of hostile requests: small to send, and expensive for a careless server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared import codec, wire

CONTEXT = 262_144  # of the model that is attacked, as of a large one
SCORE, GENERATE = "/v1/score", "/v1/generate"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON, MSGPACK = wire.JSON_MEDIA_TYPE, wire.MSGPACK_MEDIA_TYPE


@dataclass(frozen=True)
class Attack:
    """A hostile request.

    Attributes:
        make: returns the body, which is made when it is sent because it may be large.
        statuses: those that may answer it.
    """

    name: str
    path: str
    media_type: str
    make: Callable[[], bytes]
    statuses: tuple[int, ...] = (400, 413, 422)


def _json(**body: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(body).encode()


def _filled(before: str, item: str, count: int, after: str) -> Callable[[], bytes]:
    """Return a function that makes a JSON text with a list of ``count`` times ``item``."""
    return lambda: (before + ",".join([item] * count) + after).encode()


def _packed(make: Callable[[], Any]) -> Callable[[], bytes]:
    return lambda: codec.encode(make())


def attacks(model: str) -> list[Attack]:
    """Return the corpus for a served model of 260 tokens and a context of `CONTEXT`."""
    name = json.dumps(model)
    chat = f'{{"model":{name},"messages":['
    ids = np.full(1 << 18, 5, np.uint32)
    one = {"token_ids": [5, 6], "completion_start": 1}
    nested: list[Any] = []
    for _ in range(900):
        nested = [nested]
    return [
        Attack(
            "stop tokens of every copy", GENERATE, JSON,
            _json(prompts=[[5, 6]], n=128, max_new_tokens=1, stop_token_ids=[7] * 200_000),
        ),
        Attack(
            "stop tokens of every copy, msgpack", GENERATE, MSGPACK,
            _packed(lambda: {"prompts": [ids[:2]], "n": 128, "max_new_tokens": 1,
                             "stop_token_ids": np.full(200_000, 7, np.uint32)}),
        ),
        Attack(
            "stop tokens of a completion", COMPLETIONS, JSON,
            _json(model=model, prompt=[5, 6], n=128, max_tokens=1, stop_token_ids=[7] * 200_000),
        ),
        Attack("a million wrong messages", CHAT, JSON, _filled(chat, "0", 10**6, "]}")),
        Attack("messages of wrong parts", CHAT, JSON, _filled(
            chat + '{"role":"user","content":[', "0", 10**6, "]}]}")),
        Attack("100,000 wrong messages", CHAT, JSON, _filled(chat, '{"role":0}', 10**5, "]}")),
        Attack("100,000 right messages", CHAT, JSON, _filled(
            chat, '{"role":"user","content":"a"}', 10**5, '],"max_tokens":1}')),
        Attack("200,000 fields", CHAT, JSON, lambda: (
            "{" + ",".join(f'"a{n}":0' for n in range(200_000)) + "}").encode()),
        Attack("a field of a megabyte", SCORE, JSON, lambda: (
            b'{"' + b"topk" * (1 << 18) + b'":1}')),
        Attack("wrong sequences", SCORE, JSON, _filled(
            '{"top_k":1,"sequences":[', "0", 10**6, "]}")),
        Attack("wrong sequences, msgpack", SCORE, MSGPACK,
               _packed(lambda: {"top_k": 1, "sequences": [0] * 8192})),
        Attack("empty lists, msgpack", SCORE, MSGPACK,
               _packed(lambda: {"top_k": 1, "sequences": [[[]] * 120] * 8192})),
        Attack("a text of 3 MB", COMPLETIONS, JSON,
               lambda: json.dumps({"model": model, "prompt": "the cat " * (3 << 17),
                                   "max_tokens": 1}).encode()),
        Attack("a word of 3 MB", COMPLETIONS, JSON,
               lambda: json.dumps({"model": model, "prompt": "a" * (3 << 20),
                                   "max_tokens": 1}).encode()),
        Attack("a message of 3 MB", CHAT, JSON,
               lambda: json.dumps({"model": model, "max_tokens": 1, "messages": [
                   {"role": "user", "content": "a b " * (3 << 18)}]}).encode()),
        Attack("a message of emoji", CHAT, JSON,
               lambda: json.dumps({"model": model, "max_tokens": 1, "messages": [
                   {"role": "user", "content": "\U0001f600" * (1 << 19)}]}).encode()),
        Attack("a text of escapes", COMPLETIONS, JSON, lambda: (
            b'{"model":' + name.encode() + b',"prompt":"' + b"\\u0041" * 10_000_000 + b'"}')),
        Attack("a million prompts", COMPLETIONS, JSON, _filled(
            f'{{"model":{name},"max_tokens":1,"prompt":[', '"a"', 10**6, "]}")),
        Attack("100,000 prompts of ids", COMPLETIONS, JSON, _filled(
            f'{{"model":{name},"max_tokens":1,"prompt":[', "[5,6]", 10**5, "]}")),
        Attack("a million token ids", SCORE, JSON, _filled(
            '{"top_k":1,"sequences":[{"completion_start":1,"token_ids":[', "5", 10**6, "]}]}")),
        Attack("30 million token ids", SCORE, JSON, _filled(
            '{"top_k":1,"sequences":[{"completion_start":1,"token_ids":[', "5", 3 * 10**7, "]}]}")),
        Attack("16 million token ids, msgpack", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 1, "sequences": [
                {"token_ids": np.full(15_000_000, 5, np.uint32), "completion_start": 1}]})),
        Attack("60 MB in pieces, msgpack", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 1, "sample_seed": 1, "sequences": [
                {"token_ids": np.full(14_000, 5, np.uint32), "completion_start": 1}] * 1024})),
        Attack("requested ids, msgpack", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 1, "sequences": [{"token_ids": ids[:60_000], "completion_start": 1,
                "requested_token_ids": np.full((59_999, 257), 5, np.uint32)}]})),
        Attack("deep lists", SCORE, JSON, lambda: b"[" * 3_000_000),
        Attack("deep lists that end", CHAT, JSON, lambda: b"[" * 900 + b"]" * 900),
        Attack("deep values", CHAT, JSON, lambda: json.dumps({
            "model": model, "messages": [{"role": "user", "content": "a"}],
            "logit_bias": nested}).encode()),
        Attack("a penalty that is a list", COMPLETIONS, JSON, _filled(
            f'{{"model":{name},"prompt":"a","min_p":[', "5", 10**6, "]}")),
        Attack("deep lists, msgpack", SCORE, MSGPACK, lambda: b"\x91" * 3_000_000),
        Attack("forged lengths, msgpack", SCORE, MSGPACK, lambda: b"\xdc\x20\x00" * 1000),
        Attack("a thousand jobs", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 1, "sequences": [one | {"token_ids": ids[:2]}] * 1024}), (200,)),
        Attack("a thousand different jobs", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 1, "sequences": [
                {"token_ids": np.array([5, n % 256, n // 256], np.uint32), "completion_start": 1}
                for n in range(1024)]}), (200,)),
        Attack("a thousand completions", GENERATE, JSON,
               _json(prompts=[[5, 6]], n=1024, max_new_tokens=1), (200,)),
        Attack("a large answer in JSON", SCORE, JSON, lambda: json.dumps({
            "top_k": 256, "sequences": [
                {"token_ids": [5] * 4000, "completion_start": 1}]}).encode(), (200, 422)),
        Attack("a large answer in OpenAI's words", COMPLETIONS, JSON, lambda: json.dumps({
            "model": model, "max_tokens": 0, "prompt_logprobs": 250, "prompt": [5] * 4000,
            }).encode(), (200, 422)),
        Attack("a large answer in msgpack", SCORE, MSGPACK, _packed(lambda: {
            "top_k": 256, "sequences": [{"token_ids": ids[:4000], "completion_start": 1}]}),
            (200, 413)),
    ]  # fmt: skip

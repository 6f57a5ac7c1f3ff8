"""Requests made from the server's own description, right and wrong: none is answered with a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

from shared import codec, wire
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server

EXAMPLES = 20


@schemathesis.serializer(wire.MSGPACK_MEDIA_TYPE)
def packed(context, value):
    try:
        return codec.encode(value)
    except (OverflowError, TypeError, ValueError):  # too large an integer for msgpack
        reject()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(description, name) of a small teacher behind HTTP."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder)
    with running_server(folder) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json"), str(folder)


SEEDS = ("seed", "sample_seed")
TEXTS = ("prompt", "text", "content")
SEQUENCE = {"token_ids": [1, 2], "completion_start": 1}
# Numbers that the description says itself, and shares.
KEPT = (
    "top_p", "min_p", "min_tokens", "best_of",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def tame(value, name, key=""):
    """Any request as this teacher takes it: numbers, lists and texts are small, and none is empty.

    Whole numbers with a point, which JSON has and MessagePack tells from integers, are integers.
    """
    if isinstance(value, dict):
        small = {k: tame(v, name, k) for k, v in value.items() if k != "requested_token_ids"}
        if small.get("top_logprobs"):
            small["logprobs"] = True
        if "prompts" in small:
            small.setdefault("max_new_tokens", 4)
        return small
    if isinstance(value, list):
        items = [
            tame(item, name, "token_ids" if isinstance(item, list) else key) for item in value[:3]
        ]
        if key == "token_ids":
            return [*items, 1, 2][:3]
        return items or {"prompt": "word", "prompts": [[1]], "sequences": [SEQUENCE]}.get(key, [])
    if isinstance(value, str):
        return name if key == "model" else value[:4] or "word" if key in TEXTS else value
    if isinstance(value, bool) or value is None or key in KEPT:
        return value
    if key in SEEDS:
        return int(value)
    if key in ("completion_start", "n") or key.endswith("temperature"):
        return 1
    return 1 + int(value) % 50 if value == value // 1 else value


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["score", "generate", "completions", "chat/completions"])
def test_no_described_request_breaks_the_server(served, path, mode):
    """``mode`` says whether requests obey the description or break it on purpose.

    Those that obey it are sent a second time as the teacher takes them, and some are answered.
    """
    description, name = served
    answers = []

    def ask(case):
        response = case.call_and_validate(
            checks=[not_a_server_error, content_type_conformance, response_schema_conformance],
            timeout=30,
        )
        answers.append(response.status_code)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(description[f"/v1/{path}"]["POST"].as_strategy(generation_mode=mode))
    def ask_all(case):
        ask(case)
        if mode.is_positive:
            case.body = tame(case.body, name)
            ask(case)

    ask_all()
    assert {*answers} <= {200, 400, 404, 405, 413, 415, 422}
    if mode.is_positive:
        assert answers.count(200) >= 3
    else:
        assert 200 not in answers

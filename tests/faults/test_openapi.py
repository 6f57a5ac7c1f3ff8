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


def tame(value, name, key=""):
    """Values of any request, but numbers and lists as small as this teacher's limits."""
    if isinstance(value, dict):
        return {k: tame(v, name, k) for k, v in value.items() if k != "requested_token_ids"}
    if key == "prompts":  # none is empty
        return [tame(item, name) or [1] for item in value[:8]] or [[1]]
    if isinstance(value, list):
        return [tame(item, name, key) for item in value[:8]]
    if isinstance(value, bool) or key in ("seed", "sample_seed", "temperature", "top_p"):
        return value
    if isinstance(value, int | float) and value == value // 1:
        return 1 if key in ("completion_start", "n") else 1 + int(value) % 100
    return name if key == "model" else value


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["score", "generate", "completions", "chat/completions"])
def test_no_described_request_breaks_the_server(served, path, mode):
    """``mode`` says whether requests obey the description or break it on purpose.

    Those that obey it are sent a second time with numbers that the teacher takes.
    """
    description, name = served
    answers = set()

    def ask(case):
        response = case.call_and_validate(
            checks=[not_a_server_error, content_type_conformance, response_schema_conformance],
            timeout=30,
        )
        answers.add(response.status_code)

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
    assert answers <= {200, 400, 404, 405, 413, 415, 422}
    assert (200 in answers) == mode.is_positive

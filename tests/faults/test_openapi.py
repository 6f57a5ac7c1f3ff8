"""Requests made from the server's own description, right and wrong: none is answered with a 5xx."""

import psutil
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
from tests.support.server import free_port, start_server, wait_until_ready

EXAMPLES = 20


@schemathesis.serializer(wire.MSGPACK_MEDIA_TYPE)
def packed(context, value):
    try:
        return codec.encode(value)
    except (OverflowError, TypeError, ValueError):  # too large an integer for msgpack
        reject()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, process) of a small teacher."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder)
    port, log = free_port(), folder / "log"
    process = start_server(folder, port=port, log=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log)
        yield url, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def described(server):
    return schemathesis.openapi.from_url(f"{server[0]}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["score", "generate", "completions", "chat/completions"])
def test_no_described_request_breaks_the_server(server, described, path, mode):
    """``mode`` says whether requests obey the description or break it on purpose."""
    answers = set()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(described[f"/v1/{path}"]["POST"].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call_and_validate(
            checks=[not_a_server_error, content_type_conformance, response_schema_conformance],
            timeout=30,
        )
        answers.add(response.status_code)

    ask()
    assert answers <= {200, 400, 404, 405, 413, 415, 422}
    assert answers & {400, 404, 415, 422}

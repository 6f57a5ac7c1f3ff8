"""A teacher's description of itself: identity, health, metrics and documentation."""

import re

import httpx

from shared import wire
from shared.identity import model_fingerprint, tokenizer_identity
from shared.protocol import PROTOCOL_VERSION, InfoResponse, Problem
from teacher_server.backends.checkpoint import load_tokenizer
from tests.support.models import CHAT_TEMPLATE

SHORT = {"sequences": [{"token_ids": [1, 2, 3], "completion_start": 1}], "top_k": 3}


def test_the_identity_is_that_of_the_files_served(teacher):
    info = InfoResponse.model_validate(httpx.get(f"{teacher.url}/v1/info").json())
    assert info.protocol_version == PROTOCOL_VERSION == 1
    assert info.teacher.model == str(teacher.folder)
    assert info.teacher.fingerprint == model_fingerprint(teacher.folder)
    assert info.tokenizer == tokenizer_identity(
        load_tokenizer(str(teacher.folder), trust_remote_code=False)
    )
    assert info.tokenizer.chat_template == CHAT_TEMPLATE
    ids = info.tokenizer.special_token_ids
    assert (ids["eos_token"], ids["pad_token"]) == (1, 0)


def test_the_info_is_the_same_in_both_media_types(teacher):
    answers = []
    for media_type in (wire.JSON_MEDIA_TYPE, wire.MSGPACK_MEDIA_TYPE):
        response = httpx.get(f"{teacher.url}/v1/info", headers={"accept": media_type})
        assert response.headers["content-type"] == media_type
        answers.append(wire.load(InfoResponse, response.content, media_type, max_bytes=1 << 20))
    assert answers[0] == answers[1]


def test_every_answer_carries_the_identity_and_the_request_id(teacher):
    info = httpx.get(f"{teacher.url}/v1/info").json()
    headers = {"X-Request-Id": "step-12_rank-0"}
    for path, body in (("score", SHORT), ("generate", {"prompts": [[5]], "max_new_tokens": 1})):
        response = httpx.post(f"{teacher.url}/v1/{path}", json=body, headers=headers)
        assert response.json()["teacher"] == info["teacher"]
        assert response.json()["request_id"] == "step-12_rank-0"
        assert response.headers["x-request-id"] == "step-12_rank-0"


def test_a_refusal_carries_the_request_id(teacher):
    headers = {"X-Request-Id": "step-13"}
    refused = {
        422: httpx.post(f"{teacher.url}/v1/score", json={**SHORT, "top_k": 0}, headers=headers),
        415: httpx.post(f"{teacher.url}/v1/score", content=b"x", headers=headers),
        405: httpx.get(f"{teacher.url}/v1/score", headers=headers),
        404: httpx.get(f"{teacher.url}/none", headers=headers),
    }
    for status, response in refused.items():
        assert response.status_code == status
        assert Problem.model_validate(response.json()).request_id == "step-13"
        assert response.headers["x-request-id"] == "step-13"


def test_a_ready_server_says_so(teacher):
    for path, status in (("health", "ok"), ("ready", "ready")):
        response = httpx.get(f"{teacher.url}/{path}")
        assert (response.status_code, response.json()) == (200, {"status": status})


def test_the_metrics_are_in_the_text_format_of_prometheus(teacher):
    httpx.post(f"{teacher.url}/v1/score", json=SHORT)
    response = httpx.get(f"{teacher.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    line = re.compile(r'[a-z_:0-9]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [-+0-9.e]+|# .*')
    assert [text for text in response.text.splitlines() if not line.fullmatch(text)] == []
    for name in (
        'teacher_requests_total{route="/v1/score",status="200"}',
        'teacher_request_seconds_count{route="/v1/score"}',
        'teacher_tokens_total{kind="scored"}',
        'teacher_batch_tokens_total{kind="score"}',
        'teacher_model_seconds_sum{kind="score"}'
        if teacher.backend == "transformers"
        else f'vllm:num_requests_running{{engine="0",model_name="{teacher.folder}"}}',
        "teacher_queued_tokens",
    ):
        assert f"\n{name} " in response.text


def references(value):
    """Every ``$ref`` below ``value``."""
    if isinstance(value, dict):
        found = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return found + [ref for item in value.values() for ref in references(item)]
    return [ref for item in value for ref in references(item)] if isinstance(value, list) else []


def test_every_reference_of_the_openapi_document_leads_somewhere(teacher):
    document = httpx.get(f"{teacher.url}/openapi.json").json()
    assert document["openapi"].startswith("3.")
    found = set(references(document))
    parts = document["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= parts.keys()
    # And every part is reached from a route, so none is left over from another version.
    assert parts.keys() == {ref.removeprefix("#/components/schemas/") for ref in found}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "200" in operation["responses"], path


def test_the_documentation_page_reads_that_document(teacher):
    page = httpx.get(f"{teacher.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert 'fetch("openapi.json")' in page.text

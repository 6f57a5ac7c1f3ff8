"""The routes, over an engine that computes nothing: HTTP in, HTTP out, every refusal a problem."""

import asyncio
import hashlib
import json
import logging
import re
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from shared import codec, logs, wire
from shared.protocol import (
    Problem,
    ScoreResponse,
)
from teacher_server.app import TeacherApp
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.engine import Engine


def made(folder, request_timeout):
    (folder / "config.json").write_text("{}")
    settings = Settings(
        str(folder), max_request_bytes=4096, request_timeout=request_timeout,
        max_queued_tokens=200, max_request_tokens=200,
    )  # fmt: skip
    app = TeacherApp(settings, Metrics(), ApiKeys(()))
    app.ready(Engine())
    return app


@pytest.fixture
def app(tmp_path):
    return made(tmp_path, request_timeout=60.0)


@pytest.fixture
def impatient(tmp_path):
    """An application whose deadline passes soon."""
    return made(tmp_path, request_timeout=1.0)


def call(app, method, path, **options):
    async def send():
        transport = httpx.ASGITransport(app.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def body(*first_ids):
    sequences = [{"token_ids": [first, 2, 3], "completion_start": 1} for first in first_ids]
    return {"sequences": sequences, "top_k": 2}


def problem(response, status):
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate(response.json())
    assert found.status == status
    assert response.headers["x-request-id"] == found.request_id
    return found


def test_an_answer_comes_in_the_type_that_was_sent_or_accepted(app):
    packed = codec.encode(body(1))
    cases = [
        ({"content-type": wire.MSGPACK_MEDIA_TYPE}, wire.MSGPACK_MEDIA_TYPE),
        (
            {"content-type": wire.MSGPACK_MEDIA_TYPE, "accept": wire.JSON_MEDIA_TYPE},
            wire.JSON_MEDIA_TYPE,
        ),
        (
            {"content-type": "Application/MsgPack; v=1", "accept": "text/html, */*"},
            wire.MSGPACK_MEDIA_TYPE,
        ),
    ]
    for headers, expected in cases:
        response = call(app, "POST", "/v1/score", content=packed, headers=headers)
        assert response.status_code == 200
        assert response.headers["content-type"] == expected
        answer = wire.load(ScoreResponse, response.content, expected, max_bytes=1 << 20)
        assert answer.sequences[0].tail_logprob.tolist() == [-np.inf, -np.inf]


def test_a_request_id_is_echoed_when_it_is_sensible(app):
    for given, echoed in (("run-7_step-3", True), ("a b", False), ("x" * 65, False), ("é", False)):
        headers = {"X-Request-Id": given.encode()}
        response = call(app, "POST", "/v1/score", json=body(1), headers=headers)
        assert (response.headers["x-request-id"] == given) is echoed
        assert response.json()["request_id"] == response.headers["x-request-id"]
        refused = problem(call(app, "GET", "/nowhere", headers=headers), 404)
        assert (refused.request_id == given) is echoed


def test_unknown_routes_and_methods_are_problems(app):
    assert "/v1/nothing" in problem(call(app, "GET", "/v1/nothing"), 404).detail
    wrong = call(app, "GET", "/v1/score")
    assert "GET /v1/score" in problem(wrong, 405).detail
    assert wrong.headers["allow"] == "POST"
    problem(call(app, "POST", "/v1/score/", json=body(1)), 404)


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"content-type": "text/plain"}, "text/plain"),
        ({}, "Content-Type ''"),
        ({"content-type": "application/json", "accept": "text/html"}, "text/html"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "gzip"),
    ],
)
def test_an_unsupported_media_type_is_refused(app, headers, named):
    response = call(app, "POST", "/v1/score", content=b"{}", headers=headers)
    assert named in problem(response, 415).detail


def test_a_sequence_beyond_the_model_is_named(app):
    response = call(app, "POST", "/v1/score", json=body(1, 2, 99))
    assert problem(response, 500).field == "sequences.2"
    response = call(
        app, "POST", "/v1/generate",
        json={"prompts": [[5], [99]], "n": 3, "max_new_tokens": 2},
    )  # fmt: skip
    assert problem(response, 500).field == "prompts.1"


def test_an_unexpected_error_says_nothing_of_the_house(app, caplog):
    response = call(app, "POST", "/v1/score", json=body(98))
    refused = problem(response, 500)
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert refused.request_id in refused.detail
    assert "secret of the house" in caplog.text
    assert refused.request_id in caplog.text


def test_a_declared_body_over_the_limit_is_refused(app):
    response = call(
        app, "POST", "/v1/score", content=b" " * 4097, headers={"content-type": "application/json"}
    )
    assert "4097 bytes; the limit is 4096" in problem(response, 413).detail


def test_an_undeclared_body_is_cut_off_at_the_limit(app):
    sent = []

    async def endless():
        while True:
            sent.append(1024)
            yield b" " * 1024

    response = call(
        app, "POST", "/v1/score", content=endless(), headers={"content-type": "application/json"}
    )
    problem(response, 413)
    assert sum(sent) <= 4096 + 2 * 1024


def test_a_body_that_does_not_arrive_is_given_up(impatient):
    async def stalls():
        yield b"{"
        await asyncio.Event().wait()

    headers = {"content-type": "application/json"}
    response = call(impatient, "POST", "/v1/score", content=stalls(), headers=headers)
    assert "did not arrive in 1 s" in problem(response, 504).detail


def test_work_past_the_deadline_is_refused_and_its_place_is_free_again(impatient):
    response = call(impatient, "POST", "/v1/score", json=body(97))
    assert "within 1 s" in problem(response, 504).detail
    assert impatient.metrics.registry.get_sample_value("teacher_queued_tokens") == 0


def send_and_leave(app, route, asked, begun):
    """Send requests at once that are never answered, and leave when what they begin has begun."""

    async def run():
        transport = httpx.ASGITransport(app.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
            sent = [asyncio.create_task(client.post(route, json=one)) for one in asked]
            while not begun:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # for those that would begin beside the first
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("second", "computed"),
    [
        ({}, 1),
        ({"top_k": 3}, 2),
        ({"temperature": 0.5}, 2),
        ({"logprob_dtype": "float16"}, 2),
        ({"sequences": [{"token_ids": [97, 2, 3], "completion_start": 2}]}, 2),
    ],
)
def test_a_request_sent_again_while_it_is_computed_is_not_computed_beside_itself(
    app, second, computed
):
    begun = []
    app.backend.score = lambda job: begun.append(job) or asyncio.Event().wait()
    asked = [{**body(97), "temperature": 1.0, **more} for more in ({}, second)]
    send_and_leave(app, "/v1/score", asked, begun)
    assert len(begun) == computed


@pytest.mark.parametrize(
    ("options", "second", "computed"),
    [
        ({"seed": 7}, {}, 1),
        ({"temperature": 0.0}, {}, 1),
        ({"seed": 7}, {"seed": 8}, 2),
        ({"seed": 7}, {"max_new_tokens": 5}, 2),
        ({"seed": 7}, {"top_k": 2}, 2),
        ({"temperature": 1.0}, {}, 2),  # each draws anew
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_asked_for_again_is_not_written_beside_itself(
    app, options, second, computed, stream
):
    begun = []
    app.backend.generate = lambda job: begun.append(job) or asyncio.Event().wait()
    asked = {"prompts": [[97, 2]], "max_new_tokens": 4, "stream": stream, **options}
    send_and_leave(app, "/v1/generate", [asked, {**asked, **second}], begun)
    assert len(begun) == computed


def test_a_full_queue_says_when_to_come_back(app):
    with app.admission.admit("another", 198, 1):
        response = call(app, "POST", "/v1/score", json=body(1))
    assert "limit is 200" in problem(response, 429).detail
    assert int(response.headers["retry-after"]) >= 1


def test_while_loading_only_health_and_metrics_answer(app):
    app.backend = None
    assert call(app, "GET", "/health").json() == {"status": "ok"}
    assert call(app, "GET", "/metrics").status_code == 200
    for method, path in (("GET", "/ready"), ("GET", "/v1/info"), ("POST", "/v1/score")):
        response = call(app, method, path)
        assert "loading" in problem(response, 503).detail
        assert int(response.headers["retry-after"]) >= 1


def test_while_draining_work_is_refused(app):
    assert call(app, "GET", "/ready").json() == {"status": "ready"}
    app.admission.draining = True
    for method, path in (("GET", "/ready"), ("POST", "/v1/score"), ("POST", "/v1/generate")):
        assert "shutting down" in problem(call(app, method, path), 503).detail
    assert call(app, "GET", "/health").status_code == 200


def test_completions_stand_by_prompt_and_number(app):
    answer = call(
        app, "POST", "/v1/generate", json={"prompts": [[5], [6]], "n": 3, "max_new_tokens": 2}
    ).json()
    assert [[c["token_ids"][0] for c in row] for row in answer["completions"]] == [[0, 1, 2]] * 2


class Listener:
    """A caller of ``/v1/generate`` in plain ASGI, who acts on each part of the answer's body."""

    def __init__(self, app, on_part, prompts, **options):
        self.app, self.on_part = app, on_part
        self.body = json.dumps({"prompts": prompts, "max_new_tokens": 2, "stream": True, **options})
        self.gone = asyncio.Event()
        self.status, self.headers, self.parts = 0, {}, []

    async def receive(self):
        if self.body is None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        body, self.body = self.body.encode(), None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            self.parts.append(json.loads(message["body"]))
            self.on_part(self)
            await asyncio.sleep(0.01)

    def listen(self):
        scope = {
            "type": "http", "method": "POST", "path": "/v1/generate", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        asyncio.run(self.app.api(scope, self.receive, self.send))
        return [[part["prompt"], part["sample"]] for part in self.parts if "completion" in part]


def test_a_completion_is_sent_before_the_others_are_generated(app):
    """The first prompt is not done until the second one's completions have been sent."""

    def release(listener):
        if len(listener.parts) == 2:
            app.backend.release.set()

    listener = Listener(app, release, [[96], [5]], n=2)
    assert listener.listen() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    assert listener.status == 200
    assert listener.headers["content-type"] == wire.NDJSON_MEDIA_TYPE
    end = listener.parts[-1]
    assert (end["problem"], end["teacher"]["model"]) == (None, "m")
    assert end["request_id"] == listener.headers["x-request-id"]
    value = app.metrics.registry.get_sample_value
    assert value("teacher_tokens_total", {"kind": "generated"}) == 8
    assert value("teacher_tokens_total", {"kind": "prompt"}) == 4


def test_a_streamed_request_that_fails_at_once_is_an_ordinary_refusal(app):
    asked = {"max_new_tokens": 2, "stream": True}
    response = call(app, "POST", "/v1/generate", json={"prompts": [[97], [99]], **asked})
    assert problem(response, 500).field == "prompts.1"
    problem(call(app, "POST", "/v1/generate", json={"prompts": [[100]], **asked}), 422)
    with app.admission.admit("another", 198, 1):
        problem(call(app, "POST", "/v1/generate", json={"prompts": [[5]], **asked}), 429)


def test_a_streamed_request_past_the_deadline_is_an_ordinary_refusal(impatient):
    asked = {"prompts": [[97]], "max_new_tokens": 2, "stream": True}
    problem(call(impatient, "POST", "/v1/generate", json=asked), 504)


@pytest.mark.parametrize(
    ("prompt", "status", "detail"), [(97, 504, "within 1 s"), (98, 500, "the log of request")]
)
def test_a_failure_after_the_first_completion_is_told_at_the_end(impatient, prompt, status, detail):
    app = impatient
    listener = Listener(app, lambda _: app.backend.release.set(), [[5], [prompt]])
    assert listener.listen() == [[0, 0]]
    told = listener.parts[-1]["problem"]
    assert told["status"] == status
    assert detail in told["detail"]
    labels = {"route": "/v1/generate", "status": str(status)}
    assert app.metrics.registry.get_sample_value("teacher_requests_total", labels) == 1


def test_a_caller_who_leaves_a_stream_ends_the_work(app):
    listener = Listener(app, lambda caller: caller.gone.set(), [[5], [97]])
    assert listener.listen() == [[0, 0]]
    assert len(listener.parts) == 1
    assert app.backend.cancelled == 1
    value = app.metrics.registry.get_sample_value
    assert value("teacher_queued_tokens") == 0
    assert value("teacher_requests_total", {"route": "/v1/generate", "status": "499"}) == 1


def test_a_slow_reader_holds_no_place_in_the_queue(app):
    queued = []

    def look(listener):
        queued.append(app.metrics.registry.get_sample_value("teacher_queued_tokens"))

    Listener(app, look, [[5], [6], [7]]).listen()
    assert len(queued) == 4
    assert queued[1:] == [0, 0, 0]


@pytest.mark.parametrize("media_type", [wire.MSGPACK_MEDIA_TYPE, wire.MSGPACK_STREAM_MEDIA_TYPE])
def test_a_stream_comes_in_the_type_that_was_accepted(app, media_type):
    response = call(
        app, "POST", "/v1/generate", headers={"accept": media_type},
        json={"prompts": [[5]], "n": 2, "max_new_tokens": 2, "stream": True},
    )  # fmt: skip
    found = response.headers["content-type"]
    assert found == wire.MSGPACK_STREAM_MEDIA_TYPE
    *events, end = wire.stream_messages([response.content], found, max_bytes=1 << 20)
    assert [event.completion.token_ids.tolist() for event in events] == [[0, 1], [1, 1]]
    assert end.problem is None


def test_metrics_count_requests_tokens_and_refusals(app):
    call(app, "POST", "/v1/score", json=body(1, 2))
    call(app, "POST", "/v1/score", json={**body(1), "top_k": 101})
    call(app, "POST", "/v1/generate", json={"prompts": [[5, 6]], "n": 2, "max_new_tokens": 4})
    call(app, "GET", "/nowhere")
    value = app.metrics.registry.get_sample_value
    assert value("teacher_requests_total", {"route": "/v1/score", "status": "200"}) == 1
    assert value("teacher_requests_total", {"route": "/v1/score", "status": "422"}) == 1
    assert value("teacher_requests_total", {"route": "other", "status": "404"}) == 1
    assert value("teacher_rejected_total", {"reason": "invalid-request"}) == 1
    assert value("teacher_tokens_total", {"kind": "scored"}) == 4
    assert value("teacher_tokens_total", {"kind": "prompt"}) == 2 + 4
    assert value("teacher_tokens_total", {"kind": "generated"}) == 4
    assert value("teacher_request_seconds_count", {"route": "/v1/score"}) == 2


def test_the_documentation_shows_requests_answers_and_problems(app):
    schema = call(app, "GET", "/openapi.json").json()
    score = schema["paths"]["/v1/score"]["post"]
    for media_type in (wire.JSON_MEDIA_TYPE, wire.MSGPACK_MEDIA_TYPE):
        asked = score["requestBody"]["content"][media_type]["schema"]["$ref"]
        answered = score["responses"]["200"]["content"][media_type]["schema"]["$ref"]
        assert asked == "#/components/schemas/ScoreRequest"
        assert answered == "#/components/schemas/ScoreResponse"
    answered = schema["paths"]["/v1/generate"]["post"]["responses"]["200"]["content"]
    for media_type in (wire.NDJSON_MEDIA_TYPE, wire.MSGPACK_STREAM_MEDIA_TYPE):
        items = answered[media_type]["schema"]["oneOf"]
        names = [item["$ref"].removeprefix("#/components/schemas/") for item in items]
        assert names == ["GenerateEvent", "GenerateEnd"]
    parts = schema["components"]["schemas"]
    ids = parts["ScoreSequence"]["properties"]["token_ids"]
    assert (ids["type"], ids["items"]["maximum"]) == ("array", 2**32 - 1)
    assert {
        "GenerateRequest",
        "GenerateResponse",
        "GenerateEvent",
        "InfoResponse",
        "Problem",
    } <= parts.keys()
    assert call(app, "GET", "/docs").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m"])
def test_openai_routes_refuse_with_openais_error(tmp_path, path):
    (tmp_path / "config.json").write_text("{}")
    loading = TeacherApp(Settings(str(tmp_path)), Metrics(), ApiKeys(()))
    response = call(loading, "GET", path)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json() == {
        "error": {
            "message": "the model is loading", "type": "unavailable", "param": None, "code": 503
        }
    }  # fmt: skip


def test_openai_routes_hide_what_went_wrong_inside(app):
    app.openai.plan = lambda asked, info: 1 / 0
    response = call(app, "POST", "/v1/completions", json={"model": "m", "prompt": [5]})
    assert response.status_code == 500
    assert "division" not in response.text
    assert response.json()["error"]["type"] == "internal-error"


KEY = "k" * 32


@pytest.fixture
def locked(app):
    app.keys = ApiKeys([KEY])
    return app


def test_without_a_key_every_route_but_the_probes_is_closed(locked):
    for route in locked.api.routes:
        if route.path in ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"):
            continue  # what this server is in general; nothing of what it serves
        (method,) = route.methods - {"HEAD"}
        for headers in ({}, {"authorization": "Bearer " + "x" * 32}):
            response = call(locked, method, route.path, headers=headers, json=body(1))
            if route.path in ("/health", "/ready"):
                assert response.status_code == 200
                continue
            assert response.status_code == 401, route.path
            assert response.headers["www-authenticate"] == "Bearer"
            if "model" in route.path or "completions" in route.path:
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("unauthorized", 401)
            else:
                assert problem(response, 401).type == "urn:sparse-gkd:problem:unauthorized"
        response = call(
            locked, method, route.path, headers={"authorization": f"Bearer {KEY}"}, json=body(1)
        )
        assert response.status_code != 401, route.path


def test_a_body_without_a_key_is_not_read(locked):
    class Unread(httpx.AsyncByteStream):
        async def __aiter__(self):
            raise AssertionError("the body was read")
            yield b""

    headers = {"content-type": wire.JSON_MEDIA_TYPE, "content-length": "4000"}
    response = call(locked, "POST", "/v1/score", content=Unread(), headers=headers)
    problem(response, 401)
    assert response.headers["connection"] == "close"


def test_refused_callers_are_counted_and_keys_are_not_in_the_metrics(locked):
    call(locked, "GET", "/v1/info", headers={"authorization": "Bearer " + "x" * 32})
    headers = {"authorization": f"Bearer {KEY}"}
    shown = call(locked, "GET", "/metrics", headers=headers).text
    assert 'teacher_requests_total{route="/v1/info",status="401"} 1.0' in shown
    assert 'teacher_rejected_total{reason="unauthorized"} 1.0' in shown
    assert KEY not in shown
    assert "x" * 32 not in shown


def clients_of(app, *headers):
    """Whom the jobs of requests with these headers are counted to."""
    seen, score = [], app.backend.score

    async def scored(job):
        seen.append(job.client)
        return await score(job)

    app.backend.score = scored
    for some in headers:
        assert call(app, "POST", "/v1/score", json=body(1), headers=some).status_code == 200
    return seen


def test_without_keys_a_client_is_an_address_whatever_it_calls_itself(app):
    named = [{"x-client-id": name} for name in ("a", "b", "x" * 99)]
    assert set(clients_of(app, {}, *named)) == {"127.0.0.1"}


def test_with_keys_a_client_is_its_key_whatever_it_calls_itself(app):
    other = "o" * 32
    app.keys = ApiKeys([KEY, other])
    headers = [
        {"authorization": f"Bearer {key}", "x-client-id": name}
        for key, name in ((KEY, "a"), (KEY, "b"), (other, "a"))
    ]
    first, same, another = clients_of(app, *headers)
    assert first == same != another
    assert KEY not in first


def test_an_answer_too_large_for_json_is_refused_and_fine_in_msgpack(app, monkeypatch):
    monkeypatch.setattr(
        "teacher_server.http.replies.MAX_JSON_ARRAYS", 47
    )  # two rows of k = 2 take 48
    refused = problem(call(app, "POST", "/v1/score", json=body(1)), 422)
    assert refused.field == "sequences"
    assert "48 bytes of arrays; the limit in JSON is 47" in refused.detail
    accept = {"accept": wire.MSGPACK_MEDIA_TYPE}
    assert call(app, "POST", "/v1/score", json=body(1), headers=accept).status_code == 200
    prompt = {"prompts": [[5]], "max_new_tokens": 3, "top_k": 1}
    assert "60 bytes" in problem(call(app, "POST", "/v1/generate", json=prompt), 422).detail


def test_an_answer_that_never_fits_is_too_large_and_not_for_later(app):
    app.admission.bytes.limit = 600
    asked = {**body(1, 2), "top_k": 2}  # two rows of 24 bytes each, 16 times that in JSON
    refused = call(app, "POST", "/v1/score", json=asked)
    told = problem(refused, 413)
    assert "retry-after" not in refused.headers
    assert told.field == "sequences"
    assert re.search(r"takes \d+ bytes.* is 600\. .*raise --max-held-mib", told.detail)
    # As large as the limit allows, it is a matter of what others hold.
    app.admission.bytes.limit = int(re.search(r"takes (\d+) bytes", told.detail)[1])
    assert call(app, "POST", "/v1/score", json=asked).status_code == 200
    app.admission.bytes.take("another", 1)
    assert "Try again later" in problem(call(app, "POST", "/v1/score", json=asked), 429).detail


@pytest.mark.parametrize("stream", [False, True])
def test_completions_that_never_fit_are_too_large_and_not_for_later(app, stream):
    app.admission.bytes.limit = 1000
    asked = {"prompts": [[5]], "max_new_tokens": 50, "stream": stream}
    told = problem(call(app, "POST", "/v1/generate", json=asked), 413)
    assert told.field == "prompts"
    assert "--max-held-mib" in told.detail


def test_an_openai_answer_that_never_fits_is_too_large_and_not_for_later(app):
    app.admission.bytes.limit = 1000
    asked = {"model": "m", "prompt": [5, 6], "max_tokens": 50}
    refused = call(app, "POST", "/v1/completions", json=asked)
    assert refused.status_code == 413
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("payload-too-large", 413)
    assert re.search(r"takes \d+ bytes.* is 1000\. .*raise --max-held-mib", error["message"])


def test_more_tokens_than_the_queue_ever_takes_are_not_for_later(app):
    """Scoring the prompts and completing them, each within the request's limit, is too much."""
    asked = {"model": "m", "prompt": [[5] * 50] * 3, "max_tokens": 10, "prompt_logprobs": 1}
    refused = call(app, "POST", "/v1/completions", json=asked)
    assert refused.status_code == 413
    message = refused.json()["error"]["message"]
    assert re.search(r"takes 330 tokens.* is 200\. .*raise --max-queued-tokens", message)


def test_a_dead_engine_is_not_alive(app):
    assert call(app, "GET", "/health").status_code == 200
    app.backend.alive = False
    assert "restart the server" in problem(call(app, "GET", "/health"), 503).detail


@pytest.fixture
def lines():
    """The lines that the server logs, as objects."""
    found = []

    class Lines(logging.Handler):
        def emit(self, record):
            found.append(json.loads(logs.JsonFormatter().format(record)))

    handler, server = Lines(), logging.getLogger("teacher_server")
    level = server.level
    server.addHandler(handler)
    server.setLevel(logging.INFO)
    yield found
    server.removeHandler(handler)
    server.setLevel(level)


def test_a_request_is_one_line_that_tells_nothing_of_what_it_holds(app, lines):
    key = "k" * 32
    settings = replace(app.settings, log_requests=True)
    locked = TeacherApp(settings, Metrics(), ApiKeys([key]))
    locked.ready(Engine())
    headers = {"authorization": f"Bearer {key}", "x-request-id": "run-7_step-3"}
    call(locked, "POST", "/v1/score", json=body(1), headers=headers)
    call(locked, "POST", "/v1/score", json={**body(1), "top_k": 101}, headers=headers)
    call(locked, "GET", "/v1/info")
    call(locked, "GET", "/a/path%20of/the/caller", headers=headers)
    call(locked, "GET", "/ready")
    call(locked, "GET", "/metrics", headers=headers)
    scored, refused, unknown, elsewhere = lines
    always = {"time", "level", "logger", "message", "request_id", "method", "route", "status",
              "seconds"}  # fmt: skip
    assert scored.keys() == always | {"sequences", "tokens", "client"}
    assert refused.keys() == always | {"client"}
    assert unknown.keys() == elsewhere.keys() == always
    assert re.fullmatch(r"POST /v1/score 200 in \d\.\d{3} s", scored["message"])
    assert re.fullmatch(r"GET other 404 in \d\.\d{3} s", elsewhere["message"])
    assert scored["request_id"] == refused["request_id"] == "run-7_step-3"
    assert (scored["sequences"], scored["tokens"]) == (1, 3)
    assert scored["client"] == hashlib.sha256(key.encode()).hexdigest()[:16]
    assert (refused["status"], unknown["status"]) == (422, 401)


def test_the_line_of_an_error_has_the_id_of_its_request(app, lines):
    refused = problem(call(app, "POST", "/v1/score", json=body(98)), 500)
    failed, answered = lines
    assert failed["request_id"] == answered["request_id"] == refused.request_id
    assert failed["level"] == "error"
    assert "ZeroDivisionError" in failed["exception"]
    assert answered["status"] == 500


def test_a_minute_is_one_line_and_a_quiet_minute_none(app, lines):
    app.throughput.log()
    assert lines == []
    for first in (1, 2, 3):
        call(app, "POST", "/v1/score", json=body(first))
    call(app, "POST", "/v1/generate", json={"prompts": [[5, 6]], "max_new_tokens": 2, "seed": 1})
    call(app, "POST", "/v1/score", json={**body(1), "top_k": 101})
    call(app, "GET", "/v1/info")
    call(app, "GET", "/ready")
    assert lines == []
    time.sleep(1)  # so that rounding the period matters little
    app.throughput.log()
    app.throughput.log()
    (line,) = lines
    pattern = (
        r"Last \d+ s: 4 requests, \d+ scored tokens/s, \d+ generated tokens/s, "
        r"0 sequences waiting, p50 \d\.\d{3} s, p99 \d\.\d{3} s, 1 refused"
    )
    assert re.fullmatch(pattern, line["message"])
    assert (line["requests"], line["refused"], line["waiting"]) == (4, 1, 0)
    # Rates are rounded; three scored sequences have two positions each.
    scored = line["scored_tokens_per_second"] * line["period_seconds"]
    assert 6 - scored <= line["period_seconds"]
    assert line["generated_tokens_per_second"] > 0
    assert 0 < line["p50_seconds"] <= line["p99_seconds"]


def test_what_fails_by_the_servers_own_fault_has_a_line(app, lines):
    call(app, "POST", "/v1/score", json=body(98))
    assert [line["status"] for line in lines if "status" in line] == [500]


def test_the_state_is_a_metric(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    made, engine = TeacherApp(Settings(str(tmp_path)), Metrics(), ApiKeys(())), Engine()

    def states():
        names = ("loading", "ready", "draining", "dead")
        value = made.metrics.registry.get_sample_value
        return [name for name in names if value("teacher_state", {"state": name})]

    assert states() == ["loading"]
    made.ready(engine)
    assert states() == ["ready"]
    engine.alive = False
    assert states() == ["dead"]
    made.admission.draining = True
    assert states() == ["draining"]

"""A teacher that means harm: what it says is refused or cleaned, and is never kept or obeyed."""

import contextlib
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from markdown_it import MarkdownIt

from shared import logs, wire
from shared.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    SparseGKDError,
    TeacherAnswerError,
    TeacherUnreachableError,
)
from shared.protocol import Problem, ScoreResponse
from student_trainer.commands.main import main
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.parse import parse
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from student_trainer.training.model_card import TrainingRows, model_card
from tests.support import stub
from tests.support.fault_proxy import FaultProxy, answered, changed
from tests.support.http import until
from tests.support.stub import IDENTITY, StubTeacher

K = 3
SEQUENCE = (np.array([5, 6, 7, 8], np.uint32), 2)
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"
FORGED = f"no{ESCAPES}\nWARNING all is well"


@contextlib.contextmanager
def connected(url, **options):
    with SparseGkdTeacher([url], **{"timeout": 10.0, **options}) as client:
        client.connect()
        yield client


@pytest.fixture
def proxy():
    with StubTeacher().serving() as teacher, FaultProxy(teacher.url).serving() as proxy:
        yield proxy


def harmless(text):
    return all(c.isprintable() for c in text)


def test_cookies_are_never_kept():
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            seen.append(self.headers["Cookie"])
            _, headers, body = stub.packed(stub.info())
            self.send_response(200)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.send_header("Set-Cookie", "session=evil; Path=/; Max-Age=99999")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        with connected(f"http://127.0.0.1:{server.server_address[1]}") as client:
            client.connect()
        server.shutdown()
    assert len(seen) >= 4
    assert set(seen) == {None}


def test_a_top_k_that_names_an_id_twice_is_refused(proxy):
    def twice(message):
        (score,) = message.sequences
        ids = score.token_ids.copy()
        ids[1] = [50, 60, 50]
        return {"sequences": [score.model_copy(update={"token_ids": ids})]}

    with connected(proxy.url) as client:
        proxy.faults = [changed(ScoreResponse, twice)]
        with pytest.raises(TeacherAnswerError, match="token id 50 twice in row 1"):
            client.score([SEQUENCE], ScoreOptions(K))


def test_a_top_k_out_of_order_is_refused(proxy):
    def rising(message):
        (score,) = message.sequences
        logprobs = score.logprobs.copy()
        logprobs[0] = [-9.0, -5.0, -4.7]
        next_logprob = np.full_like(score.next_token_logprob, -9.5)
        return {
            "sequences": [
                score.model_copy(update={"logprobs": logprobs, "next_token_logprob": next_logprob})
            ]
        }

    with connected(proxy.url) as client:
        proxy.faults = [changed(ScoreResponse, rising)]
        with pytest.raises(TeacherAnswerError, match="from the most probable down"):
            client.score([SEQUENCE], ScoreOptions(K))


@pytest.mark.parametrize("token_id", [-1, 100, 2**40])
def test_an_end_token_outside_the_vocabulary_is_refused(token_id):
    with (
        StubTeacher(info=stub.info(eos_token_ids=[1, token_id])).serving() as teacher,
        pytest.raises(TeacherAnswerError, match=f"eos_token_ids names {token_id}"),
        connected(teacher.url),
    ):
        pass


NAMES = {
    "escapes": "model" + ESCAPES,
    "a line break": "model\nWARNING all is well",
    "no end": "x" * 100_000,
}


@pytest.mark.parametrize("field", ["model", "fingerprint", "dtype", "backend", "version"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_name_that_would_write_over_a_terminal_is_refused(field, name):
    evil = stub.info(IDENTITY.model_copy(update={field: name}))
    with (
        StubTeacher(info=evil).serving() as teacher,
        pytest.raises(TeacherAnswerError, match=f"the teacher's {field} is ") as caught,
        connected(teacher.url),
    ):
        pass
    assert harmless(str(caught.value))
    assert len(str(caught.value)) < 500


def test_control_characters_of_a_problem_reach_no_message(proxy):
    problem = {"type": "t", "title": "t", "status": 422, "detail": FORGED + "x" * 30_000,
               "request_id": FORGED, "field": FORGED}  # fmt: skip
    body = json.dumps(problem).encode()
    with connected(proxy.url) as client:
        proxy.faults = [answered(422, body, Content_Type="application/problem+json")]
        with pytest.raises(InvalidRequestError, match=r"no\\x1b\[2J") as caught:
            client.score([SEQUENCE], ScoreOptions(K))
    for text in (str(caught.value), caught.value.field, caught.value.request_id):
        assert harmless(text)
        assert len(text) < 3000


def test_control_characters_at_the_end_of_a_stream_reach_no_message():
    def evil(request):
        problem = Problem(type="t", title="t", status=422, detail=FORGED, request_id="r")
        return stub.streamed([stub.end(problem=problem)])

    with StubTeacher(script=[evil]).serving() as teacher, connected(teacher.url) as client:
        sampling = Sampling(4, 0.0, seed=1, stop_token_ids=[1])
        with pytest.raises(InvalidRequestError) as caught:
            client.generate([np.array([5], np.uint32)], sampling)
    assert harmless(str(caught.value))


HEADERS = {
    "a redirect": answered(307, Location="http://x/\x9b2J" + "y" * 5000),
    "a content type": answered(200, b"x", Content_Type="text/\x9b2J" + "y" * 5000),
    "an encoding": answered(200, b"x", Content_Encoding="\x9b2J" + "y" * 5000),
    "a field": answered(
        200, wire.codec.encode({FORGED + "y" * 5000: 1}), Content_Type="application/msgpack"
    ),
}


@pytest.mark.parametrize("evil", HEADERS.values(), ids=HEADERS.keys())
def test_control_characters_elsewhere_in_an_answer_reach_no_message(proxy, evil):
    with connected(proxy.url) as client:
        proxy.faults = [evil]
        with pytest.raises(SparseGKDError) as caught:
            client.score([SEQUENCE], ScoreOptions(K))
    assert harmless(str(caught.value))
    assert len(str(caught.value)) < 3000


def test_neither_a_log_nor_the_last_words_of_a_command_move_a_terminal(capsys):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("evil")
    logger.addHandler(handler)
    logger.warning("the teacher says %s", ESCAPES)
    logs.log_failure("student-trainer", f"the teacher says {ESCAPES}")
    for text in (stream.getvalue(), capsys.readouterr().err):
        assert text.endswith("\n")
        assert harmless(text[:-1])
        assert "\\x1b[2J" in text


def test_a_command_that_meets_an_evil_name_prints_no_escape(capfd):
    evil = stub.info(IDENTITY.model_copy(update={"model": "model" + ESCAPES}))
    with StubTeacher(info=evil).serving() as teacher:
        assert main(["doctor", "--teacher_url", teacher.url]) == 1
    out, err = capfd.readouterr()
    assert "the teacher's model is model\\x1b[2J" in out + err
    assert not set(ESCAPES[:1] + "\x07\x9b\u202e") & set(out + err)


def teacher_threads():
    return [thread for thread in threading.enumerate() if thread.name == "teacher"]


def endless_100(exchange):
    with contextlib.suppress(OSError):
        while not exchange.over.is_set():
            exchange.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def dripping_103(exchange):
    with contextlib.suppress(OSError):
        while not exchange.over.wait(0.05):
            exchange.client.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")


def dripping_chunk(exchange):
    """The size of a chunk that never comes: no byte of it is part of the body."""
    with contextlib.suppress(OSError):
        exchange.client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
        while not exchange.over.wait(0.05):
            exchange.client.sendall(b"x")


ENDLESS = {
    "100 Continue, fast": (endless_100, (TeacherUnreachableError, DeadlineExceededError)),
    "103 Early Hints, slowly": (dripping_103, DeadlineExceededError),
    "the head of a chunk": (dripping_chunk, DeadlineExceededError),
}


@pytest.mark.parametrize(("evil", "error"), ENDLESS.values(), ids=ENDLESS.keys())
def test_what_never_ends_ends_in_the_timeout_and_leaves_no_thread(proxy, evil, error):
    before = len(teacher_threads())
    with connected(proxy.url, timeout=1.0) as client:
        proxy.always = evil
        call = client.submit(client.score, [SEQUENCE], ScoreOptions(K))
        with pytest.raises(error):
            call.result(15)
        until(lambda: len(teacher_threads()) <= before)


MARKDOWN = [
    "a`<img src=x onerror=alert(1)>`[x](http://evil)|**b**",
    "``` <script>alert(1)</script> ``",
    "`",
    "x" * 900,
]


@pytest.mark.parametrize("name", MARKDOWN, ids=range(len(MARKDOWN)))
@pytest.mark.parametrize("field", ["model", "dtype", "backend"])
def test_a_name_with_markdown_in_it_is_text_in_the_model_card(name, field):
    evil = stub.info(IDENTITY.model_copy(update={field: name}))
    with StubTeacher(info=evil).serving() as teacher, connected(teacher.url) as client:
        identity = client.info.teacher
    words = ["--model_name_or_path=org/base", "--dataset_name=org/rows", "--output_dir=out",
             "--teacher_url=http://host:8000"]  # fmt: skip
    flags = parse(words, *ARGUMENTS["distill"], prog="", description="")
    rows = TrainingRows(3, 3, 1)
    card = model_card(
        "student", [], arguments=flags, teachers={"": identity}, rows=rows, dtype="float32"
    )
    _, _, text = card.split("---\n", 2)
    tokens = [
        token
        for block in MarkdownIt("commonmark").parse(text)
        if block.content.startswith("The teacher was")
        for token in block.children
    ]
    shown = [token.content for token in tokens if token.type == "code_inline"]
    if name.count("/") < 2 or field != "model":
        assert any(name in code or name.strip() in code for code in shown)
    kinds = {token.type for token in tokens}
    assert kinds <= {"text", "code_inline", "softbreak"}

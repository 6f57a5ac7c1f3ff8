"""A teacher that wants a key, behind https with a private authority: who gets in, what is kept."""

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from student_trainer.commands.main import main
from tests.e2e.test_distillation import distill, flags
from tests.support import forked
from tests.support.certificates import make_authority
from tests.support.server import free_port, start_server, wait_until_ready

KEYS = ("of-the-file-" + "1f" * 16, "of-the-environment-" + "2e" * 16)
WRONG = "wrong-" + "3d" * 16
# Nothing of what is asked is for the log.
MARKER = "marker-of-a-private-prompt"


@dataclass(frozen=True)
class Guarded:
    url: str
    root: Path
    log: Path
    pid: int


@pytest.fixture(scope="module")
def guarded(unserved_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    authority = make_authority(folder / "tls")
    (folder / "keys").write_text(f"# of the trainer\n{KEYS[0]}\n")
    port, log = free_port(), folder / "server.log"
    server = start_server(
        unserved_world.teacher, "--api-key-file", str(folder / "keys"), "--log-level", "debug",
        "--ssl-certfile", str(authority.certificate), "--ssl-keyfile", str(authority.key),
        port=port, log=log, command_line=True, TEACHER_API_KEYS=KEYS[1],
    )  # fmt: skip
    try:
        url = f"https://127.0.0.1:{port}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(authority.root))
            wait_until_ready(server, url, log)  # without a key
        yield Guarded(url, authority.root, log, server.pid)
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def trusting(guarded, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(guarded.root))
    return monkeypatch


@pytest.fixture
def world(unserved_world, guarded):
    return type("World", (), {
        "student": unserved_world.student, "rows": unserved_world.rows,
        "held_out": unserved_world.held_out, "url": guarded.url,
    })  # fmt: skip


def holding(secret, folder):
    """Files below ``folder`` that hold the bytes of ``secret``."""
    return [
        str(path) for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]  # fmt: skip


def talkative(argv):
    """Run the command while every library logs all it can: httpx tells of each request."""
    logging.basicConfig(level=1, stream=sys.stderr)
    return main(argv)


def test_a_whole_run_leaves_no_key_behind(guarded, world, tmp_path):
    words = flags(
        world, tmp_path / "out", teacher_url=guarded.url, max_steps=4, lmbda=0.5, seq_kd="true",
        save_strategy="steps", save_steps=2, report_to="tensorboard", trace_steps="1-4",
        log_level="debug",
    )  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TEACHER_API_KEY": KEYS[0], "SSL_CERT_FILE": str(guarded.root),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "logs"),
    }  # fmt: skip
    log = tmp_path / "trainer.log"
    trainer = forked.start(talkative, ["distill", *words], log, environment=environment)
    assert trainer.wait(400) == 0, log.read_text()[-4000:]
    # What is looked through is there, and not compressed.
    assert holding("send_request_headers", tmp_path) == [str(tmp_path / "trainer.log")]
    saved = holding(str(tmp_path / "out"), tmp_path / "out")
    assert str(tmp_path / "out" / "checkpoint-2" / "training_args.bin") in saved
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    for key in KEYS:
        assert holding(key, tmp_path) == []
        assert key not in guarded.log.read_text()


def test_the_process_list_shows_no_key(guarded):
    words = Path(f"/proc/{guarded.pid}/cmdline").read_bytes()
    assert b"--api-key-file" in words
    assert not any(key.encode() in words for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_every_route(guarded, trusting, key):
    headers = {"Authorization": f"Bearer {key}"}
    for route in ("/v1/info", "/v1/models", "/metrics"):
        assert httpx.get(guarded.url + route).status_code == 401
        answer = httpx.get(guarded.url + route, headers=headers)
        assert answer.status_code == 200
        assert not any(secret in answer.text for secret in KEYS)


def test_openais_client_brings_its_key_and_nothing_it_says_is_logged(guarded, trusting):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[1], max_retries=0)
    (model,) = client.models.list()
    messages = [{"role": "user", "content": MARKER}]
    client.chat.completions.create(model=model.id, messages=messages, max_tokens=2)
    client.completions.create(model=model.id, prompt=MARKER, max_tokens=2)
    for mistake in ({"model": MARKER}, {"max_tokens": MARKER}, {"prompt": MARKER * 100}):
        with pytest.raises(openai.APIStatusError):
            client.completions.create(**{"model": model.id, "prompt": MARKER, **mistake})
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    for body in (MARKER, json.dumps({"sequences": MARKER})):
        answer = httpx.post(f"{guarded.url}/v1/score", content=body, headers=headers)
        assert answer.status_code in (400, 422)
    httpx.get(f"{guarded.url}/{MARKER}")
    with pytest.raises(openai.AuthenticationError, match="none of this server's") as refused:
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=WRONG).models.list()
    assert refused.value.type == "unauthorized"
    log = guarded.log.read_text()
    assert "Ready" in log
    assert MARKER not in log
    assert WRONG not in log


def test_a_file_holds_the_trainers_key_as_well(world, trusting, tmp_path):
    (tmp_path / "key").write_text(f"# mine\n{KEYS[0]}\n")
    trusting.setenv("TEACHER_API_KEY", WRONG)  # the flag wins
    assert distill(world, tmp_path / "out", teacher_api_key_file=tmp_path / "key", max_steps=1) == 0


@pytest.mark.parametrize(
    ("key", "said"),
    [(None, "does not take requests without a key"), (WRONG, "does not take the key that was")],
)
def test_a_trainer_with_the_wrong_key_stops_at_once(world, trusting, tmp_path, capsys, key, said):
    trusting.delenv("TEACHER_API_KEY", raising=False)
    if key is not None:
        trusting.setenv("TEACHER_API_KEY", key)
    assert distill(world, tmp_path / "out", teacher_timeout=10_000) == 2
    error = capsys.readouterr().err
    assert f"{world.url} answers 401: it {said}" in error
    assert "TEACHER_API_KEY or by --teacher_api_key_file" in error
    assert WRONG not in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_authority_stops_the_trainer_at_once(world, tmp_path, monkeypatch, capsys):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEACHER_API_KEY", KEYS[0])
    assert distill(world, tmp_path, teacher_timeout=10_000) == 1
    error = capsys.readouterr().err
    assert f"the certificate of {world.url} is not trusted" in error
    assert "SSL_CERT_FILE" in error


def test_a_server_open_to_other_machines_needs_a_key(unserved_world, tmp_path):
    for options, environment in (
        ((), {}),
        (("--allow-unauthenticated",), {"TEACHER_API_KEYS": KEYS[0]}),
    ):
        log = tmp_path / "log"
        server = start_server(
            unserved_world.teacher, "--host", "0.0.0.0", *options, port=free_port(), log=log,
            **environment,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.callback(server.kill)
            assert server.wait(60) == 2
        assert "--allow-unauthenticated" in log.read_text()
        assert KEYS[0] not in log.read_text()

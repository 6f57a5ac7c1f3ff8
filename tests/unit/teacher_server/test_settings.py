"""Flags that cannot work are refused before a model loads."""

import pytest

from shared.errors import ConfigurationError
from teacher_server.settings import Settings
from tests.support.certificates import make_authority, openssl


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_the_defaults_are_consistent(folder):
    settings = Settings(folder)
    assert settings.max_request_tokens <= settings.max_queued_tokens
    assert settings.host == "127.0.0.1"
    assert settings.trust_remote_code is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": -1}, "--port -1 must be from 0 to 65535"),
        ({"port": 65_536}, "--port 65536 must be from 0 to 65535"),
        ({"ssl_keyfile": "key.pem"}, r"--ssl-keyfile key\.pem needs --ssl-certfile"),
        ({"ssl_certfile": "/no/cert.pem"}, r"--ssl-certfile /no/cert\.pem: No such file"),
        ({"engine_flags": ("--api-key", "s3cret")}, "use --api-key-file, or TEACHER_API_KEYS"),
        ({"max_model_len": 1}, "--max-model-len 1 must be at least 2"),
        ({"max_batch_tokens": 0}, "--max-batch-tokens 0 must be above 0"),
        ({"max_top_k": -3}, "--max-top-k -3 must be above 0"),
        ({"score_chunk_mib": 0}, "--score-chunk-mib 0 must be above 0"),
        ({"request_timeout": 0.0}, r"--request-timeout 0\.0 must be above 0"),
        ({"request_timeout": float("nan")}, "--request-timeout nan must be above 0"),
        ({"drain_timeout": float("inf")}, "--drain-timeout inf must be above 0 and finite"),
        ({"max_request_bytes": 0}, "--max-request-bytes 0 must be above 0"),
        ({"max_held_mib": 575}, "--max-held-mib 575 must be at least 576"),
        ({"max_request_bytes": 1 << 31}, "--max-held-mib 2048 must be at least 2560"),
        (
            {"max_request_tokens": 11, "max_queued_tokens": 10},
            "--max-request-tokens 11 is over --max-queued-tokens 10",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused(folder, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        Settings(folder, **changes)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./missing", "missing", "a/b/c", "~/x", "models/foo", "tests/foo"]
)
def test_a_missing_folder_is_refused(model):
    with pytest.raises(ConfigurationError, match=f"folder {model} does not exist"):
        Settings(model)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        Settings(str(tmp_path))


def test_a_hub_id_is_left_to_the_loader():
    assert Settings("org/name").model == "org/name"


def test_adapters_alone_are_refused_with_the_command_that_merges_them(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="student-trainer merge --model_name_or_path"):
        Settings(str(tmp_path))


@pytest.mark.parametrize(("installed", "engine"), [(True, "vllm"), (False, "transformers")])
def test_auto_is_vllm_where_it_is_installed(folder, monkeypatch, installed, engine):
    found = object() if installed else None
    monkeypatch.setattr("teacher_server.settings.find_spec", lambda name: found)
    assert Settings(folder).engine == engine
    assert Settings(folder, backend="transformers").engine == "transformers"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.7", False),
        ("teacher", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(folder, host, loopback):
    assert Settings(folder, host=host).loopback is loopback


def test_a_certificate_and_a_key_that_do_not_fit_are_refused(folder, tmp_path):
    ours, theirs = (make_authority(tmp_path / name) for name in ("ours", "theirs"))
    Settings(folder, ssl_certfile=str(ours.certificate), ssl_keyfile=str(ours.key))
    with pytest.raises(ConfigurationError, match="give PEM files of a certificate"):
        Settings(folder, ssl_certfile=str(ours.certificate), ssl_keyfile=str(theirs.key))
    with pytest.raises(ConfigurationError, match="give PEM files of a certificate"):
        Settings(folder, ssl_certfile=str(ours.certificate))  # holds no private key
    locked = tmp_path / "locked.pem"
    openssl("rsa", "-aes256", "-passout", "pass:word", "-in", ours.key, "-out", locked)
    with pytest.raises(ConfigurationError, match="without a password"):
        Settings(folder, ssl_certfile=str(ours.certificate), ssl_keyfile=str(locked))

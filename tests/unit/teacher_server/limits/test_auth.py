"""Which keys a server takes, where it insists on one, and that it keeps none."""

import hashlib
import hmac
import os

import pytest

from shared.errors import ConfigurationError, UnauthorizedError
from teacher_server.limits.auth import ENVIRONMENT, ApiKeys, load_keys
from teacher_server.settings import Settings

FIRST, SECOND, THIRD = "first-" + "1" * 32, "second-" + "2" * 32, "third-" + "3" * 32


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "")
    return monkeypatch


@pytest.fixture
def loaded(tmp_path):
    def load(text=None, **flags):
        if text is not None:
            (tmp_path / "keys").write_text(text)
            flags["api_key_file"] = str(tmp_path / "keys")
        return load_keys(Settings("org/name", **flags))

    return load


def test_each_key_of_the_file_and_of_the_environment_is_taken(loaded, environment):
    environment.setenv(ENVIRONMENT, f"{SECOND}, {THIRD}")
    keys = loaded(f"# trainer\n{FIRST}\n")
    for key in (FIRST, SECOND, THIRD):
        keys.check(f"Bearer {key}")
        keys.check(f"bearer  {key} ")


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", FIRST, f"Basic {FIRST}", f"Bearer {FIRST[:-1]}",
        f"Bearer {FIRST}x", f"Bearer {FIRST.upper()}", f"Bearer {FIRST} {SECOND}", "Bearer é",
        f"Bearer {hashlib.sha256(FIRST.encode()).hexdigest()}",
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_not_repeated(header):
    with pytest.raises(UnauthorizedError) as caught:
        ApiKeys([FIRST, SECOND]).check(header)
    assert FIRST[:-1] not in caught.value.detail


def test_every_digest_is_compared_even_after_a_match(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append(other)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(
        "teacher_server.limits.auth.hmac", type("Hmac", (), {"compare_digest": compare})
    )
    keys = ApiKeys([FIRST, SECOND, THIRD])
    for key in (FIRST, SECOND, THIRD):
        keys.check(f"Bearer {key}")
    assert len(compared) == 9


def test_neither_the_object_nor_the_environment_keeps_a_key(loaded, environment):
    environment.setenv(ENVIRONMENT, FIRST)
    keys = loaded()
    assert ENVIRONMENT not in os.environ
    assert FIRST not in repr(vars(keys))
    assert vars(keys) == {"_digests": (hashlib.sha256(FIRST.encode()).digest(),)}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "teacher"])
def test_an_address_for_other_machines_needs_a_key(loaded, host):
    with pytest.raises(
        ConfigurationError, match=r"--host .*--api-key-file or TEACHER_API_KEYS, or"
    ):
        loaded(host=host)
    assert loaded(FIRST, host=host)
    assert not loaded(host=host, allow_unauthenticated=True)


def test_this_machine_alone_needs_none(loaded):
    keys = loaded()
    assert not keys
    keys.check(None)


def test_a_key_that_can_be_guessed_is_refused(loaded, environment):
    with pytest.raises(ConfigurationError, match=r"--api-key-file .* a key of 15 characters"):
        loaded("x" * 15)
    environment.setenv(ENVIRONMENT, "swordfish")
    with pytest.raises(ConfigurationError, match="a key of 9 characters") as caught:
        loaded()
    assert "swordfish" not in str(caught.value)


def test_keys_and_their_absence_are_not_both_asked_for(loaded):
    with pytest.raises(ConfigurationError, match="--allow-unauthenticated contradicts the keys"):
        loaded(FIRST, host="0.0.0.0", allow_unauthenticated=True)

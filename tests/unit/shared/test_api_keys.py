"""Files of keys: what is a key, and that no message shows one."""

import pytest

from shared.api_keys import read_keys
from shared.errors import ConfigurationError


def test_keys_stand_one_a_line_between_comments(tmp_path):
    (tmp_path / "keys").write_text("# of the trainer\nfirst-key\n\n  second/key+=  \r\n#third\n")
    assert read_keys(str(tmp_path / "keys"), "--keys") == ["first-key", "second/key+="]


@pytest.mark.parametrize(
    "content", [b"good-key\nsec ret\n", b"good-key\ns\xc3\xa9cret", b"a\n\xff"]
)
def test_a_line_that_is_no_key_is_named_and_not_shown(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigurationError, match="keys, line 2: a key is visible ASCII") as caught:
        read_keys(str(tmp_path / "keys"), "--keys")
    assert "cret" not in str(caught.value)


def test_a_file_without_keys_is_refused(tmp_path):
    (tmp_path / "keys").write_text("# none yet\n\n")
    with pytest.raises(ConfigurationError, match="holds no key; make one with `openssl rand"):
        read_keys(str(tmp_path / "keys"), "--keys")
    with pytest.raises(ConfigurationError, match="--keys /no/such: No such file"):
        read_keys("/no/such", "--keys")

"""Addresses as people type them."""

import pytest

from shared.address import server_address
from shared.errors import ConfigurationError


@pytest.mark.parametrize(
    "url",
    [
        "http://a:8000",
        "https://a",
        "http://[::1]:8000",
        "http://a/team",
        "http://a/v12",
        "http://a/",
    ],
)
def test_an_address_is_kept_without_its_last_slash(url):
    assert server_address(url, "URL") == url.rstrip("/")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must look like http://host:8000: give http://localhost:8000"),
        ("10.0.0.1:8000/v1", "must look like http://host:8000: give http://10.0.0.1:8000"),
        ("gpu-box", ": give http://gpu-box"),
        ("http:/a:8000", ": give http://a:8000"),
        ("http//a:8000", ": give http://a:8000"),
        ("http:a:8000", ": give http://a:8000"),
        ("htp://a:8000", ": give http://a:8000"),
        (" http://a:8000", ": give http://a:8000"),
        ("http://a b:8000", "must look like http://host:8000"),
        ("", "must look like http://host:8000"),
        ("http://:8000", "must look like http://host:8000"),
        ("http://[::1", "must look like http://host:8000"),
        ("http://a:8000/v1", "is more than the address of a server; give http://a:8000"),
        ("http://a:8000/v1/chat/completions", "give http://a:8000"),
        ("http://a:8000/health", "give http://a:8000"),
        ("https://a/team/v1/", "give https://a/team"),
        ("http://a:8000?key=1", "give http://a:8000"),
        ("http://a:8000/v1?key=1", "give http://a:8000"),
        ("http://a:80000", "has a port that is no number from 1 to 65535; give http://a:8000"),
        ("http://a:0", "has a port that is no number from 1 to 65535"),
        ("http://a:x", "has a port that is no number from 1 to 65535"),
        ("a:80000", "must look like http://host:8000"),
    ],
)
def test_what_is_no_address_is_told_with_the_right_one(url, message):
    with pytest.raises(ConfigurationError) as caught:
        server_address(url, "--teacher_url")
    assert str(caught.value).startswith(f"--teacher_url {url!r} ")
    assert str(caught.value).endswith(message) or "from 1 to" in message
    assert message in str(caught.value)


def test_what_stands_around_an_address_is_in_the_corrected_value():
    with pytest.raises(ConfigurationError, match=r"give math=http://a:8000#v2$"):
        server_address("a:8000", "--teacher_url", before="math=", after="#v2")

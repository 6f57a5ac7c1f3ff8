"""The address of a server as people type it: checked, and corrected where it is plain how."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from shared.errors import ConfigurationError

# A scheme, also one that lacks its colon or a slash; a host before a port is none.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+|https?(?::/*|/+)", re.ASCII)
# Where a path of the server itself begins; what stands before it may be a gateway's prefix.
_ROUTE = re.compile(r"/(?:v1|health|ready|metrics|docs|openapi\.json)(?:/|$)")


def server_address(url: str, name: str, *, before: str = "", after: str = "") -> str:
    """Return a server's address without a slash at its end.

    A path is accepted as the prefix of a gateway, unless it is a path of the server itself.

    Args:
        url: as typed; it holds neither a user nor a model's name.
        name: of the flag or argument that it is given by.
        before, after: what stands around it in the value, such as ``math=`` and ``#MODEL``.

    Raises:
        ConfigurationError: it is no address; the message holds the right one where it is plain.
    """
    given = f"{name} {before + url + after!r}"
    if not _has_scheme_and_host(url):
        corrected = f"http://{_SCHEME.sub('', url.strip(), count=1)}"
        meant = _has_scheme_and_host(corrected) and _has_port(corrected)
        remedy = f": give {before}{_bare(corrected)}{after}" if meant else ""
        raise ConfigurationError(f"{given} must look like http://host:8000{remedy}")
    if not _has_port(url):
        host = urlsplit(url).netloc.rpartition(":")[0]
        raise ConfigurationError(
            f"{given} has a port that is no number from 1 to 65535; give "
            f"{before}http://{host}:8000{after}, or the port of the server"
        )
    if _bare(url) != url.rstrip("/"):
        raise ConfigurationError(
            f"{given} is more than the address of a server; give {before}{_bare(url)}{after}"
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Return whether an address is one of the machine itself."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _has_scheme_and_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    plain = url.isprintable() and not re.search(r"\s", url)
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def _has_port(url: str) -> bool:
    """Return whether the port of an address is one, or left out."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _bare(url: str) -> str:
    """Return an address without query, fragment and the server's own paths."""
    parts = urlsplit(url)
    path: str = _ROUTE.split(parts.path, maxsplit=1)[0].rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))

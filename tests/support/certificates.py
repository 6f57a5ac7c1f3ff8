"""The certificates of a private network, made by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Authority:
    """An authority of our own, and a certificate for 127.0.0.1 that it signed.

    Attributes:
        root: certificate of the authority, which a client has to trust.
        certificate, key: of the server.
    """

    root: Path
    certificate: Path
    key: Path


def make_authority(folder: Path) -> Authority:
    folder.mkdir()
    made = Authority(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    signer = folder / "ca.key"
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl(*new, "-subj", "/CN=test authority", "-keyout", signer, "-out", made.root)
    openssl(
        *new, "-subj", "/CN=teacher", "-addext", "subjectAltName=IP:127.0.0.1",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-CA", made.root, "-CAkey", signer, "-keyout", made.key, "-out", made.certificate,
    )  # fmt: skip
    return made


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

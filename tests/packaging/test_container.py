"""The container's entry point, run as root as in a container, on folders of this test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[2] / "docker" / "entrypoint.sh"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, and util-linux"
)


def started(folder, owner):
    """(user, group, whether it may gain privileges) of what the entry point starts."""
    for name in ("runs", "cache"):
        (folder / name).mkdir()
    os.chown(folder / "runs", owner, owner)
    script = ENTRY.read_text().replace("gkd:gkd", "10001:10001")  # the image's own user
    for name in ("runs", "cache"):
        script = script.replace(f"/{name}", str(folder / name))
    (folder / "entry").write_text(script)
    command = (
        "id -u; id -g; id -G; grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status"
    )
    shown = subprocess.run(
        ["sh", folder / "entry", "sh", "-c", command], capture_output=True, text=True, check=True
    )
    return shown.stdout.split()


@pytest.mark.parametrize(("owner", "user"), [(1234, "1234"), (0, "10001")])
def test_what_a_container_runs_is_never_root(tmp_path, owner, user):
    assert started(tmp_path, owner) == [
        user, user, user, "NoNewPrivs:", "1", "CapEff:", "0000000000000000",
    ]  # fmt: skip
    assert {(tmp_path / name).stat().st_uid for name in ("runs", "cache")} == {int(user)}

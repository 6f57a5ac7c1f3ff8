"""The environment in which threads without work sleep, so that processes can share cores."""

from __future__ import annotations

import os


def sleep_when_idle() -> None:
    """Let idle OpenMP threads sleep, also those of the processes that this one starts.

    By default they spin, and burn what a teacher beside the trainer, or anything else, could use:
    where cores are shared a small model's step takes ten times as long. OMP_WAIT_POLICY, if set, is
    kept. Call it before torch is imported, because the library reads the environment when it is
    loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

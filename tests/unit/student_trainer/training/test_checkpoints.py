"""A checkpoint appears once it is on the disk."""

import os
from pathlib import Path

from student_trainer.training.checkpoints import publish, unfinished


def test_all_of_it_is_synced_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    written = unfinished(tmp_path) / "checkpoint-1"
    (written / "deeper").mkdir(parents=True)
    for name in ("a", "deeper/b"):
        (written / name).write_text(name)
    events = []

    def synced(descriptor):
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", synced)
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda *names, **more: events.append("renamed") or rename(*names, **more)
    )
    publish(tmp_path, "checkpoint-1")
    named = events.index("renamed")
    before = {written, written / "a", written / "deeper", written / "deeper/b"}
    assert set(events[:named]) == set(map(str, before))
    assert events[named + 1 :] == [str(tmp_path)]

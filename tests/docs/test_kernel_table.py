"""The tables of docs/explanation/performance.md about GPUs are what compiler and paper say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_parts.roofline import H200, bare_matmuls, fused_loss, seconds
from student_trainer.losses.chunks import chunk_positions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "performance.md").read_text()


# The other cards' bounds are held by test_triton_compiles.py; each takes as long as this one.
def test_the_compilers_table_is_what_it_prints(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_parts.compiled", "--capability", "90"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 4
    assert [line for line in lines if line not in PAGE.splitlines()] == []


def test_the_times_on_paper_are_what_the_roofline_gives():
    table = PAGE.split("bare matrix products, ms | fused loss, ms | ratio |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows[1:]) == 5
    for vocab, width, layer, *said in rows[1:]:
        v, d = (int(re.sub(",", "", text)) for text in (vocab, width))
        trained = layer == "trained"
        chunk = chunk_positions(10**9, v, 141 * 10**9, trained=trained)
        ours = seconds(fused_loss(32_768, v, d, support=64, chunk=chunk, trained=trained), H200)
        bare = seconds(bare_matmuls(32_768, v, d, trained=trained), H200)
        assert said == [f"{1e3 * bare:.1f}", f"{1e3 * ours:.1f}", f"{ours / bare:.2f}"]

"""The kernel through Triton's compiler, without a GPU: the interpreter accepts more than it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from student_trainer.losses.triton import _FLOOR, _LOWEST, _kernel

POINTERS = {"ids_at": "*i64", "labels_at": "*i64", "logprobs_at": "*fp32", "tail_at": "*fp32",
            "weights_at": "*fp32", "label_weights_at": "*fp32", "out_at": "*fp32"}
FLAGS = [  # renormalize, weighted, labelled, label weighted, capped, gradient
    (False, False, False, False, False, True),
    (True, True, True, True, True, True),
    (True, False, True, False, True, False),
]
# A dtype changes loads and stores, which are the same under all flags.
cases = [*itertools.product((0, 1, 2), FLAGS, ("*bf16",)),
         *itertools.product((0, 1, 2), FLAGS[1:2], ("*fp16", "*fp32"))]
for mode, flags, dtype in cases:
    names = ("RENORMALIZE", "WEIGHTED", "LABELLED", "LABEL_WEIGHTED", "CAPPED", "GRADIENT")
    constants = {**dict(zip(names, flags, strict=True)), "MODE": mode, "LOWEST": _LOWEST,
                 "FLOOR": _FLOOR, "BLOCK_K": 64, "BLOCK_V": 4096}
    signature = {
        name: "constexpr" if name in constants
        else dtype if name == "logits_at"
        else POINTERS.get(name) or ("i32" if name in ("count", "vocab_size", "support") else "fp32")
        for name in _kernel.arg_names
    }
    source = ASTSource(_kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert built.asm["cubin"]
    print("compiled")
"""


def test_every_branch_compiles_for_a_gpu_in_every_dtype(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, cwd=Path(__file__).parents[4],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled"] * 15

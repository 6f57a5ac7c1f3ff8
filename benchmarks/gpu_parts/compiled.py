"""The loss kernel through Triton's compiler and NVIDIA's assembler, which need no GPU.

    python -m benchmarks.gpu_parts.compiled    # the table of docs/explanation/performance.md

Both come with the package triton. Its interpreter must be off (no TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Compute capability: a card, and the shared memory that one block of it may use, in bytes (CUDA
# programming guide, "technical specifications per compute capability").
CARDS = {80: ("A100", 163 << 10), 90: ("H100, H200", 227 << 10), 100: ("B200", 227 << 10)}
REGISTERS_OF_A_PROCESSOR = 65_536  # and at most 2,048 threads, on all of these
THREADS_OF_A_PROCESSOR = 2048
MODES = {"forward KL": 0, "reverse KL": 1, "between": 2}
FLAGS = ("RENORMALIZE", "WEIGHTED", "LABELLED", "LABEL_WEIGHTED", "CAPPED", "GRADIENT")
_POINTERS = {
    "ids_at": "*i64", "labels_at": "*i64", "logprobs_at": "*fp32", "tail_at": "*fp32",
    "weights_at": "*fp32", "label_weights_at": "*fp32", "out_at": "*fp32",
}  # fmt: skip
_INTEGERS = ("logits_stride", "gradient_stride", "count", "vocab_size", "width", "support")


@dataclass(frozen=True)
class Variant:
    """A version of the kernel that the compiler makes.

    Attributes:
        logits, gradient: Triton's names of their dtypes.
        mode: of `MODES`.
        flags: those of `FLAGS` that are on.
        support: tokens of the teacher, padded to a power of two.
        aligned: rows begin at multiples of 16 bytes, as those of `kernels.empty_rows` do.
    """

    logits: str = "fp32"
    gradient: str = "bf16"
    mode: int = 2
    flags: Sequence[str] = ("GRADIENT",)
    support: int = 64
    aligned: bool = True


@dataclass(frozen=True)
class Compiled:
    """The figures of a compiled kernel, from the assembler and from its code.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that found no register and lie in memory.
        shared: bytes of shared memory of a block.
        threads: of a block.
        barriers: in the loops over the vocabulary, at which all threads of a block wait.
        load_bytes: the widest load in a loop, in bytes.
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    barriers: int
    load_bytes: int

    @property
    def occupancy(self) -> float:
        """The share of a processor's threads that its registers have room for."""
        granted = -(-self.registers // 8) * 8 * self.threads
        blocks = min(REGISTERS_OF_A_PROCESSOR // granted, THREADS_OF_A_PROCESSOR // self.threads)
        return blocks * self.threads / THREADS_OF_A_PROCESSOR


def compile_kernel(capability: int, variant: Variant) -> Compiled:
    """Compile the loss kernel for a compute capability, such as 90 for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from student_trainer.losses import triton as loss

    names = loss._kernel.arg_names
    constants = {
        **{flag: flag in variant.flags for flag in FLAGS},
        "MODE": variant.mode, "LOWEST": loss._LOWEST, "FLOOR": loss._FLOOR,
        "BLOCK_K": max(16, triton.next_power_of_2(variant.support)),
        "ROWS": loss.BLOCK_V // loss.LANES, "LANES": loss.LANES,
    }  # fmt: skip
    pointers = {
        "logits_at": f"*{variant.logits}", "gradient_at": f"*{variant.gradient}", **_POINTERS
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants
        else pointers.get(name) or ("i32" if name in _INTEGERS else "fp32")
        for name in names
    }  # fmt: skip
    multiples = {*pointers}
    if variant.aligned:
        multiples |= {"logits_stride", "gradient_stride", "width"}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in multiples
    }
    built = triton.compile(
        ASTSource(loss._kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": loss.NUM_WARPS},
    )
    usage = _resource_usage(built.asm["cubin"])
    loops = [line for body in _loops(built.asm["ptx"]) for line in body]
    return Compiled(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=built.metadata.shared,
        threads=32 * loss.NUM_WARPS,
        barriers=sum("bar.sync" in line for line in loops),
        load_bytes=max(map(_load_bytes, loops), default=0),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what ``cuobjdump -res-usage`` says of a program: REG, STACK and LOCAL."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}


def _loops(ptx: str) -> Iterable[list[str]]:
    """Yield the lines between each label and a later jump back to it."""
    lines = ptx.splitlines()
    labels = {found[1]: n for n, line in enumerate(lines) if (found := re.match(r"(\$\w+):", line))}
    for number, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if jump and labels.get(jump[1], number) < number:
            yield lines[labels[jump[1]] : number]


def _load_bytes(line: str) -> int:
    found = re.search(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)", line)
    return int(found[1] or 1) * int(found[2]) // 8 if found else 0


# What the fused loss runs, what `sparse_generalized_jsd` runs on half precision, and the largest.
TABLE = {
    "fused, bfloat16": Variant(),
    "fused, float32": Variant(gradient="fp32"),
    "given logits, bfloat16": Variant(logits="bf16"),
    "all options, k = 256": Variant(
        flags=tuple(flag for flag in FLAGS if flag != "RENORMALIZE"), support=256
    ),
}


def table(capabilities: Iterable[int] = tuple(CARDS)) -> list[str]:
    """Return the table of all `TABLE`'s variants on some of `CARDS`, in Markdown."""
    lines = [
        "| kernel | card | registers | spilled bytes | shared memory, bytes | occupancy | "
        "barriers in loops | bytes a load |",
        "| --- |" + " --- |" * 7,
    ]
    for name, variant in TABLE.items():
        for capability in capabilities:
            card, _ = CARDS[capability]
            one = compile_kernel(capability, variant)
            lines.append(
                f"| {name} | {card} | {one.registers} | {one.spilled} | {one.shared} | "
                f"{one.occupancy:.0%} | {one.barriers} | {one.load_bytes} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capability", type=int, nargs="*", choices=CARDS, default=list(CARDS), help="default all"
    )
    sys.stdout.write("\n".join(table(parser.parse_args().capability)) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of the sparse divergence against the dense one and against bare matmuls.

Every method goes from the last hidden states [N, d] to the gradients of hidden states and output
layer [V, d]. Each runs in its own process, so that its peak memory is its own; the processes take
turns, one repeat each, so that a disturbance of the machine falls on all of them.

    python -m benchmarks.loss --quick
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F

from benchmarks.harness import Worker, argument_parser, print_report, set_threads
from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)

BETA = 0.5
MATMUL_ROWS = 256  # of the chunked limit
METHODS = {
    "dense": "dense, both sides over the vocabulary",
    "sparse": "sparse_generalized_jsd on full logits",
    "linear": "linear_sparse_jsd",
    "linear_frozen": "linear_sparse_jsd, frozen output layer",
    "matmuls": "three matmuls at once",
    "matmuls_chunked": f"three matmuls, {MATMUL_ROWS} rows at a time",
    "matmuls_frozen": "two matmuls at once",
    "matmuls_frozen_chunked": f"two matmuls, {MATMUL_ROWS} rows at a time",
}
QUICK_METHODS = [name for name in METHODS if "frozen" not in name]
LARGE_METHODS = ["linear", "matmuls_chunked"]  # what a small machine can do at many rows
DENSE_BYTES = 1 << 30  # of one [N, V]; the dense method holds about ten
DRAWN_ROWS = 4096
NOTES = (
    "time: median seconds, forward and backward, from hidden states to gradients; the teacher's "
    "logits (dense) or top-k (sparse) are inputs. Dense runs in every other repeat only. CPU "
    "seconds: of all threads; less disturbed by other processes.",
    "memory: growth of the process's peak resident memory over its value when all inputs were "
    "allocated and touched; what is counted is logits, temporaries, saved tensors, gradients.",
    "linear_extra_mib: of that, what the fused loss holds beside the two gradients: one chunk, "
    "whatever N is.",
    "At more rows than the first table's each method runs once. A dash: dense is left out where "
    f"one [N, V] is over {DENSE_BYTES >> 30} GiB, because it holds about ten of them.",
    "The bare matmuls are logits = h·Wᵀ, dh = g·W, dW = gᵀ·h (frozen: the first two) with g given "
    "and buffers reused; the faster of whole and chunked is the limit.",
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one measurement."""

    rows: int
    vocab_size: int
    hidden_size: int
    top_k: int
    threads: int
    dtype: str = "float32"  # of hidden states, output layer and their gradients


@dataclass(frozen=True)
class Measurement:
    """The medians of one method's steps, and the growth of its peak memory."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


# Each method below allocates and touches its inputs, and returns the step that is measured.


def dense(sizes: Sizes) -> Callable[[], None]:
    hidden, weight = _student(sizes, trained=True)
    teacher_logits = _teacher_logits(sizes)

    def step() -> None:
        hidden.grad = weight.grad = None
        student = F.log_softmax(hidden @ weight.T, dim=-1)  # [N, V]
        teacher = F.log_softmax(teacher_logits, dim=-1)  # [N, V]
        mixture = torch.logsumexp(
            torch.stack([student + math.log1p(-BETA), teacher + math.log(BETA)]), dim=0
        )
        to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
        to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
        divergence = BETA * to_teacher + (1.0 - BETA) * to_student  # [N, V]
        (divergence.sum() / sizes.rows).backward()

    return step


def sparse(sizes: Sizes) -> Callable[[], None]:
    hidden, weight = _student(sizes, trained=True)
    teacher = _sparse_teacher(sizes)

    def step() -> None:
        hidden.grad = weight.grad = None
        divergence = sparse_generalized_jsd(hidden @ weight.T, teacher, Divergence(BETA)).loss
        (divergence.sum() / sizes.rows).backward()

    return step


def linear(sizes: Sizes, *, trained: bool = True) -> Callable[[], None]:
    hidden, weight = _student(sizes, trained=trained)
    teacher = _sparse_teacher(sizes)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss = linear_sparse_jsd(
            hidden, weight, teacher, Divergence(BETA), normalizer=sizes.rows
        ).loss
        loss.backward()

    return step


def matmuls(sizes: Sizes, *, rows: int, trained: bool = True) -> Callable[[], None]:
    hidden, weight = (tensor.detach() for tensor in _student(sizes, trained=trained))
    rows = min(rows, sizes.rows)
    dtype = getattr(torch, sizes.dtype)
    gradient = torch.randn(rows, sizes.vocab_size).to(dtype)
    return bare_products(hidden, weight, gradient, trained=trained)


def bare_products(
    hidden: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, *, trained: bool
) -> Callable[[], None]:
    """Return a function that computes logits = h·Wᵀ, dh = g·W and, if ``trained``, dW = gᵀ·h.

    Args:
        hidden: [N, d].
        weight: [V, d].
        gradient: [chunk, V], which stands for that of every chunk of positions.
    """
    rows = len(gradient)
    logits = torch.zeros_like(gradient)
    grad_hidden = torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight)

    def step() -> None:
        for first in range(0, len(hidden), rows):
            chunk = slice(first, min(first + rows, len(hidden)))
            count = chunk.stop - first
            torch.mm(hidden[chunk], weight.T, out=logits[:count])
            torch.mm(gradient[:count], weight, out=grad_hidden[chunk])
            if trained and first == 0:
                torch.mm(gradient[:count].T, hidden[chunk], out=grad_weight)
            elif trained:
                grad_weight.addmm_(gradient[:count].T, hidden[chunk])

    return step


def _student(sizes: Sizes, *, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, sizes.dtype)
    hidden = torch.randn(sizes.rows, sizes.hidden_size).to(dtype).requires_grad_()
    # Few rows over and over: to draw all of them in every process takes longer than the steps.
    drawn = torch.randn(DRAWN_ROWS, sizes.hidden_size).mul_(sizes.hidden_size**-0.5)
    weight = torch.empty(sizes.vocab_size, sizes.hidden_size, dtype=dtype)
    for part in weight.split(DRAWN_ROWS):
        part.copy_(drawn[: len(part)])
    return hidden, weight.requires_grad_(trained)


def _teacher_logits(sizes: Sizes) -> torch.Tensor:
    logits = torch.empty(sizes.rows, sizes.vocab_size)
    drawn = torch.randn(sizes.vocab_size).mul_(3.0)
    for row in logits:
        row.copy_(drawn.roll(int(torch.randint(sizes.vocab_size, ()))))
    return logits


def _sparse_teacher(sizes: Sizes) -> SparseDistribution:
    """Make distinct ids all over the vocabulary, with nine tenths of the mass."""
    stride = sizes.vocab_size // sizes.top_k
    first = torch.randint(sizes.vocab_size, (sizes.rows, 1))
    ids = (first + stride * torch.arange(sizes.top_k)) % sizes.vocab_size  # [N, K]
    logprobs = F.log_softmax(torch.randn(sizes.rows, sizes.top_k).mul_(3.0), dim=-1)
    return SparseDistribution(
        ids, logprobs + math.log(0.9), torch.full((sizes.rows,), math.log(0.1))
    )


def _build(method: str, sizes: Sizes) -> Callable[[], None]:
    if method == "dense":
        return dense(sizes)
    if method == "sparse":
        return sparse(sizes)
    trained = "frozen" not in method
    if method.startswith("linear"):
        return linear(sizes, trained=trained)
    return matmuls(sizes, rows=MATMUL_ROWS if "chunked" in method else sizes.rows, trained=trained)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work(parent: Connection, method: str, sizes: Sizes) -> None:
    """Run a step for each message, in a child; answer (seconds, CPU seconds, peak bytes).

    The warm-up is a small step of the same method: it starts threads and libraries, and is too
    small to raise the peak above the inputs.
    """
    set_threads(sizes.threads)
    torch.manual_seed(0)
    _build(method, replace(sizes, rows=16, vocab_size=16 * sizes.top_k))()
    step = _build(method, sizes)
    before = _peak_bytes()
    parent.send("ready")
    while parent.recv():
        started = time.perf_counter(), time.process_time()
        step()
        seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        parent.send((seconds, cpu_seconds, _peak_bytes() - before))


def measure(sizes: Sizes, methods: list[str], repeats: int) -> dict[str, Measurement]:
    """Take ``repeats`` rounds of one step of each method, and the median of the rounds.

    The dense method takes part in every other round only, because it takes the longest.
    """
    started = time.perf_counter()
    steps: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(work, name, sizes)) for name in methods}
        for worker in workers.values():
            worker.receive()  # "ready"
        for turn in range(repeats):
            for name, worker in workers.items():
                if name != "dense" or turn % 2 == 0:
                    steps[name].append(worker.ask("step"))
    took = time.perf_counter() - started
    print(f"V={sizes.vocab_size:,} N={sizes.rows:,}: {took:.0f} s", file=sys.stderr, flush=True)
    return {
        name: Measurement(
            statistics.median(seconds for seconds, _, _ in taken),
            statistics.median(cpu_seconds for _, cpu_seconds, _ in taken),
            taken[-1][2],
        )
        for name, taken in steps.items()
    }


def figures(measured: dict[str, Measurement], head: str = "") -> dict[str, float]:
    """Compare the fused loss with the dense one and the limit; ``head`` is "_frozen" or ""."""
    dense, linear = measured["dense"], measured[f"linear{head}"]
    bare = [measured[f"matmuls{head}"], measured[f"matmuls{head}_chunked"]]
    limit = min(one.seconds for one in bare)
    cpu_limit = min(one.cpu_seconds for one in bare)
    prefix = head.removeprefix("_") + "_" if head else ""
    return {
        f"{prefix}speedup_vs_dense": round(dense.seconds / linear.seconds, 3),
        f"{prefix}time_over_matmuls": round(linear.seconds / limit, 3),
        f"{prefix}cpu_time_over_matmuls": round(linear.cpu_seconds / cpu_limit, 3),
        f"{prefix}memory_over_dense": round(linear.peak_bytes / dense.peak_bytes, 4),
        f"{prefix}linear_seconds": round(linear.seconds, 3),
        f"{prefix}matmuls_seconds": round(limit, 3),
    }


def extra_bytes(one: Measurement, sizes: Sizes) -> int:
    """Return the peak memory beyond the gradients of hidden states and output layer."""
    size = getattr(torch, sizes.dtype).itemsize
    gradients = size * sizes.hidden_size * (sizes.rows + sizes.vocab_size)
    return max(0, one.peak_bytes - gradients)


def large_figures(measured: dict[str, Measurement], sizes: Sizes) -> dict[str, float]:
    """Return time over bare matmuls and memory at many rows, named by vocabulary and rows."""
    linear, limit = measured["linear"], measured["matmuls_chunked"]
    prefix = f"v{sizes.vocab_size}_n{sizes.rows}"
    return {
        f"{prefix}_time_over_matmuls": round(linear.seconds / limit.seconds, 3),
        f"{prefix}_cpu_time_over_matmuls": round(linear.cpu_seconds / limit.cpu_seconds, 3),
        f"{prefix}_linear_extra_mib": round(extra_bytes(linear, sizes) / 2**20),
    }


def report(sizes: Sizes, measured: dict[str, Measurement]) -> list[list[str | float]]:
    """Return the table's rows of one size; a dash where the dense method was left out."""
    dense = measured.get("dense")
    return [
        [
            f"V={sizes.vocab_size:,} N={sizes.rows:,}: {METHODS[name]}",
            one.seconds,
            one.cpu_seconds,
            round(one.peak_bytes / 2**20),
            one.seconds / dense.seconds if dense else "–",
            one.peak_bytes / dense.peak_bytes if dense else "–",
        ]
        for name, one in measured.items()
    ]


def large(sizes: Sizes) -> dict[str, Measurement]:
    """Measure one step each of what fits at many rows."""
    fits = 4 * sizes.rows * sizes.vocab_size <= DENSE_BYTES
    return measure(sizes, ["dense", *LARGE_METHODS] if fits else LARGE_METHODS, 1)


def main() -> None:
    parser = argument_parser(
        __doc__,
        quick="half the rows, 2 repeats instead of 3, one vocabulary, no frozen output layer",
        threads=2,
    )
    parser.add_argument("--rows", type=int, help="default 1024, with --quick 512")
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument(
        "--more_vocab_sizes",
        type=int,
        nargs="*",
        default=[32_000, 256_000],
        help="measured too, at half the rows; not with --quick",
    )
    parser.add_argument(
        "--more_rows",
        type=int,
        nargs="*",
        default=[4096, 16384],
        help="measured too, once, at every vocabulary size; not with --quick",
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.rows is None:
        arguments.rows = 512 if arguments.quick else 1024
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
    repeats = 2 if arguments.quick else 3
    measured = measure(sizes, QUICK_METHODS if arguments.quick else list(METHODS), repeats)
    table = report(sizes, measured)
    numbers = figures(measured)
    if not arguments.quick:
        numbers |= figures(measured, "_frozen")
        for vocab_size in arguments.more_vocab_sizes:
            other = replace(sizes, rows=sizes.rows // 2, vocab_size=vocab_size)
            more = measure(other, list(METHODS), repeats)
            table += report(other, more)
            for head in ("", "_frozen"):
                found = figures(more, head)
                numbers |= {f"v{vocab_size}_{name}": value for name, value in found.items()}
        for vocab_size in (sizes.vocab_size, *arguments.more_vocab_sizes):
            for rows in arguments.more_rows:
                other = replace(sizes, vocab_size=vocab_size, rows=rows)
                once = large(other)
                table += report(other, once)
                numbers |= large_figures(once, other)
    dense = measured["dense"]
    print_report(
        f"Loss, forward and backward: N={sizes.rows:,}, d={sizes.hidden_size}, "
        f"k={sizes.top_k}, {sizes.dtype}, {sizes.threads} threads, median of {repeats}",
        ["method", "seconds", "CPU seconds", "memory MiB", "time / dense", "memory / dense"],
        table,
        {
            "benchmark": "loss",
            **numbers,
            "linear_extra_mib": round(extra_bytes(measured["linear"], sizes) / 2**20),
            "sparse_speedup_vs_dense": round(dense.seconds / measured["sparse"].seconds, 3),
            "dense_seconds": round(dense.seconds, 3),
            **vars(sizes),
            "repeats": repeats,
        },
        notes=NOTES,
    )


if __name__ == "__main__":
    main()

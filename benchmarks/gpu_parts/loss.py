"""The loss by Triton, by PyTorch, dense and by Liger, against the bare matrix products.

Every method goes from hidden states [N, d] to the gradients of states and output layer [V, d], in
bfloat16. Liger and the dense loss take the teacher's own states and output layer, or its logits;
ours take its 64 most probable tokens, as a server sends them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu_parts.measure import Row, Rows, median_seconds, milliseconds, peak_mib, ratio
from benchmarks.gpu_parts.roofline import bare_matmuls, card_named, divergence, fused_loss, seconds
from benchmarks.loss import bare_products
from student_trainer.losses import (
    Divergence,
    Kernel,
    SparseDistribution,
    closed_form,
    generalized_jsd,
    linear_sparse_jsd,
)
from student_trainer.losses.chunks import card_bytes, chunk_positions
from student_trainer.losses.kernels import empty_rows

TOP_K = 64
EXACT_POSITIONS = 256  # of the comparison with float64
MATMUL_ROWS = 8192  # of the bare products at once, whose logits would else fill a card
AIM_OVER_MATMULS = 1.3
METHODS = ("ours, Triton", "ours, PyTorch", "dense", "Liger")
OF_TRITON = ("ours, Triton", "Liger")


@dataclass(frozen=True)
class Problem:
    """The inputs of one measurement, all on the device.

    Attributes:
        hidden, weight: [N, d], [V, d], the student's, of one dtype.
        teacher_hidden: [N, d], the teacher's; its output layer is ``weight`` without gradient.
        sparse: its most probable tokens.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    sparse: SparseDistribution

    def part(self, count: int) -> Problem:
        return Problem(
            self.hidden[:count], self.weight, self.teacher_hidden[:count], self.sparse[:count]
        )

    def double(self) -> Problem:
        return Problem(
            self.hidden.double(), self.weight.double(), self.teacher_hidden.double(), self.sparse
        )


def measure(
    device: str, *, vocab_size: int, width: int, positions: list[int], triton: bool = True
) -> Rows:
    """Yield a row for each number of positions, head and method.

    Args:
        triton: measure what Triton compiles too: our kernel and Liger's.
    """
    whole = _problem(device, vocab_size, width, max(positions))
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    card = card_named(name)
    methods = [one for one in METHODS if triton or one not in OF_TRITON]
    errors = {one: _error(one, whole) for one in methods}
    for count in positions:
        problem = whole.part(count)
        for trained in (True, False):
            problem.weight.requires_grad_(trained)
            bare = median_seconds(_matmuls(problem, trained=trained), device)
            paper = seconds(bare_matmuls(count, vocab_size, width, trained=trained), card)
            case = f"N={count:,} V={vocab_size:,} d={width:,} " + ("" if trained else "frozen")
            yield {"case": case, "method": "bare matmuls", "ms": milliseconds(bare),
                   "on paper, ms": milliseconds(paper)}  # fmt: skip
            for method in methods:
                row: Row = {"case": case, "method": method}
                yield (
                    row
                    | _figures(method, problem, device, bare, trained=trained)
                    | {
                        "gradient error": errors[method],
                        "on paper, ms": _on_paper(method, problem, trained=trained, card_name=name),
                    }
                )


def kernel(device: str, *, vocab_size: int, positions: int) -> Rows:
    """Yield the time of the loss kernel alone, by dtype and support, beside that on paper."""
    from student_trainer.losses import triton

    card = card_named(torch.cuda.get_device_name() if device == "cuda" else "")
    for dtype, top_k in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 512)):
        logits = empty_rows(
            triton, torch.empty(0, device=device), (positions, vocab_size), torch.float32
        )
        logits.normal_()
        stride = max(1, vocab_size // top_k)
        ids = torch.arange(top_k, device=device) * stride
        teacher = SparseDistribution(
            ids.repeat(positions, 1),
            torch.full((positions, top_k), 0.9 / top_k, device=device).log(),
            torch.full((positions,), 0.1, device=device).log(),
        )
        # Over its own gradient the logits change, which costs the kernel neither more nor less.
        out = empty_rows(triton, logits, (positions, vocab_size), dtype)
        step = partial(
            triton.divergence_and_gradient,
            logits, teacher, Divergence(), with_gradient=True,
            out=None if dtype == torch.float32 else out,
        )  # fmt: skip
        small = logits[:4].clone()
        expected, found = small.double(), torch.empty_like(small)
        closed_form.divergence_and_gradient(expected, teacher[:4], Divergence(), with_gradient=True)
        triton.divergence_and_gradient(
            small, teacher[:4], Divergence(), with_gradient=True, out=found
        )
        taken = median_seconds(step, device)
        work = divergence(positions, vocab_size, top_k, gradient=dtype.itemsize)
        yield {
            "case": f"N={positions:,} V={vocab_size:,} k={top_k} gradient {dtype}".replace(
                "torch.", ""
            ),
            "ms": milliseconds(taken),
            "on paper, ms": milliseconds(work.seconds(card)),
            "of the bandwidth": ratio(work.moved / taken, card.bandwidth),
            "gradient error": _distance(found, expected),
        }
        del logits, out


def _problem(device: str, vocab_size: int, width: int, count: int) -> Problem:
    """Return random inputs, whose logits deviate by 3, and a teacher near the student."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=device)
    weight = (drawn(vocab_size, width) * (3 * width**-0.5)).bfloat16()
    hidden = drawn(count, width).bfloat16()
    teacher = (0.9 * hidden.float() + 0.4 * drawn(count, width)).bfloat16()
    parts = []
    for some in teacher.split(1024):
        logprobs = (some @ weight.T).float().log_softmax(dim=-1)
        values, ids = logprobs.topk(min(TOP_K, vocab_size - 1), dim=-1)
        tail = logprobs.scatter_(1, ids, -torch.inf).logsumexp(dim=-1)
        parts.append((ids, values, tail))
    sparse = SparseDistribution(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return Problem(hidden.requires_grad_(), weight, teacher, sparse)


def _step(method: str, problem: Problem) -> Callable[[], torch.Tensor]:
    """Return the function that computes a method's loss, the mean over positions.

    Raises:
        ImportError: Liger is not installed.
    """
    hidden, weight = problem.hidden, problem.weight
    count = len(hidden)
    if method == "Liger":
        from liger_kernel.transformers import LigerFusedLinearJSD

        liger = LigerFusedLinearJSD(jsd_beta=0.5)
        theirs = weight.detach()
        return lambda: liger(hidden, weight, problem.teacher_hidden, theirs, None)
    if method == "dense":
        return lambda: (
            generalized_jsd(
                hidden @ weight.T, problem.teacher_hidden @ weight.detach().T, Divergence()
            ).sum()
            / count
        )
    kernel: Kernel = "triton" if "Triton" in method else "torch"
    return lambda: (
        linear_sparse_jsd(
            hidden, weight, problem.sparse, Divergence(), normalizer=count, kernel=kernel
        ).loss
    )


def _figures(method: str, problem: Problem, device: str, bare: float, *, trained: bool) -> Row:
    try:
        loss = _step(method, problem)

        def step() -> None:
            problem.hidden.grad = problem.weight.grad = None
            loss().backward()

        taken = median_seconds(step, device)
        problem.hidden.grad = problem.weight.grad = None
        peak = peak_mib(step, device)
    except ImportError:
        return {"ms": "not installed"}
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return {"ms": "out of memory"}
    finally:
        problem.hidden.grad = problem.weight.grad = None
    row: Row = {"ms": milliseconds(taken), "peak MiB": peak, "× matmuls": ratio(taken, bare)}
    if method == "ours, Triton":
        row["aim"] = f"≤ {AIM_OVER_MATMULS}"
    return row


def _error(method: str, whole: Problem) -> float | None:
    """Return the relative error of both gradients against the same loss in float64."""
    some = whole.part(EXACT_POSITIONS)
    exact = some.double()
    gradients = []
    for problem in (some, exact):
        name = method if problem is some else "dense" if method == "Liger" else method
        name = "ours, PyTorch" if problem is exact and "ours" in name else name
        inputs = [problem.hidden.detach().requires_grad_(), problem.weight.detach()]
        inputs[1].requires_grad_()
        one = Problem(inputs[0], inputs[1], problem.teacher_hidden, problem.sparse)
        try:
            gradients.append(torch.autograd.grad(_step(name, one)(), inputs))
        except ImportError:
            return None
    return max(_distance(*pair) for pair in zip(*gradients, strict=True))


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(f"{float((found.double() - exact).norm() / exact.norm()):.2g}")


def _on_paper(method: str, problem: Problem, *, trained: bool, card_name: str) -> float | None:
    if "ours" not in method:
        return None
    count, width = problem.hidden.shape
    vocab_size = len(problem.weight)
    card = card_bytes(problem.hidden.device)
    chunk = chunk_positions(count, vocab_size, card, trained=trained)
    works = fused_loss(count, vocab_size, width, support=TOP_K, chunk=chunk, trained=trained)
    return milliseconds(seconds(works, card_named(card_name)))


def _matmuls(problem: Problem, *, trained: bool) -> Callable[[], None]:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    rows = min(MATMUL_ROWS, len(hidden))
    gradient = torch.randn(rows, 1, device=hidden.device, dtype=hidden.dtype).repeat(1, len(weight))
    return bare_products(hidden, weight, gradient, trained=trained)

"""The check that weights which are loaded are those that were saved.

transformers' Trainer loads a checkpoint by the names in its files, and where the model has other
names it goes on with a warning. Weights that `save_pretrained` splits or renames, such as experts
that the model keeps in one tensor, then stay what they were. So a model that is not sharded is read
again as `from_pretrained` reads it, and any model is compared with sums that the checkpoint keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from shared.errors import CheckpointError

FILE = "weights.json"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and FSDP
_EXACT = 1e-10  # float64 sums in any order, relative to the sum of absolute values
_ROUNDED = 1e-2  # the weights were rounded to another dtype
_AT_ONCE = 1 << 22  # elements that are copied to float64 together


@dataclass(frozen=True)
class WeightSums:
    """The sums over one weight, by which it is told from another.

    Attributes:
        dtype: of the weight, such as ``torch.bfloat16``.
        total: sum of its elements, added in float64.
        size: sum of their absolute values.
        ordered: sum of elements times a factor of their place in the whole weight, which tells it
            from a permutation of it; None from an earlier version, and where a shard's place is
            not known.
    """

    dtype: str
    total: float
    size: float
    ordered: float | None = None

    def is_of_same(self, other: WeightSums) -> bool:
        """Return whether both can be sums over one weight."""
        relative = _EXACT if self.dtype == other.dtype else _ROUNDED
        pairs = [(self.total, other.total), (self.size, other.size)]
        if self.ordered is not None and other.ordered is not None:
            pairs.append((self.ordered, other.ordered))
        return all(
            abs(a - b) <= relative * self.size or (math.isnan(a) and math.isnan(b))
            for a, b in pairs
        )


def sum_weights(model: torch.nn.Module, *, trainable: bool = False) -> dict[str, WeightSums]:
    """Return the sums over each floating-point weight; on all ranks, where they share a model.

    Args:
        trainable: leave out weights that are not trained.
    """
    found = {}
    for name, weight in _named_weights(model):
        if trainable and not weight.requires_grad:
            continue
        both = [
            weight.detach().sum(dtype=torch.float64),
            torch.linalg.vector_norm(weight.detach(), 1, dtype=torch.float64),
        ]
        total, size = (one.full_tensor() if isinstance(one, DTensor) else one for one in both)
        ordered = _ordered_sum(weight.detach())
        found[name] = WeightSums(str(weight.dtype), float(total), float(size), ordered)
    return found


def _ordered_sum(weight: torch.Tensor) -> float | None:
    """Return the sum of a weight's elements, each times the `_factors` of its indices.

    Args:
        weight: whole or sharded; its ranks call this together.

    Returns: None for a placement whose offsets are not known.
    """
    factors = [_factors(d, n, weight.device) for d, n in enumerate(weight.shape)]
    if not isinstance(weight, DTensor):
        return float(_weighted_sum(weight, factors))
    placements = weight.placements
    if any(type(one) not in (Shard, Replicate) for one in placements):
        return None
    # The factors of a dimension are split as the weight is along it, so they need no offsets.
    local = [
        distribute_tensor(
            of_dim,
            weight.device_mesh,
            [Shard(0) if one.is_shard(d) else Replicate() for one in placements],
            src_data_rank=None,
        ).to_local()
        for d, of_dim in enumerate(factors)
    ]
    parts: list[Placement] = [Partial() if one.is_shard() else Replicate() for one in placements]
    own = _weighted_sum(weight.to_local(), local)
    return float(DTensor.from_local(own, weight.device_mesh, parts).full_tensor())


def _factors(dimension: int, length: int, device: torch.device) -> torch.Tensor:
    """Return a factor [length] float64 from 0.5 to 1.5 for each index along a dimension.

    They are unlike for neighbours, and in each dimension, so that a transposed weight has another
    sum. Integers make them the same on every device.
    """
    index = torch.arange(length, device=device) + 1_000_003 * dimension
    return 0.5 + ((index * 2_654_435_761) & 0xFFFFFFFF).double() / 2**32


def _weighted_sum(weight: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the float64 sum of a tensor's elements, times the factors along each dimension."""
    if not weight.numel():
        return torch.zeros((), dtype=torch.float64, device=weight.device)
    if not factors:
        return weight.double()
    *leading, last = factors
    rows = weight.reshape(-1, len(last))  # [R, C]
    step = max(1, _AT_ONCE // len(last))
    sums = torch.cat([some.double() @ last for some in rows.split(step)])  # [R]
    for of_dim in reversed(leading):
        sums = sums.reshape(-1, len(of_dim)) @ of_dim
    return sums.reshape(())


def _named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if weight.is_floating_point():
            yield name, weight


def keep_sums(sums: Mapping[str, WeightSums], folder: Path) -> None:
    """Write the sums into a checkpoint."""
    lines = {name: [s.dtype, s.total, s.size, s.ordered] for name, s in sums.items()}
    (folder / FILE).write_text(json.dumps(lines, indent=0) + "\n")


def check_sums(model: torch.nn.Module, checkpoint: Path) -> None:
    """Check that a model has the weights of a checkpoint; one without sums is not compared.

    Raises:
        CheckpointError: names the weights that differ.
    """
    loaded = sum_weights(model)  # before the file is read: all ranks add, whatever files they see
    try:
        lines = json.loads((checkpoint / FILE).read_text())
        saved = {name: WeightSums(*line) for name, line in lines.items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / FILE} cannot be read: {error}; give another checkpoint"
        ) from error
    wrong = {
        name for name in saved.keys() & loaded.keys() if not saved[name].is_of_same(loaded[name])
    }
    trained = {name for name, weight in _named_weights(model) if weight.requires_grad}
    wrong |= (saved.keys() - loaded.keys()) | (trained - saved.keys())
    _refuse(checkpoint, "are not what was saved", wrong)


def load_whole(model: Any, checkpoint: Path) -> None:
    """Load the weights of a model that is not sharded, as its class reads them from a checkpoint.

    Raises:
        CheckpointError: names the weights that the checkpoint lacks, or has too many or in another
            shape.
    """
    try:
        read, report = type(model).from_pretrained(
            checkpoint, dtype=model.dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its weights do not load as {type(model).__name__}: "
            f"{' '.join(str(error).split())}; give another checkpoint"
        ) from error
    _refuse(checkpoint, "are not in it", report["missing_keys"])
    _refuse(checkpoint, "are not the model's", report["unexpected_keys"])
    model.load_state_dict(read.state_dict())


def _refuse(checkpoint: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise CheckpointError(
            f"{checkpoint}: {len(names)} weights {what}, {names[0]} among them, so it is not gone "
            "on with: it is damaged, or written by another version of transformers. Give another "
            "checkpoint by --resume_from_checkpoint FOLDER"
        )

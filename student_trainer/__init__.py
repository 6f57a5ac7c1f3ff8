"""The student trainer: prompts come in, gradients go out; the teacher is across HTTP.

The public names for notebooks and training loops of one's own; docs/python-api.md shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.errors import SparseGKDError
    from student_trainer.api import DistillationResult, distill
    from student_trainer.client import TeacherClient
    from student_trainer.losses import (
        SparseDistribution,
        generalized_jsd,
        linear_sparse_jsd,
        sparse_generalized_jsd,
    )
    from student_trainer.support import ScoredSample, sparse_distribution

__all__ = [
    "DistillationResult",
    "ScoredSample",
    "SparseDistribution",
    "SparseGKDError",
    "TeacherClient",
    "distill",
    "generalized_jsd",
    "linear_sparse_jsd",
    "sparse_distribution",
    "sparse_generalized_jsd",
]

_MODULES = {
    "DistillationResult": "student_trainer.api",
    "ScoredSample": "student_trainer.support",
    "SparseGKDError": "shared.errors",
    "TeacherClient": "student_trainer.client",
    "distill": "student_trainer.api",
    "sparse_distribution": "student_trainer.support",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the commands' --help does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "student_trainer.losses")), name)


def __dir__() -> list[str]:
    return __all__

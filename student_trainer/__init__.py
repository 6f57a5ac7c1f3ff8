"""The student trainer: prompts come in, gradients go out; the teacher is across HTTP.

The public names for notebooks and training loops of one's own.

docs/how-to/python-api.md shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from student_trainer import moved

if TYPE_CHECKING:
    from shared.errors import SparseGKDError
    from student_trainer.api import DistillationResult, distill
    from student_trainer.client import Scored, TeacherClient, teacher_distribution
    from student_trainer.losses import (
        Divergence,
        LossOutput,
        SparseDistribution,
        generalized_jsd,
        linear_sparse_jsd,
        sparse_generalized_jsd,
    )

__all__ = [
    "DistillationResult",
    "Divergence",
    "LossOutput",
    "Scored",
    "SparseDistribution",
    "SparseGKDError",
    "TeacherClient",
    "distill",
    "generalized_jsd",
    "linear_sparse_jsd",
    "sparse_generalized_jsd",
    "teacher_distribution",
]

_MODULES = {
    "DistillationResult": "student_trainer.api",
    "Scored": "student_trainer.client",
    "SparseGKDError": "shared.errors",
    "TeacherClient": "student_trainer.client",
    "distill": "student_trainer.api",
    "teacher_distribution": "student_trainer.client",
}


moved.install()


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the commands' --help does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "student_trainer.losses")), name)


def __dir__() -> list[str]:
    return __all__

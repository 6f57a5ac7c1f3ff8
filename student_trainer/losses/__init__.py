"""The generalized Jensen-Shannon divergence: dense, against a sparse teacher, and fused.

All are pure functions of tensors and of one `Divergence`. `reference` is the dense formula of the
paper, `closed_form` the divergence over support and tail with its gradient, and `triton` the same
on a GPU. `sparse` applies them to logits, `fused` to hidden states without ever holding all logits.
"""

from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput, SparseStatistics, Tail
from student_trainer.losses.fused import linear_sparse_jsd
from student_trainer.losses.kernels import Kernel
from student_trainer.losses.reference import generalized_jsd
from student_trainer.losses.sparse import sparse_generalized_jsd

__all__ = [
    "Divergence",
    "HardLabels",
    "Kernel",
    "LossOutput",
    "SparseDistribution",
    "SparseStatistics",
    "Tail",
    "generalized_jsd",
    "linear_sparse_jsd",
    "sparse_generalized_jsd",
]

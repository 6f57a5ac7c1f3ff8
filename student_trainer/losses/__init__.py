"""The generalized Jensen-Shannon divergence: dense, against a sparse teacher, and fused.

Pure functions of tensors. One mathematics: `reference` is how the paper writes it, `sparse` its
closed form over support and tail, `fused` the same without ever holding the logits.
"""

from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.fused import linear_sparse_jsd
from student_trainer.losses.reference import generalized_jsd
from student_trainer.losses.sparse import SparseStatistics, Tail, sparse_generalized_jsd

__all__ = [
    "HardLabels",
    "SparseDistribution",
    "SparseStatistics",
    "Tail",
    "generalized_jsd",
    "linear_sparse_jsd",
    "sparse_generalized_jsd",
]

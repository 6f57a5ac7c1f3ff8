"""Clients of a served teacher: sparse-gkd's own server, a stock vLLM, and a cache before either."""

from student_trainer.teacher.base import Sampling, ScoreOptions, Teacher
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher

__all__ = ["Sampling", "ScoreOptions", "SparseGkdTeacher", "Teacher"]

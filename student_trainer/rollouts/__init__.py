"""Prompts -> completions, sampled by the student as it is now."""

from student_trainer.rollouts.base import Rollout, RolloutEngine, RolloutRequest
from student_trainer.rollouts.stops import StopDetector
from student_trainer.rollouts.transformers import TransformersRollouts
from student_trainer.rollouts.vllm import VllmEngine, VllmRollouts

__all__ = [
    "Rollout",
    "RolloutEngine",
    "RolloutRequest",
    "StopDetector",
    "TransformersRollouts",
    "VllmEngine",
    "VllmRollouts",
]

"""The generation of completions by the student with its present weights."""

from student_trainer.rollouts.base import Rollout, RolloutEngine, RolloutRequest, StartSearch
from student_trainer.rollouts.http import ServerOptions
from student_trainer.rollouts.server_rollouts import ServerRollouts
from student_trainer.rollouts.servers import RolloutServers
from student_trainer.rollouts.transformers import TransformersRollouts
from student_trainer.rollouts.vllm import VllmEngine, VllmRollouts

__all__ = [
    "Rollout",
    "RolloutEngine",
    "RolloutRequest",
    "RolloutServers",
    "ServerOptions",
    "ServerRollouts",
    "StartSearch",
    "TransformersRollouts",
    "VllmEngine",
    "VllmRollouts",
]

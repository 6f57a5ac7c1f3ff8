"""The generation of completions by the student with its present weights."""

from student_trainer.rollouts.base import (
    NO_FILTER,
    Rollout,
    RolloutEngine,
    RolloutRequest,
    StartSearch,
    TokenFilter,
)
from student_trainer.rollouts.http import ServerOptions
from student_trainer.rollouts.server_rollouts import ServerRollouts
from student_trainer.rollouts.servers import RolloutServers
from student_trainer.rollouts.transformers import TransformersRollouts
from student_trainer.rollouts.vllm import VllmEngine, VllmRollouts

__all__ = [
    "NO_FILTER",
    "Rollout",
    "RolloutEngine",
    "RolloutRequest",
    "RolloutServers",
    "ServerOptions",
    "ServerRollouts",
    "StartSearch",
    "TokenFilter",
    "TransformersRollouts",
    "VllmEngine",
    "VllmRollouts",
]

"""The flags of `vllm serve` in our files for rollout servers are vLLM's own."""

import shlex
from importlib import import_module

import pytest

from tests.packaging.test_compose import parsed
from tests.support.vllm import VLLM
from tests.unit.examples import test_rollout_adapters_on_kubernetes, test_rollouts_on_kubernetes

pytestmark = VLLM


def composed(**settings):
    return shlex.split(parsed(**settings)["services"]["rollouts"]["command"])


@pytest.mark.parametrize(
    ("argv", "rank"),
    [
        (composed(), None),
        (composed(ROLLOUT_FLAGS="--enable-lora --max-lora-rank 64"), 64),
        (test_rollouts_on_kubernetes.SERVER["args"], None),
        (test_rollout_adapters_on_kubernetes.PATCHED["args"], 16),
    ],
    ids=["compose", "compose-adapters", "kubernetes", "kubernetes-adapters"],
)
def test_vllm_reads_them(argv, rank):
    program, command, *flags = argv
    assert (program, command) == ("vllm", "serve")
    parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    read = import_module("vllm.entrypoints.launchers.cli_args").make_arg_parser(parser)
    found = read.parse_args(flags)
    assert bool(found.enable_lora) == (rank is not None)
    assert rank in (None, found.max_lora_rank)
    assert found.weight_transfer_config.backend == "nccl"

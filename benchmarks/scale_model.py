"""The time of a step on paper, when GPUs are split between teacher, rollouts and trainer.

    from benchmarks.scale_model import COSTS, WORKLOAD, best_split

All is arithmetic over a table of costs; nothing is measured here. Seconds, bytes and FLOPs
throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache

from benchmarks.gpu_parts.roofline import H200

HOUR = 3600.0


@dataclass(frozen=True)
class Workload:
    """The work of a step. The student is Qwen2.5-7B, the teacher deepseek-coder-33b.

    Attributes:
        student, teacher: parameters.
        cache_bytes: bytes of the student's KV cache for a token, in bfloat16.
        teacher_gpus: GPUs of a replica of the teacher.
        completions: completions of a step.
        prompt, mean, longest: tokens of a prompt, of a completion, and of the longest one.
        staleness: 0 or 1, as ``--rollout_staleness``.
    """

    student: float = 7.6e9
    teacher: float = 33e9
    cache_bytes: float = 2 * 28 * 4 * 128 * 2
    teacher_gpus: int = 2
    completions: int = 1024
    prompt: int = 512
    mean: int = 512
    longest: int = 1024
    staleness: int = 1

    @property
    def tokens(self) -> float:
        """Tokens of all prompts and completions of a step."""
        return float(self.completions * (self.prompt + self.mean))


@dataclass(frozen=True)
class Costs:
    """The costs of the parts of a step; shares are of a data sheet's peak.

    Attributes:
        bandwidth, flops, memory: of a GPU.
        link: bytes a second between two GPUs of different nodes.
        prefill_share, train_share: of ``flops``, for scoring and for training.
        decode_share: of ``bandwidth``, for reading weights and KV cache.
        micro_batch: most tokens of a micro-batch of a GPU.
        call: a call of a server's control routes.
        probe: a server's answer to a probe of its weights.
        checked: the trainer's own forward pass over a probe.
        together: whether servers are called and probed at once, and equal probes checked once.
        client_rollout: processor time of the trainer's process for a completion of a server.
        client_request, client_token: the same for a request of scores, and for a scored token.
        failure: hours between two failures of a GPU.
        restart: seconds until a trainer that has failed trains again.
        save: seconds between two checkpoints.
    """

    bandwidth: float = H200.bandwidth
    flops: float = H200.flops
    memory: float = 141e9
    link: float = 0.8 * 400e9 / 8
    prefill_share: float = 0.5
    train_share: float = 0.4
    decode_share: float = 0.6
    micro_batch: int = 16_384
    call: float = 0.003
    probe: float = 0.1
    checked: float = 0.05
    together: bool = True
    client_rollout: float = 0.0015
    client_request: float = 0.002
    client_token: float = 2e-6
    failure: float = 50_000.0
    restart: float = 600.0
    save: float = 1800.0


COSTS, WORKLOAD = Costs(), Workload()

# What each assumption of `Costs` rests on.
SOURCES = {
    "bandwidth": "H200's data sheet", "flops": "H200's data sheet, dense bfloat16",
    "memory": "H200's data sheet", "link": "a 400 Gb/s network card a GPU, at 80 %",
    "prefill_share": "assumed", "train_share": "assumed", "decode_share": "assumed",
    "micro_batch": "assumed", "call": "assumed: 3 ms on a local network",
    "probe": "assumed: 8 tokens of 7B and a call", "checked": "assumed: a sharded pass over 7B",
    "together": "as the client is", "client_rollout": "measured here",
    "client_request": "measured here", "client_token": "measured here",
    "failure": "Llama 3, arXiv 2407.21783: 419 in 54 days on 16,384 GPUs", "restart": "assumed",
    "save": "assumed",
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """GPUs of each kind; a rollout server has one."""

    teacher: int
    rollout: int
    trainer: int

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.teacher + self.rollout + self.trainer


@dataclass(frozen=True)
class Step:
    """The seconds of a step by part, each where nothing else hides it.

    Attributes:
        weights: gathering and sending them.
        control: calls around it, and probes.
        train: forward, backward, optimizer and their traffic.
        client: HTTP in the trainer's own process.
        rollouts, teacher: waiting for completions; and for scores, where they take longer.
        failures: work lost, spread over all steps.
    """

    weights: float
    control: float
    train: float
    client: float
    rollouts: float
    teacher: float
    failures: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def decoding(work: Workload, costs: Costs, servers: int) -> float:
    """Return the seconds in which so many servers write the step's completions.

    A server reads its weights and the caches of the live completions for each token; those that do
    not fit into its memory are written after the others.
    """
    each = math.ceil(work.completions / servers)
    weights = 2 * work.student
    whole = work.cache_bytes * (work.prompt + work.longest)
    at_once = max(1, int((0.9 * costs.memory - weights) / whole))
    waves = math.ceil(each / at_once)
    live = each / waves * work.mean / work.longest  # on average, as short ones end early
    cache = live * work.cache_bytes * (work.prompt + work.mean / 2)
    reading = (weights + cache) / (costs.decode_share * costs.bandwidth)
    products = live * 2 * work.student / (costs.prefill_share * costs.flops)
    prefill = each * work.prompt * 2 * work.student / (costs.prefill_share * costs.flops)
    return prefill + waves * work.longest * max(reading, products)


def scoring(work: Workload, costs: Costs, gpus: int) -> float:
    """Return the seconds in which teachers on so many GPUs score the step's completions."""
    return work.tokens * 2 * work.teacher / (costs.prefill_share * costs.flops * gpus)


def training(work: Workload, costs: Costs, gpus: int) -> float:
    """Return the seconds of forward and backward on so many GPUs that shard the student.

    Operations are 8 a parameter and token, as layers are computed again. Weights are gathered twice
    and gradients scattered once for each micro-batch, beside the products.
    """
    sequences = math.ceil(work.completions / gpus)
    tokens = sequences * (work.prompt + work.mean)
    products = tokens * 8 * work.student / (costs.train_share * costs.flops)
    moved = 3 * 2 * work.student * (gpus - 1) / gpus
    batches = math.ceil(tokens / costs.micro_batch)
    return max(products, batches * moved / costs.link)


def least_trainer(work: Workload, costs: Costs) -> int:
    """Return the fewest GPUs that hold the student, its gradients and AdamW's state (16 bytes)."""
    return math.ceil(16 * work.student / (0.8 * costs.memory))


def sending(work: Workload, costs: Costs, split: Split) -> float:
    """Return the seconds of gathering the weights from the ranks, and of sending them to all."""
    gathered = 2 * work.student * (split.trainer - 1) / split.trainer
    return (gathered + 2 * work.student) / costs.link


def controlling(costs: Costs, servers: int) -> float:
    """Return the seconds of looking at servers, of five calls to all, and of probing them."""
    if costs.together:
        return 8 * costs.call + costs.probe + costs.checked
    return servers * (3 * costs.call + costs.probe + costs.checked) + 5 * costs.call


def submitting(work: Workload, costs: Costs, processes: int) -> float:
    """Return the processor seconds of a trainer process, which submits its own completions."""
    one = costs.client_rollout + costs.client_request + work.mean * costs.client_token
    return math.ceil(work.completions / processes) * one


@cache
def step_of(work: Workload, costs: Costs, split: Split) -> Step:
    """Return the step of a split.

    Completions are scored while others are written. With staleness 1 both are hidden behind
    training, or hide it.
    """
    weights, control = sending(work, costs, split), controlling(costs, split.rollout)
    train = training(work, costs, split.trainer)
    client = submitting(work, costs, split.trainer)
    written = decoding(work, costs, split.rollout)
    scored = max(written, scoring(work, costs, split.teacher))
    hidden = train + client if work.staleness else 0.0
    rollouts = max(0.0, written - hidden)
    teacher = max(0.0, scored - hidden) - rollouts
    alive = weights + control + train + client + rollouts + teacher
    # A trainer goes back half a checkpoint; what a server has begun is done again by another.
    lost = split.trainer * (costs.restart + costs.save / 2)
    lost += (split.rollout + split.teacher) * alive
    failures = alive * lost / (costs.failure * HOUR)
    return Step(weights, control, train, client, rollouts, teacher, failures)


def ideal_gpu_seconds(work: Workload, costs: Costs) -> float:
    """Return the GPU-seconds of a step in which nothing is waited for, sent, or lost."""
    score = scoring(work, costs, 1)
    train = work.tokens * 8 * work.student / (costs.train_share * costs.flops)
    write = decoding(replace(work, completions=_FULL), costs, 1) / _FULL * work.completions
    return score + train + write


_FULL = 512  # completions that a server writes about as well as any number


def sizes(most: int) -> Iterator[int]:
    """Yield numbers of GPUs that are tried, about 9 % apart and the same for all budgets."""
    size = 1
    while size <= most:
        yield size
        size = max(size + 1, round(size * 1.09))


def best_split(work: Workload, costs: Costs, gpus: int) -> Split:
    """Return the split with the shortest step that has at most so many GPUs; some may be idle.

    Raises:
        ValueError: the models do not fit.
    """
    found: tuple[float, Split] | None = None
    least = least_trainer(work, costs)
    for trainer in (size for size in sizes(gpus) if size >= least):
        busy = training(work, costs, trainer) + submitting(work, costs, trainer)
        for rollout in sizes(gpus - trainer):
            teacher = _teacher(work, costs, rollout, busy, gpus - trainer - rollout)
            if teacher is None:
                continue
            split = Split(teacher, rollout, trainer)
            seconds = step_of(work, costs, split).seconds
            if found is None or seconds < found[0]:
                found = seconds, split
    if found is None:
        raise ValueError(f"{gpus} GPUs do not hold teacher, student and trainer; give more")
    return found[1]


def _teacher(work: Workload, costs: Costs, rollout: int, busy: float, room: int) -> int | None:
    """Return the fewest GPUs of a teacher that is not waited for, or as many as there is room."""
    target = decoding(work, costs, rollout)
    if work.staleness:
        target = max(target, busy)
    needed = math.ceil(scoring(work, costs, 1) / target / work.teacher_gpus) * work.teacher_gpus
    fits = room // work.teacher_gpus * work.teacher_gpus
    return min(needed, fits) or None


# What limits the scale: each is set free on its own, and the one that gains most is the limit.
def relieved(costs: Costs) -> dict[str, Costs]:
    """Return costs in which one thing is free, by its name."""
    return {
        "control calls and probes": replace(costs, call=0.0, probe=0.0, checked=0.0),
        "weights and gradients on the network": replace(costs, link=math.inf),
        "HTTP in the trainer's processes": replace(
            costs, client_rollout=0.0, client_request=0.0, client_token=0.0
        ),
        "time to write the longest completion": replace(costs, bandwidth=1e3 * costs.bandwidth),
        "failures": replace(costs, failure=math.inf),
    }


def gains(work: Workload, costs: Costs, gpus: int) -> dict[str, float]:
    """Return by what share of the best step a budget's step is shorter where one thing is free.

    The free bandwidth also speeds rollouts where a server is busy; so only what it gains over a
    server with a full batch is counted.
    """
    before = step_of(work, costs, best_split(work, costs, gpus)).seconds
    ideal = ideal_gpu_seconds(work, costs)
    found = {}
    for name, free in relieved(costs).items():
        after = step_of(work, free, best_split(work, free, gpus)).seconds
        saved = (ideal - ideal_gpu_seconds(work, free)) / gpus
        found[name] = max(0.0, (before - after - saved) / before)
    return found

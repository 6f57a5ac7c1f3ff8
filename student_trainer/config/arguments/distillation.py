"""The flags of completions and divergence, and what `sft` has in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from student_trainer.config.arguments.rollouts import RolloutFlags
from student_trainer.config.arguments.training import RunFlags, TrainingFlags
from student_trainer.config.flags import flag


@dataclass
class DivergenceFlags(RolloutFlags):
    """The completions to learn, and the divergence (GKD, arXiv 2306.13649)."""

    lmbda: float = flag(
        0.5,
        "Probability that a step is on-policy: 0 dataset or teacher completions, 1 student's.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    beta: float = flag(
        0.5,
        "Generalized JSD: 0 is forward KL(teacher‖student), 1 reverse KL(student‖teacher), between "
        "them a mixture. Discontinuous at both ends: near 0 and 1 the interior form tends to 0, so "
        "0.9 is about 12 times weaker than 1.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    temperature: float = flag(
        1.0,
        "Divides both logits in the divergence; no T² factor.",
        group="method and divergence",
        resume="same",
    )
    teacher_support: Literal["top_k", "sampled"] = flag(
        "top_k",
        "Which tokens the teacher's log-probs are of. top_k: its --top_k_logprobs most probable "
        "ones. sampled: so many draws from its whole distribution, new in each step: a gradient "
        "that is right in the mean at any number of them, but noisy; only for --beta 0.",
        group="method and divergence",
        resume="same",
    )
    tail: Literal["bucket", "renormalize"] = flag(
        "bucket",
        "What becomes of the probability off the support. bucket: one more outcome, so the value "
        "is never above the dense divergence. renormalize: dropped, and both sides rescaled over "
        "the support, as some systems do; biased, there to compare with them.",
        group="method and divergence",
        resume="same",
    )
    sft_weight: float = flag(
        0.0,
        "Share w of the hard labels: (1 − w)·divergence + w·cross-entropy on completions of the "
        "dataset or the teacher (not on the student's own). Holds the student to known good "
        "completions where the teacher is unsure or wrong.",
        group="method and divergence",
        resume="same",
    )
    request_student_top_m: int | None = flag(
        None,
        "Ask the teacher for the student's own M most probable tokens in each row too, and join "
        "them to the support. What the student likes and the teacher does not is where reverse KL "
        "and JSD are decided. Costs one forward pass without gradient, with weights as old as "
        "--rollout_staleness says; with --seq_kd the teacher scores its completions in a second "
        "call. Default: 16 for --beta 1, which is far from the dense gradient without, otherwise "
        "none.",
        group="method and divergence",
        resume="same",
    )
    seq_kd: bool = flag(
        False,
        "Off-policy completions come from the teacher (SeqKD), not from the dataset.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    seq_kd_temperature: float = flag(
        0.0,
        "Sampling temperature of the teacher; 0 is greedy.",
        group="rollouts and generation",
        resume="same",
        needs=("seq_kd", True),
    )
    teacher_prefetch_steps: int = flag(
        2,
        "Steps by which completions that do not depend on the student's weights are scored ahead, "
        "at least --rollout_staleness; their scores are held in memory meanwhile.",
        group="memory and speed",
    )

    @property
    def student_top_m(self) -> int:
        """The value of ``request_student_top_m``, or its default for this beta."""
        if self.request_student_top_m is None:
            return 16 if self.beta == 1.0 else 0
        return self.request_student_top_m


# SFT as a distillation: forward KL to the data's one-hot distribution, of the data's completions.
SFT = DivergenceFlags(lmbda=0.0, beta=0.0, teacher_prefetch_steps=0)


def divergence_flags_of(flags: RunFlags) -> DivergenceFlags:
    """Return the flags of completions and divergence; `SFT` where there is no teacher."""
    return flags if isinstance(flags, DivergenceFlags) else SFT


@dataclass
class DistillFlags(DivergenceFlags, TrainingFlags):
    """The flags of `distill`, besides those of the teacher."""

"""The method of a run: who writes a step's completions, and how they are scored and compared."""

from __future__ import annotations

from dataclasses import dataclass

from shared.sampling import uniforms
from student_trainer.losses import Divergence
from student_trainer.teacher.base import Sampling, ScoreOptions


@dataclass(frozen=True)
class DistillationConfig:
    """The settings of a distillation: who writes completions, and how they are scored and compared.

    The methods differ in who writes the completions that a step learns:

    ============== ===================== ============== =====================================
    method         settings              completions of scores
    ============== ===================== ============== =====================================
    SFT            no teacher            the dataset    none: the data are the targets
    Supervised KD  lmbda 0               the dataset    ahead, from the cache if there is one
    SeqKD          lmbda 0, seq_kd       the teacher    with the completion, kept likewise
    on-policy GKD  lmbda 1               the student    as they are written, never cached
    ============== ===================== ============== =====================================

    With lmbda between 0 and 1 each step tosses a coin. With ``sampled`` the support is ``top_k``
    draws from the teacher, not its top-k. The teacher scores at the temperature of the
    ``divergence``, which for SFT is forward KL.

    Source: GKD, arXiv 2306.13649, algorithm 1.
    """

    lmbda: float
    seq_kd: bool
    seq_kd_temperature: float
    divergence: Divergence
    top_k: int
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    sampled: bool = False

    @property
    def reads_dataset(self) -> bool:
        """The use of the dataset's own completions: True if some steps learn them."""
        return self.lmbda < 1 and not self.seq_kd

    def on_policy(self, step: int) -> bool:
        """Toss the coin of a step: whether the student writes its completions, on every rank."""
        return bool(uniforms("coin", self.seed, step, count=1)[0] < self.lmbda)

    def sample_seed(self, step: int) -> int | None:
        """Return the seed of a step's draws from the teacher; None if the support is not drawn."""
        return int(uniforms("draws", self.seed, step, count=1)[0] * 2**53) if self.sampled else None

    def scoring(self, step: int | None = None) -> ScoreOptions:
        """Return the options of scores; with a step also its draws, if the support is drawn."""
        seed = None if step is None else self.sample_seed(step)
        return ScoreOptions(self.top_k, self.divergence.temperature, seed)

    def sampling(self, temperature: float, *, scored: bool = True) -> Sampling:
        """Return the teacher's sampling settings; with ``scored`` it scores its completions too."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            seed=self.seed,
            stop_token_ids=self.stop_ids,
            top_k=self.top_k if scored else None,
            score_temperature=self.divergence.temperature,
        )

"""The flags of the teacher and of the completions that it or the student writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from student_trainer.config.arguments.data import json_object
from student_trainer.config.flags import flag


@dataclass
class GenerationArguments:
    """The limits of generated completions."""

    max_new_tokens: int = flag(
        128,
        "Longest completion that is generated, in tokens.",
        group="rollouts and generation",
        common=True,
        resume="same",
    )
    generation_batch_size: int | None = flag(
        None,
        "Prompts generated at once; default as many as a step has (`evaluate`: 32).",
        group="rollouts and generation",
    )


@dataclass
class TeacherArguments:
    """The served teacher."""

    teacher_url: list[str] | None = flag(
        None,
        "Address of a teacher server, such as http://host:8000; repeat for replicas: one that "
        "fails is left out until it is ready again. Several teachers: math=http://a code=http://b, "
        "each for the rows that name it; http://a#MODEL where a server has several models.",
        extends=True,
        group="teacher",
        common=True,
        private=True,
    )
    teacher_column: str = flag(
        "teacher",
        "Column that names a row's teacher, where --teacher_url gives names; rows without a name "
        "have the first teacher.",
        group="teacher",
        resume="same",
    )
    dataset_teacher: list[str] | None = flag(
        None,
        "The teacher of the rows of each --dataset_name, in order; a row's own --teacher_column "
        "comes first.",
        group="teacher",
        resume="same",
    )
    teacher_prompt_template: str | None = flag(
        None,
        "File of a Jinja template over a row's columns that makes the prompt which only the "
        "teacher sees, such as {{ question }} and a reference answer; in place of a column "
        "teacher_prompt (text) or teacher_messages.",
        group="teacher",
        resume="told",
    )
    teacher_chat_template_kwargs: str | None = flag(
        None,
        "As --chat_template_kwargs, for the prompt that only the teacher sees.",
        group="teacher",
        resume="same",
    )
    teacher_protocol: Literal["sparse-gkd", "vllm"] = flag(
        "sparse-gkd",
        "vllm: the addresses are of a stock `vllm serve`; slower, at --temperature 1 only, and "
        "weights and vocabulary are not proved to be the right ones.",
        group="teacher",
        resume="told",
    )
    teacher_api_key_file: str | None = flag(
        None,
        "File that holds the teacher's API key; default: the environment variable TEACHER_API_KEY.",
        group="teacher",
        private=True,
    )
    teacher_timeout: float = flag(
        600.0,
        "Seconds to wait for a teacher, at the start and in a retried request; by default 30 at "
        "the start where nothing listens at an address of this machine. One attempt takes at most "
        "an equal share of it for each replica, and is then sent again in halves if the "
        "teacher is ready.",
        group="teacher",
        private=True,
    )
    teacher_unreachable: Literal["wait", "stop"] = flag(
        "wait",
        "Once a request failed and no teacher is ready any more: wait for one, up to "
        "--teacher_timeout, or stop at once. Either way a run that ends saves a checkpoint first.",
        group="teacher",
    )
    top_k_logprobs: int = flag(
        64,
        "k: the teacher's most probable tokens at each position, sent with their log-probs.",
        group="teacher",
        common=True,
        resume="same",
    )
    teacher_logprob_dtype: Literal["float16", "float32"] = flag(
        "float16",
        "Of the top-k on the wire; the next token and the tail are float32 always, and the rounded "
        "top-k is made to sum to one with them. float32 takes a third more bytes.",
        group="teacher",
        resume="told",
    )
    teacher_repeat_tolerance: float = flag(
        0.05,
        "Probability by which the teacher's scores of two rows may differ when they are scored "
        "twice, before training; at more it is refused.",
        group="teacher",
    )
    teacher_sync: str | None = flag(
        None,
        "A teacher that follows the student: ema=0.99, the share that it keeps in each step, or "
        "every=N steps. Refused: a teacher server takes no weights while it runs.",
        group="teacher",
        resume="same",
    )
    accept_teacher_change: bool = flag(
        False,
        "Go on when another teacher answers at the same address in the middle of a run.",
        group="teacher",
    )
    teacher_cache: str | None = flag(
        None,
        "Folder, on a local disk, that keeps the teacher's answers for later epochs, other ranks "
        "and other runs; a request is sent once. Supervised KD and SeqKD then run without "
        "a teacher. What depends on the student's weights is not kept.",
        group="teacher",
        common=True,
        private=True,
    )
    teacher_cache_max_gb: float = flag(
        10.0,
        "Size of --teacher_cache; what was used longest ago makes room for new answers.",
        group="teacher",
        private=True,
    )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The value of ``--teacher_chat_template_kwargs``, parsed.

        Raises:
            ConfigurationError: it is not a JSON object.
        """
        return json_object("--teacher_chat_template_kwargs", self.teacher_chat_template_kwargs)

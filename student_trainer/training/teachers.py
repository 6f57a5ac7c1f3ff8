"""The teachers of a run: opened, compared with the student, and checked against the rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from shared.errors import ConfigurationError, DatasetError
from shared.protocol import InfoResponse
from student_trainer.config.arguments import (
    ModelArguments,
    TeacherArguments,
)
from student_trainer.config.checks import api_key_of
from student_trainer.config.teachers import ServedTeacher, teachers_of
from student_trainer.data.end_tokens import compare_ends
from student_trainer.data.sample import Example
from student_trainer.data.stream import ExampleStream
from student_trainer.data.teacher_view import TeacherView, read_template
from student_trainer.model.load import (
    load_config,
    load_tokenizer,
)
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.compatible import check_vocabulary
from student_trainer.teacher.named import Teachers
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from student_trainer.teacher.store import AnswerStore
from student_trainer.teacher.vllm import VllmTeacher

if TYPE_CHECKING:
    from student_trainer.training.recipe import Prepared

logger = logging.getLogger(__name__)

# A server of this machine listens within a few seconds, before it loads its model; a stock vLLM,
# which has none of this, only after.
_LOCAL_SECONDS = 30.0


def open_teachers(
    teacher: TeacherArguments, model: ModelArguments, *, starts_alone: bool = False
) -> Teachers:
    """Make a client of each teacher that ``--teacher_url`` names; connect later.

    Args:
        starts_alone: if the cache knows a teacher, start without waiting for it.
    """
    assert teacher.teacher_url is not None  # checked with the flags
    served = teachers_of(teacher.teacher_url)
    stores = _open_stores(teacher, [one.name for one in served])
    return Teachers(
        {
            one.name: _open_one(one, teacher, model, stores.get(one.name), starts_alone)
            for one in served
        }
    )


def _open_stores(teacher: TeacherArguments, names: Sequence[str]) -> dict[str, AnswerStore]:
    """Open the store of ``--teacher_cache``, which all teachers share; none without that flag.

    An answer's key holds its teacher's identity, so a teacher may get a name later. A folder that
    an earlier version made for a named teacher is used further on.
    """
    if teacher.teacher_cache is None:
        return {}
    shared = Path(teacher.teacher_cache)
    folders = {name: shared / name if _has_answers(shared / name) else shared for name in names}
    size = int(teacher.teacher_cache_max_gb * 1e9 / len(set(folders.values())))
    opened = {one: AnswerStore(one, max_bytes=size) for one in set(folders.values())}
    return {name: opened[folder] for name, folder in folders.items()}


def _has_answers(folder: Path) -> bool:
    return any(folder.glob("answers-*.sqlite"))


def _open_one(
    served: ServedTeacher,
    teacher: TeacherArguments,
    model: ModelArguments,
    store: AnswerStore | None,
    starts_alone: bool,
) -> Teacher:
    """Make the client that ``--teacher_protocol`` names, behind ``--teacher_cache``."""
    if teacher.teacher_protocol == "vllm":
        return VllmTeacher(
            served.urls,
            model=served.model,
            name=served.name,
            tokenizer=load_tokenizer(model),
            rows=int(load_config(model).get_text_config().vocab_size),
            top_k=teacher.top_k_logprobs,
            timeout=teacher.teacher_timeout,
            accept_change=teacher.accept_teacher_change,
            api_key=api_key_of(teacher),
            unreachable=teacher.teacher_unreachable,
        )
    is_default = teacher.teacher_timeout == TeacherArguments.teacher_timeout
    client = SparseGkdTeacher(
        served.urls,
        model=served.model,
        name=served.name,
        timeout=teacher.teacher_timeout,
        accept_change=teacher.accept_teacher_change,
        logprob_dtype=teacher.teacher_logprob_dtype,
        api_key=api_key_of(teacher),
        unreachable=teacher.teacher_unreachable,
        local_absent_timeout=_LOCAL_SECONDS if is_default else math.inf,
    )
    if store is None:
        return client
    return CachedTeacher(
        client, store, logprob_dtype=teacher.teacher_logprob_dtype, starts_alone=starts_alone
    )


def view_of(teacher: TeacherArguments) -> TeacherView:
    """Return which teacher rows have and what only that one sees, as the flags say.

    Raises:
        ConfigurationError: the file of --teacher_prompt_template is no Jinja template.
    """
    source = None
    if teacher.teacher_prompt_template is not None:
        source = read_template(Path(teacher.teacher_prompt_template))
    names = tuple(one.name for one in teachers_of(teacher.teacher_url or []) if one.name)
    return TeacherView(names, teacher.teacher_column, source, teacher.template_kwargs)


def check_teachers_are_used(teachers: Teachers, prepared: Prepared) -> None:
    """Refuse a named teacher that no row has; of a stream this is not known.

    Raises:
        ConfigurationError: names the teacher.
    """
    if isinstance(prepared.train, ExampleStream) or not teachers.names:
        return
    used = {e.teacher or teachers.names[0] for e in [*prepared.train, *(prepared.held_out or [])]}
    for name in teachers.names:
        if name not in used:
            raise ConfigurationError(
                f"--teacher_url {name}=…: no row has this teacher; rows name theirs in "
                "--teacher_column, or datasets by --dataset_teacher, else they have the first"
            )


def check_teacher_prompts(teachers: Teachers, prepared: Prepared, flags: TeacherArguments) -> None:
    """Refuse prompts that only a teacher sees and that leave its context no room.

    Raises:
        ConfigurationError: --teacher_chat_template_kwargs, and no row has such a prompt.
        DatasetError: names the row; a row of a stream is checked when it is read.
    """
    method, train, held_out = prepared.method, prepared.train, prepared.held_out or []
    streams = isinstance(train, ExampleStream)
    rows = held_out if isinstance(train, ExampleStream) else [*train, *held_out]
    if flags.template_kwargs and not (streams or any(_has_own_prompt(row) for row in rows)):
        raise ConfigurationError(
            f"--teacher_chat_template_kwargs {flags.teacher_chat_template_kwargs} has no effect: "
            "no row has a prompt that only the teacher sees"
        )

    def check(example: Example) -> None:
        longest = method.max_new_tokens if method.lmbda > 0 or method.seq_kd else 0
        _check_context(teachers, example, longest, own=method.reads_dataset)

    if isinstance(train, ExampleStream):
        train.check_each(check)
    else:
        for example in train:
            check(example)
    for example in held_out:
        longest = method.max_new_tokens if example.sample is None else 0
        _check_context(teachers, example, longest, own=True)


def _has_own_prompt(example: Example) -> bool:
    return example.teacher_prompt_ids is not None


def _check_context(teachers: Teachers, example: Example, longest: int, *, own: bool) -> None:
    """Refuse a prompt of the teacher's own that leaves its context no room for completions.

    Args:
        longest: tokens of the longest completion that is written.
        own: the dataset's completion is scored too.

    Raises:
        DatasetError: names the row, the teacher and its context.
    """
    if example.teacher_prompt_ids is None:
        return
    if own and example.sample is not None:
        longest = max(longest, len(example.sample.completion_ids))
    length = len(example.teacher_prompt_ids) + longest
    limit = teachers.of(example.teacher).info.max_model_len
    if length > limit:
        name = teachers.name_of(example.teacher)
        raise DatasetError(
            f"{example.name}: the teacher's own prompt of {len(example.teacher_prompt_ids)} "
            f"tokens and a completion of up to {longest} make {length}; the context of "
            f"{f'teacher {name}' if name else 'the teacher'} is {limit}"
        )


def compare(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: list[int], info: InfoResponse
) -> None:
    """Check that student and teacher have one vocabulary, and tell if they end otherwise.

    Raises:
        TokenizerMismatchError: they have not.
    """
    check_vocabulary(tokenizer, vocab_size, info)
    if PartialState().is_main_process:
        told = compare_ends(tokenizer, stop_ids, info)
        if told is not None:
            logger.warning("%s", told)

"""The checks, before the first step, that a teacher fits the flags and the student."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from shared.errors import (
    ConfigurationError,
    TeacherChangedError,
    TokenizerMismatchError,
)
from shared.identity import parting_text, tokenizer_identity
from shared.protocol import InfoResponse, TeacherIdentity, TokenizerIdentity
from shared.text import encoded
from student_trainer.config.arguments import TeacherArguments
from student_trainer.config.training_arguments import DistillArguments

logger = logging.getLogger(__name__)


def check_same_teachers(identities: Mapping[str, TeacherIdentity]) -> None:
    """Refuse, on every rank, ranks that reached different teachers.

    Args:
        identities: by the teachers' names.

    Raises:
        TeacherChangedError: names the ranks and teachers.
    """
    reached = gather_object([dict(identities)])
    for rank, others in enumerate(reached):
        for name, first in reached[0].items():
            if others[name] != first:
                raise TeacherChangedError(
                    f"the processes of this run reached different teachers: process 0 {first}, "
                    f"process {rank} {others[name]}. Serve one model at every --teacher_url"
                    f"{f' of {name}' if name else ''}"
                )


def check_capabilities(
    info: InfoResponse, args: DistillArguments, teacher: TeacherArguments
) -> None:
    """Refuse flags that request more than the teacher can do.

    Raises:
        ConfigurationError: names the flag and the teacher's limit.
    """
    if teacher.top_k_logprobs > info.limits.max_top_k:
        raise ConfigurationError(
            f"--top_k_logprobs {teacher.top_k_logprobs} is over the teacher's limit of "
            f"{info.limits.max_top_k}"
        )
    if args.temperature != 1.0 and not info.capabilities.temperature:
        raise ConfigurationError(
            f"--temperature {args.temperature}: the teacher's backend ({info.teacher.backend}) "
            "cannot apply a temperature; use 1.0"
        )
    wanted, most = args.student_top_m, info.limits.max_requested_token_ids
    default = ", the default for --beta 1" if args.request_student_top_m is None else ""
    if wanted and not info.capabilities.requested_token_ids:
        raise ConfigurationError(
            f"--request_student_top_m {wanted}{default}: the teacher's backend "
            f"({info.teacher.backend}) cannot score requested ids; give 0"
        )
    if wanted > most:
        raise ConfigurationError(
            f"--request_student_top_m {wanted} is over the teacher's limit of {most}"
        )
    if args.teacher_support == "sampled" and not info.capabilities.sample_seed:
        raise ConfigurationError(
            f"--teacher_support sampled: the teacher's backend ({info.teacher.backend}) draws no "
            "support; use top_k"
        )
    if args.seq_kd and not info.capabilities.generate:
        raise ConfigurationError("--seq_kd: this teacher does not generate")


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, output_size: int, info: InfoResponse
) -> None:
    """Refuse a teacher with another vocabulary than the student, or another tokenization.

    Output layers may be padded to different sizes. Tokens outside one of them cause a warning:
    only those in the data matter, and `check_token_ids` refuses them.

    Args:
        output_size: size of the student's output layer.

    Raises:
        TokenizerMismatchError: names both fingerprints, or a text that is tokenized differently.
    """
    ours, theirs = tokenizer_identity(tokenizer), info.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise TokenizerMismatchError(
            f"teacher and student have different vocabularies: the teacher's tokenizer is "
            f"{theirs.fingerprint} ({theirs.vocab_size} tokens), the student's {ours.fingerprint} "
            f"({ours.vocab_size} tokens). Distil within one tokenizer family"
        )
    _check_encoding(tokenizer, ours, theirs)
    shared = min(output_size, info.vocab_size)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= shared}
    if beyond:
        logger.warning(
            "%d of the tokenizer's tokens have no row in the output layers of %d (student) and %d "
            "(teacher) rows, %r (id %d) the first: rows of the data that hold one are refused",
            len(beyond), output_size, info.vocab_size, beyond[min(beyond)], min(beyond),
        )  # fmt: skip
    for name in ("special_token_ids", "chat_template"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            logger.warning("%s differs: teacher %r, student %r", name, other, mine)


def _check_encoding(
    tokenizer: PreTrainedTokenizerBase, ours: TokenizerIdentity, theirs: TokenizerIdentity
) -> None:
    if ours.encoding is None or theirs.encoding is None:
        logger.warning(
            "the teacher's server is older than this trainer and does not say how its tokenizer "
            "cuts text; that of the student may cut it otherwise"
        )
        return
    try:
        text = parting_text(ours.encoding, theirs.encoding)
    except ValueError as error:
        logger.warning("how teacher and student cut text cannot be compared: %s", error)
        return
    if text is not None:
        tokens = tokenizer.convert_ids_to_tokens(encoded(tokenizer, text))
        raise TokenizerMismatchError(
            f"teacher and student have one vocabulary but cut text otherwise: of {text!r} the "
            f"student makes {len(tokens)} tokens, {tokens[:8]} first, and the teacher others. Give "
            "both the same tokenizer.json, and restart the teacher with this version"
        )

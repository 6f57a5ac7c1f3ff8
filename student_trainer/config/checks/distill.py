"""The checks of a distillation: its method, and what may run ahead of the step."""

from __future__ import annotations

from shared.errors import ConfigurationError
from student_trainer.config.arguments import DataArguments, DistillFlags, Recipe, TeacherArguments
from student_trainer.config.checks.presence import check_needs
from student_trainer.config.checks.recipe import check_recipe
from student_trainer.config.checks.rollouts import check_rollouts
from student_trainer.config.checks.teacher import check_dataset_teachers, check_teacher


def check_distillation(recipe: Recipe, teacher: TeacherArguments, args: DistillFlags) -> None:
    """Check all flags of `distill`.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    check_distill(args, teacher)
    check_dataset_teachers(teacher, recipe.dataset)
    check_rollouts(args, recipe.adapters)
    check_recipe(recipe, args)


def check_distill(args: DistillFlags, teacher: TeacherArguments) -> None:
    """Check the method and the teacher of a distillation.

    Raises:
        ConfigurationError: a value is out of range, or two flags contradict each other.
    """
    for name in ("lmbda", "beta"):
        value = getattr(args, name)
        if not 0.0 <= value <= 1.0:
            raise ConfigurationError(f"--{name} {value} must be from 0 to 1")
    if not 0 < args.temperature < float("inf"):
        raise ConfigurationError(f"--temperature {args.temperature} must be above 0")
    if not 0 < args.rollout_temperature < float("inf"):
        raise ConfigurationError(
            f"--rollout_temperature {args.rollout_temperature} must be above 0"
        )
    if not 0 <= args.seq_kd_temperature < float("inf"):
        raise ConfigurationError(f"--seq_kd_temperature {args.seq_kd_temperature} is below 0")
    if not 0.0 <= args.sft_weight < 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} must be 0 or above and below 1; without a teacher's "
            "share there is `student-trainer sft`"
        )
    if args.sft_weight > 0 and args.lmbda == 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} has no effect with --lmbda 1: the student's own "
            "completions are no labels. Drop it, or lower --lmbda"
        )
    if args.sft_weight > 0 and args.temperature != 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} needs --temperature 1: the cross-entropy shares the "
            f"divergence's softmax, and at {args.temperature} it is not the data's likelihood"
        )
    if args.student_top_m < 0:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} must be 0 (none) or above"
        )
    _check_support(args, teacher)
    _check_ahead(args)
    if args.seq_kd and args.lmbda == 1.0:
        raise ConfigurationError(
            "--seq_kd has no effect with --lmbda 1: every step is on-policy. "
            "Drop --seq_kd, or lower --lmbda"
        )
    check_needs(args)
    if teacher.teacher_protocol == "vllm" and args.temperature != 1.0:
        raise ConfigurationError(
            f"--temperature {args.temperature}: vLLM never applies a temperature to the log-probs "
            "of a prompt, so --teacher_protocol vllm takes 1.0 only; use `teacher-server serve`"
        )
    check_teacher(teacher)


def _check_support(args: DistillFlags, teacher: TeacherArguments) -> None:
    """Check what ``--teacher_support sampled`` cannot go with: a beta, ``--tail``, a cache."""
    if args.teacher_support != "sampled":
        return
    if args.beta != 0.0:
        raise ConfigurationError(
            f"--teacher_support sampled estimates forward KL alone, and --beta is {args.beta}: set "
            "--beta 0, or use --teacher_support top_k"
        )
    if args.tail != "bucket":
        raise ConfigurationError(
            f"--tail {args.tail} has no effect with --teacher_support sampled, which has no tail; "
            "drop it"
        )
    if args.student_top_m:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} would bias --teacher_support "
            "sampled: drop it, or use --teacher_support top_k"
        )
    if teacher.teacher_cache is not None:
        raise ConfigurationError(
            f"--teacher_cache {teacher.teacher_cache} keeps nothing of --teacher_support sampled, "
            "which is drawn anew in each step: drop it, or use --teacher_support top_k"
        )
    if teacher.teacher_protocol == "vllm":
        raise ConfigurationError(
            "--teacher_support sampled: a stock vLLM draws no support, so --teacher_protocol vllm "
            "takes top_k only; use `teacher-server serve`"
        )


def _check_ahead(args: DistillFlags) -> None:
    """Check by how many steps rollouts and scores run ahead."""
    for name in ("rollout_staleness", "teacher_prefetch_steps"):
        if getattr(args, name) < 0:
            raise ConfigurationError(f"--{name} {getattr(args, name)} must be 0 or above")
    proposes = args.student_top_m > 0 and not args.seq_kd
    if args.rollout_staleness and args.lmbda == 0.0 and not proposes:
        raise ConfigurationError(
            f"--rollout_staleness {args.rollout_staleness} has no effect with --lmbda 0: there are "
            "no rollouts. Drop it; --teacher_prefetch_steps is for what the student does not write"
        )
    prefetch = args.teacher_prefetch_steps
    if prefetch == DistillFlags.teacher_prefetch_steps:
        return
    if args.lmbda == 1.0:
        raise ConfigurationError(
            f"--teacher_prefetch_steps {prefetch} has no effect with --lmbda 1: every step is "
            "on-policy. Drop it; --rollout_staleness is for rollouts"
        )
    if proposes:
        raise ConfigurationError(
            f"--teacher_prefetch_steps {prefetch} has no effect with --request_student_top_m "
            f"{args.student_top_m} (16 for --beta 1, if not given): the student proposes ids for "
            "every step. Drop it; --rollout_staleness is for what depends on the student's weights"
        )


def check_precompute(args: DistillFlags, teacher: TeacherArguments, data: DataArguments) -> None:
    """Check the flags of `precompute`.

    Raises:
        ConfigurationError: nothing can be requested before there is a student.
    """
    if teacher.teacher_cache is None:
        raise ConfigurationError("--teacher_cache is missing: give a folder for the answers")
    if args.lmbda == 1.0:
        raise ConfigurationError(
            "--lmbda 1: every step is on-policy, and what the student writes is not known before "
            "it trains; there is nothing to precompute"
        )
    if data.streaming:
        raise ConfigurationError(
            "--streaming: precompute asks the teacher about all rows, and a stream has no end; "
            "drop it"
        )
    if args.student_top_m:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} (16 for --beta 1, if not given): the "
            "ids depend on the student's weights, and cannot be requested before it trains; give 0"
        )

"""The checks of the flags of `evaluate`."""

from __future__ import annotations

from shared.errors import ConfigurationError
from shared.model_names import existing, near_path
from student_trainer.config.arguments import (
    DatasetArguments,
    EvaluateArguments,
    GenerationArguments,
    ModelArguments,
    TeacherArguments,
)
from student_trainer.config.checks.model import check_generation, check_model
from student_trainer.config.checks.presence import require
from student_trainer.config.checks.rollouts import check_engine
from student_trainer.config.checks.teacher import check_teacher, check_teacher_of_references
from student_trainer.config.suites import FORMS, HUB


def check_evaluate(
    model: ModelArguments,
    dataset: DatasetArguments,
    generation: GenerationArguments,
    teacher: TeacherArguments,
    args: EvaluateArguments,
) -> None:
    """Check the flags of `evaluate`.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    check_model(model)
    check_generation(generation)
    check_engine(args)
    if args.rollout_engine == "vllm" and not (
        args.temperature == 0 or 0.01 <= args.temperature <= 2
    ):
        raise ConfigurationError(
            f"--temperature {args.temperature}: vLLM samples from 0.01 to 2, or greedily at 0; use "
            "--rollout_engine transformers"
        )
    if not 0.0 <= args.beta <= 1.0:
        raise ConfigurationError(f"--beta {args.beta} must be from 0 to 1")
    if teacher.teacher_url:
        check_teacher(teacher)
        check_teacher_of_references(teacher)
    elif teacher != TeacherArguments() or args.beta != EvaluateArguments.beta:
        raise ConfigurationError(
            "a teacher's flags and --beta have no effect without --teacher_url"
        )
    if len(dataset.dataset_name) > 1:
        raise ConfigurationError(
            f"--dataset_name {' '.join(dataset.dataset_name)}: give `evaluate` one at a time"
        )
    _check_suite(args.suite, dataset)
    require(args.output_dir, "--output_dir", "a folder for results.json and samples.jsonl")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigurationError(f"--temperature {args.temperature} must be 0 (greedy) or above")
    if args.n < 1 or (args.limit is not None and args.limit < 1):
        raise ConfigurationError(f"--n {args.n} and --limit {args.limit} must be at least 1")
    if args.n > 1 and args.temperature == 0:
        raise ConfigurationError(
            f"--n {args.n} greedy completions are all the same; add --temperature"
        )
    if not args.check_timeout > 0:
        raise ConfigurationError(f"--check_timeout {args.check_timeout} must be above 0")


def _check_suite(suite: str, dataset: DatasetArguments) -> None:
    if suite in FORMS:
        if suite not in HUB:
            require(
                "".join(dataset.dataset_name),
                "--dataset_name",
                "HumanEval.jsonl.gz, GSM8K or rows with checkers; or --suite humaneval or gsm8k, "
                "which come from the Hub",
            )
    elif dataset.dataset_name:
        raise ConfigurationError(
            f"--suite {suite} with --dataset_name must be one of {', '.join(FORMS)}: what "
            f"{dataset.dataset_name[0]} holds"
        )
    elif suite == "mini_humaneval":
        raise ConfigurationError(
            "--suite mini_humaneval is made, not published: in a checkout run `python -m "
            "examples.mini_humaneval.prepare --output_dir DIR`, and give --suite DIR/held_out.jsonl"
        )
    elif existing(suite) is None:
        raise ConfigurationError(
            f"--suite {suite}: no such file or folder{near_path(suite)}, and neither humaneval "
            "nor gsm8k"
        )

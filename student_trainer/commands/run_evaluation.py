"""The run of `evaluate`, once its flags are checked: completions, verdicts, results.json."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigurationError
from shared.sparse import SparseLogprobs
from student_trainer.commands.evaluation_completions import generate_completions
from student_trainer.commands.evaluation_prompts import (
    ModelParts,
    load_parts,
    prompt_style,
    reference_samples,
    rollout_requests,
    template_options,
)
from student_trainer.config.arguments import (
    DatasetArguments,
    EvaluateArguments,
    GenerationArguments,
    ModelArguments,
    TeacherArguments,
    TemplateArguments,
)
from student_trainer.config.suites import where_from
from student_trainer.data.rows import load_rows
from student_trainer.data.sample import Sample
from student_trainer.data.template import TemplateOptions
from student_trainer.evaluation.checkers import CheckResult, check_completions, missing_fences
from student_trainer.evaluation.journal import EvaluationJournal
from student_trainer.evaluation.passk import mean_pass_at_k, write_samples
from student_trainer.evaluation.perplexity import measure
from student_trainer.evaluation.suites import Problem, problems_of
from student_trainer.losses import Divergence
from student_trainer.model.load import load_model
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.compatible import check_vocabulary
from student_trainer.training.teachers import open_teachers


def run_evaluation(
    model_arguments: ModelArguments,
    dataset: DatasetArguments,
    generation: GenerationArguments,
    template: TemplateArguments,
    teacher: TeacherArguments,
    args: EvaluateArguments,
) -> dict[str, Any]:
    """Generate, check and score completions, and return the content of results.json."""
    name, config, split, form = where_from(dataset, args.suite)
    rows = load_rows(name, config=config, split=split)
    parts = load_parts(model_arguments)
    chat = parts.tokenizer.chat_template is not None and not args.raw_prompt
    problems = problems_of(rows, form, chat=chat)[: args.limit]
    style = prompt_style(problems, args)
    options = template_options(template, model_arguments)
    requests = rollout_requests(problems, parts, generation, options, args)
    missing = missing_fences([p.checker for p in problems], unsafe=args.unsafe_sandbox)
    folder = _make_folder(args)
    since = time.perf_counter()
    references = reference_samples(problems, parts, options, required=bool(teacher.teacher_url))
    scored = _scored(references, parts, model_arguments, teacher) if teacher.teacher_url else None
    model = load_model(model_arguments)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = _journal_inputs(problems, model_arguments, generation, options, args)
    with EvaluationJournal(folder / "unfinished.jsonl", inputs) as journal:
        generate_completions(model, requests, problems, parts, generation, args, journal)
    completions = [journal.texts[number] for number in range(len(requests))]
    truncated = [journal.truncated[number] for number in range(len(requests))]
    results = check_completions(
        [problem.checker for problem in problems for _ in range(args.n)],
        completions,
        timeout=args.check_timeout,
        progress=True,
        truncated=truncated,
        unsafe=args.unsafe_sandbox,
    )
    summary = {
        "model": model_arguments.model_name_or_path,
        "dataset": name,
        "problems": len(problems),
        **({"asked": style} if style else {}),
        "n": args.n,
        "temperature": args.temperature,
        "seed": args.seed,
        "max_new_tokens": generation.max_new_tokens,
        **({"unsafe_sandbox": missing} if missing else {}),
        **scores(results, args.n),
        "truncated": sum(truncated) / len(truncated),
        **_measured(model, references, scored, args, parts),
        "seconds": round(time.perf_counter() - since, 2),
    }
    _write(folder, summary, problems, completions, truncated, results, args.n)
    journal.finish()
    sys.stdout.write(json.dumps(summary) + "\n")
    return summary


def _make_folder(args: EvaluateArguments) -> Path:
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder}: {error.strerror}") from error
    return folder


def _journal_inputs(
    problems: Sequence[Problem],
    model: ModelArguments,
    generation: GenerationArguments,
    template: TemplateOptions,
    args: EvaluateArguments,
) -> dict[str, Any]:
    """Return all that completions depend on, with sizes and times of files in place of weights."""
    files = sorted(Path(model.model_name_or_path).glob("*.*"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    rows = json.dumps([(problem.task_id, problem.row) for problem in problems])
    return {
        "model": [*asdict(model).values(), *map(list, stats)],
        "problems": hashlib.sha256(rows.encode()).hexdigest(),
        "sampling": [args.n, args.temperature, args.seed, generation.max_new_tokens],
        "engine": args.rollout_engine,
        "template": [dict(template.kwargs), str(template.today)],
    }


def scores(results: Sequence[CheckResult], n: int) -> dict[str, float]:
    """Return pass@k of the programs, k = 1, 10, 100 up to ``n``, and exact match of the others."""
    groups = [results[i : i + n] for i in range(0, len(results), n)]
    programs = [(n, sum(r.passed for r in g)) for g in groups if g[0].kind == "python"]
    others = [r.passed for g in groups if g[0].kind != "python" for r in g]
    found: dict[str, float] = {}
    if programs:
        found |= {f"pass@{k}": mean_pass_at_k(programs, k) for k in (1, 10, 100) if k <= n}
    if others:
        found["exact_match"] = sum(others) / len(others)
    return found


def _scored(
    references: Sequence[Sample],
    parts: ModelParts,
    model: ModelArguments,
    teacher: TeacherArguments,
) -> tuple[list[SparseLogprobs], int]:
    """Return the teacher's scores of the references, and the size of its vocabulary.

    Raises:
        ConfigurationError: there is no reference.
        TokenizerMismatchError: its token ids mean other tokens.
    """
    if not references:
        raise ConfigurationError(
            "--teacher_url: these rows have no reference to compare the model with its teacher on"
        )
    with open_teachers(teacher, model) as teachers:
        client = teachers.of(None)
        info = client.connect()
        check_vocabulary(parts.tokenizer, parts.rows, info)
        sequences = [(sample.token_ids, sample.completion_start) for sample in references]
        return client.score(sequences, ScoreOptions(teacher.top_k_logprobs)), info.vocab_size


def _measured(
    model: Any,
    references: Sequence[Sample],
    scored: tuple[list[SparseLogprobs], int] | None,
    args: EvaluateArguments,
    parts: ModelParts,
) -> dict[str, float]:
    if not references:
        return {}
    rows = parts.rows
    targets, vocab_size = (None, rows) if scored is None else scored
    return measure(
        model,
        references,
        targets,
        divergence=Divergence(args.beta),
        vocab_size=min(rows, vocab_size),
    )


def _write(
    folder: Path,
    summary: dict[str, Any],
    problems: Sequence[Problem],
    completions: Sequence[str],
    truncated: Sequence[bool],
    results: Sequence[CheckResult],
    n: int,
) -> None:
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_samples(
        folder / "samples.jsonl",
        (
            {
                "task_id": problems[i // n].task_id,
                "completion": completion,
                "passed": result.passed,
                "result": result.detail or "passed",
                "truncated": cut_short,
                # For readers; only the first completion of a problem shows its prompt.
                **(_described(problems[i // n]) if i % n == 0 else {}),
            }
            for i, (completion, cut_short, result) in enumerate(
                zip(completions, truncated, results, strict=True)
            )
        ),
    )


def _described(problem: Problem) -> dict[str, str]:
    prompt = problem.row["prompt"]
    if isinstance(prompt, list):
        prompt = [turn.get("content") for turn in prompt if turn["role"] != "assistant"][-1]
    return {"prompt": str(prompt), "reference": problem.reference}

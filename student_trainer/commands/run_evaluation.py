"""What `evaluate` does once its flags are checked: completions, verdicts, results.json."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shared.errors import ConfigurationError, DatasetError
from shared.sparse import SparseLogprobs
from shared.text import StopSearch, StopStrings, completion_text
from student_trainer.config.arguments import (
    DataArguments,
    DatasetArguments,
    EvaluateArguments,
    GenerationArguments,
    ModelArguments,
    TeacherArguments,
    TemplateArguments,
)
from student_trainer.config.suites import HUB
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.rows import load_rows
from student_trainer.data.sample import Sample
from student_trainer.data.template import TemplateOptions
from student_trainer.data.template_date import read_date
from student_trainer.data.tokenize import tokenize_rows
from student_trainer.evaluation.checkers import CheckResult, check_completions, missing_fences
from student_trainer.evaluation.journal import EvaluationJournal
from student_trainer.evaluation.passk import mean_pass_at_k, write_samples
from student_trainer.evaluation.perplexity import measure
from student_trainer.evaluation.suites import Problem, problems_of
from student_trainer.losses import Divergence
from student_trainer.model.load import (
    context_length,
    load_config,
    load_model,
    load_stop_ids,
    load_text_end,
    load_tokenizer,
)
from student_trainer.rollouts import (
    RolloutEngine,
    RolloutRequest,
    TransformersRollouts,
    VllmEngine,
    VllmRollouts,
)
from student_trainer.runtime.progress import counted
from student_trainer.teacher.compatible import check_vocabulary
from student_trainer.training.recipe import open_teacher

logger = logging.getLogger(__name__)


def run_evaluation(
    model_arguments: ModelArguments,
    dataset: DatasetArguments,
    generation: GenerationArguments,
    template: TemplateArguments,
    teacher: TeacherArguments,
    args: EvaluateArguments,
) -> dict[str, Any]:
    """Generate, check and score; return what results.json holds."""
    name, config, split, form = where_from(dataset, args.suite)
    rows = load_rows(name, config=config, split=split)
    parts = _load_parts(model_arguments)
    chat = parts.tokenizer.chat_template is not None and not args.raw_prompt
    problems = problems_of(rows, form, chat=chat)[: args.limit]
    asked = _asked(problems, args)
    told = _template_options(template, model_arguments)
    requests = _requests(problems, parts, generation, told, args)
    missing = missing_fences([p.checker for p in problems], unsafe=args.unsafe_sandbox)
    folder = _make_folder(args)
    since = time.perf_counter()
    references = _references(problems, parts, told, required=bool(teacher.teacher_url))
    scored = _scored(references, parts, model_arguments, teacher) if teacher.teacher_url else None
    model = load_model(model_arguments)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    of = _told(problems, model_arguments, generation, told, args)
    with EvaluationJournal(folder / "unfinished.jsonl", of) as unfinished:
        _generate(model, requests, problems, parts, generation, args, unfinished)
    completions = [unfinished.texts[number] for number in range(len(requests))]
    truncated = [unfinished.truncated[number] for number in range(len(requests))]
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
        **({"asked": asked} if asked else {}),
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
    unfinished.finish()
    sys.stdout.write(json.dumps(summary) + "\n")
    return summary


def where_from(dataset: DatasetArguments, suite: str) -> tuple[str, str | None, str, str]:
    """Name, configuration, split and form of the rows, which ``--suite`` may name alone."""
    config, split = dataset.dataset_config, dataset.dataset_split
    if dataset.dataset_name:
        return dataset.dataset_name[0], config, split, suite
    if suite in HUB:
        return *HUB[suite], suite
    return suite, config, split, "auto"


def _template_options(template: TemplateArguments, model: ModelArguments) -> TemplateOptions:
    """Return the options of the flags; the date is that of the model's training, if it has one."""
    folder = Path(model.model_name_or_path)
    return TemplateOptions(template.kwargs, read_date(template.chat_template_date, [folder]))


@dataclass(frozen=True)
class _Parts:
    """What is needed of a model beside its weights, loaded once.

    Attributes:
        stop_ids: tokens that end a completion.
        text_end: the one of them that ends plain text; None for the first.
        rows: of its output layer.
        context: longest sequence, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    text_end: int | None
    rows: int
    context: int


def _load_parts(model: ModelArguments) -> _Parts:
    config, tokenizer = load_config(model), load_tokenizer(model)
    rows = int(config.get_text_config().vocab_size)
    stop_ids = tuple(load_stop_ids(model, tokenizer))
    text_end = load_text_end(model, tokenizer)
    return _Parts(tokenizer, stop_ids, text_end, rows, context_length(config))


def _row_tokenizer(parts: _Parts, template: TemplateOptions) -> RowTokenizer:
    return RowTokenizer(
        parts.tokenizer,
        parts.stop_ids,
        DataArguments(),
        parts.context,
        template,
        text_end=parts.text_end,
    )


def _asked(problems: Sequence[Problem], args: EvaluateArguments) -> str:
    """How HumanEval is asked, or "" where it is not.

    Raises:
        ConfigurationError: ``--raw_prompt`` has no effect.
    """
    asked = problems[0].asked
    if asked:
        logger.info("HumanEval is asked by %s", asked)
    elif args.raw_prompt:
        raise ConfigurationError(
            "--raw_prompt has no effect: of HumanEval's rows alone there are two ways to ask; "
            "leave it out"
        )
    return asked


def _make_folder(args: EvaluateArguments) -> Path:
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder}: {error.strerror}") from error
    return folder


def _told(
    problems: Sequence[Problem],
    model: ModelArguments,
    generation: GenerationArguments,
    template: TemplateOptions,
    args: EvaluateArguments,
) -> dict[str, Any]:
    """All that a completion depends on; a folder's weights by their files' sizes and times."""
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
    """pass@k of the programs for k = 1, 10, 100 up to ``n``, exact match of the rest (mean)."""
    groups = [results[i : i + n] for i in range(0, len(results), n)]
    programs = [(n, sum(r.passed for r in g)) for g in groups if g[0].kind == "python"]
    others = [r.passed for g in groups if g[0].kind != "python" for r in g]
    found: dict[str, float] = {}
    if programs:
        found |= {f"pass@{k}": mean_pass_at_k(programs, k) for k in (1, 10, 100) if k <= n}
    if others:
        found["exact_match"] = sum(others) / len(others)
    return found


def _requests(
    problems: Sequence[Problem],
    parts: _Parts,
    generation: GenerationArguments,
    template: TemplateOptions,
    args: EvaluateArguments,
) -> list[RolloutRequest]:
    """Tokenized prompts, n of each; the key makes a sample independent of its batch."""
    limit = parts.context
    rows = [(problem.task_id, problem.row) for problem in problems]
    examples = tokenize_rows(
        rows,
        _row_tokenizer(parts, template),
        remedy="That is the context of the model; take one with a longer context",
    )
    for example in examples:
        if len(example.prompt_ids) + generation.max_new_tokens > limit:
            raise DatasetError(
                f"{example.name}: a prompt of {len(example.prompt_ids)} tokens leaves less than "
                f"--max_new_tokens {generation.max_new_tokens} of the context of {limit}; lower it"
            )
    return [
        RolloutRequest(example.prompt_ids, ("evaluate", args.seed, example.index, number))
        for example in examples
        for number in range(args.n)
    ]


def _references(
    problems: Sequence[Problem],
    parts: _Parts,
    template: TemplateOptions,
    *,
    required: bool,
) -> list[Sample]:
    """The right answers as samples; those that are too long are cut at the model's context.

    Raises:
        DatasetError: they are ``required``, and one cannot be told from its prompt.
    """
    rows = [(p.task_id, p.answered) for p in problems if p.answered is not None]
    try:
        examples = tokenize_rows(
            rows,
            _row_tokenizer(parts, template),
        )
    except DatasetError as error:  # a template that rewrites turns: generating is no matter of it
        if required:
            raise
        logger.warning("No perplexity of the references: %s", error)
        return []
    return [example.sample for example in examples if example.sample is not None]


def _scored(
    references: Sequence[Sample],
    parts: _Parts,
    model: ModelArguments,
    teacher: TeacherArguments,
) -> tuple[list[SparseLogprobs], int]:
    """What the teacher says of the references, and its vocabulary.

    Raises:
        ConfigurationError: there is none to score.
        TokenizerMismatchError: its token ids mean other tokens.
    """
    if not references:
        raise ConfigurationError(
            "--teacher_url: these rows have no reference to compare the model with its teacher on"
        )
    with open_teacher(teacher, model) as client:
        info = client.connect()
        check_vocabulary(parts.tokenizer, parts.rows, info)
        asked = [(sample.token_ids, sample.completion_start) for sample in references]
        return client.score(asked, top_k=teacher.top_k_logprobs), info.vocab_size


def _measured(
    model: Any,
    references: Sequence[Sample],
    scored: tuple[list[SparseLogprobs], int] | None,
    args: EvaluateArguments,
    parts: _Parts,
) -> dict[str, float]:
    if not references:
        return {}
    rows = parts.rows
    found, vocab_size = (None, rows) if scored is None else scored
    return measure(
        model,
        references,
        found,
        divergence=Divergence(args.beta),
        vocab_size=min(rows, vocab_size),
    )


def _generate(
    model: Any,
    requests: Sequence[RolloutRequest],
    problems: Sequence[Problem],
    parts: _Parts,
    generation: GenerationArguments,
    args: EvaluateArguments,
    unfinished: EvaluationJournal,
) -> None:
    """Fill in what is missing."""
    missing = [number for number in range(len(requests)) if number not in unfinished.texts]
    if not missing:
        return
    if unfinished.texts:
        logger.warning(
            "%d of %d completions are there already", len(unfinished.texts), len(requests)
        )
    stops = StopStrings(problems[0].stop_strings)  # rows of one form
    vocab_size = min(len(parts.tokenizer), model.get_output_embeddings().weight.shape[0])
    longest = max(len(request.prompt_ids) for request in requests) + generation.max_new_tokens
    with (
        _engine(model, generation, args, parts, stops, vocab_size, longest) as engine,
        counted(len(missing), "Generating") as count,
    ):
        for group in engine.generate([requests[number] for number in missing]):
            for index, rollout in group:
                number = missing[index]
                prompt_ids = requests[number].prompt_ids
                text = completion_text(parts.tokenizer, prompt_ids, rollout.token_ids)
                text, stopped = stops.cut(text)
                unfinished.add(number, text, truncated=rollout.truncated and not stopped)
            count(len(group))


@contextmanager
def _engine(
    model: Any,
    generation: GenerationArguments,
    args: EvaluateArguments,
    parts: _Parts,
    stops: StopStrings,
    vocab_size: int,
    longest: int,
) -> Iterator[RolloutEngine]:
    """Who writes the completions, of prompt and completion of up to ``longest`` tokens."""
    search = partial(StopSearch, parts.tokenizer, stops=stops) if stops.texts else None
    if args.rollout_engine == "transformers":
        yield TransformersRollouts(
            model,
            stop_ids=parts.stop_ids,
            pad_token_id=parts.stop_ids[0],
            max_new_tokens=generation.max_new_tokens,
            temperature=args.temperature,
            batch_size=generation.generation_batch_size or 32,
            vocab_size=vocab_size,
            stop_strings=search,
        )
        return
    with VllmEngine(
        model,
        max_model_len=longest,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_num_seqs=generation.generation_batch_size,
    ) as engine:
        rollouts = VllmRollouts(
            engine,
            stop_ids=parts.stop_ids,
            max_new_tokens=generation.max_new_tokens,
            temperature=args.temperature,
            vocab_size=vocab_size,
            stop_strings=search,
        )
        rollouts.sync(0)
        yield rollouts


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
                # For eyes; the first completion of each problem has it, the others share it.
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

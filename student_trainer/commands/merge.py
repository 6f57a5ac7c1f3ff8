"""The command `merge`: LoRA adapters into their base model; torch waits for checked flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from student_trainer.config.arguments import ModelArguments
from student_trainer.config.checks import check_merge
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.parse import parse
from student_trainer.runtime.folders import check_output_folder


def merge(argv: Sequence[str]) -> None:
    """Merge LoRA adapters into their base model, so that it can be served or distilled further."""
    (args,) = parse(
        argv, *ARGUMENTS["merge"], prog="student-trainer merge", description=merge.__doc__ or ""
    )
    check_merge(args)
    check_output_folder("--output_dir", args.output_dir)
    from student_trainer.model.load import load_model, load_tokenizer
    from student_trainer.model.merging import probe_logprobs, require_same_logprobs

    model = ModelArguments(
        model_name_or_path=args.model_name_or_path,
        torch_dtype="checkpoint" if args.torch_dtype == "auto" else args.torch_dtype,
        trust_remote_code=args.trust_remote_code,
    )
    merged = load_model(model)
    expected = probe_logprobs(merged)
    merged.save_pretrained(args.output_dir)
    load_tokenizer(model).save_pretrained(args.output_dir)
    saved = replace(model, model_name_or_path=args.output_dir)
    require_same_logprobs(
        expected, probe_logprobs(load_model(saved)), f"saving to {args.output_dir}"
    )
    sys.stdout.write(f"Merged into {args.output_dir}; teacher-server serve {args.output_dir}\n")

"""All that only a GPU can show, in one command: speed, memory and exactness of each part.

Loss kernels beside Liger's and the bare matrix products, the teacher's scoring, one optimizer step
by each way of training, and rollouts. Every part runs in a process of its own, for so long and no
longer; the most telling parts come first. Results are kept in a JSON file after each part, so a
second run goes on where the first was ended.

    python -m benchmarks.gpu                    # one card, 8 minutes at most; or: make gpu-check
    python -m benchmarks.gpu --device cpu --quick   # that every part runs at all, in a minute
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import NotHereError
from benchmarks.harness import (
    Cell,
    Figure,
    Worker,
    argument_parser,
    format_table,
    print_report,
)

ROOT = Path(__file__).parents[1]
SOURCES = ("benchmarks/gpu_parts", "student_trainer", "teacher_server", "shared")
PACKAGES = (
    "torch", "triton", "transformers", "vllm", "liger-kernel", "peft", "bitsandbytes", "flash-attn"
)  # fmt: skip
DONE, LEFT_OUT, NO_TIME = "done", "left out", "no time left"
LEAST_SECONDS = 15.0  # below which no part begins
COUNTS = [4096, 1024, 16_384, 32_768]
NOTES = (
    "on paper: the least time that the card's memory and matrix units allow, of each kernel one "
    "after another (benchmarks/gpu_parts/roofline.py).",
    "× matmuls: over the bare products in bfloat16 (three, two if the layer is frozen). Liger and "
    "the dense loss compute the teacher's logits too, which a server computes for ours.",
    "gradient error: relative, the worse of both gradients, to the same loss in float64.",
    "MFU: of the model's own products, without those that gradient checkpoints repeat.",
)


@dataclass(frozen=True)
class Part:
    """A measurement in a process of its own.

    Attributes:
        name: as the table has it.
        function: "module:function", called with the device and the arguments, which yields rows.
        limit: seconds, after which the process is ended; its rows so far are kept.
        needs_gpu: it is left out on a CPU.
    """

    name: str
    function: str
    limit: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass
class Result:
    """The outcome of a part: "done", "left out", "no time left", or what went wrong."""

    name: str
    status: str
    seconds: float = 0.0
    rows: list[dict[str, Figure]] = field(default_factory=list)


_LOSS, _STEP, _TEACHER, _ROLLOUTS = (
    f"benchmarks.gpu_parts.{name}" for name in ("loss", "step", "teacher", "rollouts")
)
# The most telling first. Limits are for an H200, with room.
PARTS = (
    Part("kernel", f"{_LOSS}:kernel", 60, {"vocab_size": 151_936, "positions": 3533}),
    Part("loss, 152k", f"{_LOSS}:measure", 90,
         {"vocab_size": 151_936, "width": 3584, "positions": COUNTS}),
    Part("step, 0.5B", f"{_STEP}:measure", 60, {"shape": "0.5B", "sequences": 16}),
    Part("teacher, 7B", f"{_TEACHER}:speed", 60, {"shape": "7B"}),
    Part("rollouts, 0.5B", f"{_ROLLOUTS}:transformers", 60, {"shape": "0.5B"}),
    Part("step, 7B", f"{_STEP}:measure", 75, {"shape": "7B", "sequences": 8}),
    Part("loss, 152k, narrow", f"{_LOSS}:measure", 75,
         {"vocab_size": 151_936, "width": 896, "positions": COUNTS}),
    Part("exactness", f"{_TEACHER}:exactness", 45, {"shape": "0.5B"}),
    Part("step, LoRA", f"{_STEP}:measure", 60, {"shape": "7B", "way": "LoRA"}),
    Part("step, packed", f"{_STEP}:measure", 60,
         {"shape": "0.5B", "sequences": 16, "packed": True}),
    Part("loss, 32k", f"{_LOSS}:measure", 60,
         {"vocab_size": 32_000, "width": 4096, "positions": COUNTS}),
    Part("step, QLoRA", f"{_STEP}:measure", 75, {"shape": "0.5B", "way": "QLoRA"}),
    Part("step, compiled", f"{_STEP}:measure", 90,
         {"shape": "0.5B", "sequences": 16, "compiled": True, "checkpointing": False}),
    Part("loss, 256k", f"{_LOSS}:measure", 75,
         {"vocab_size": 256_000, "width": 2304, "positions": COUNTS}),
    Part("teacher, vLLM", f"{_TEACHER}:vllm", 150, {"shape": "0.5B"}, needs_gpu=True),
    Part("rollouts, vLLM", f"{_ROLLOUTS}:vllm", 150, {"shape": "0.5B"}, needs_gpu=True),
    Part("rollouts, vLLM asleep", f"{_ROLLOUTS}:vllm_asleep", 150, {"shape": "0.5B"},
         needs_gpu=True),
)  # fmt: skip
_TINY = {"shape": "tiny", "sequences": 2, "length": 32}
# What stands in a part's arguments with --quick.
QUICK: dict[str, Mapping[str, Any]] = {
    f"{_LOSS}:kernel": {"vocab_size": 1000, "positions": 2},
    f"{_LOSS}:measure": {"vocab_size": 512, "width": 32, "positions": [300]},
    f"{_STEP}:measure": _TINY,
    f"{_TEACHER}:speed": _TINY,
    f"{_TEACHER}:vllm": _TINY,
    f"{_TEACHER}:exactness": {"shape": "tiny", "layers": 1},
    f"{_ROLLOUTS}:transformers": {"shape": "tiny", "prompts": 3, "new_tokens": 4},
    f"{_ROLLOUTS}:vllm": {"shape": "tiny", "prompts": 3, "new_tokens": 4},
    f"{_ROLLOUTS}:vllm_asleep": {"shape": "tiny", "prompts": 3, "new_tokens": 4},
}


def quick(parts: Sequence[Part], device: str) -> list[Part]:
    """Return the parts with tiny sizes, each that then differs from all others once.

    On a CPU the loss leaves out what Triton compiles, as its interpreter is slow; the part "kernel"
    has ours.
    """
    small: dict[str, Part] = {}
    for part in parts:
        arguments = {**part.arguments, **QUICK[part.function]}
        if part.function == f"{_LOSS}:measure" and device == "cpu":
            arguments["triton"] = False
        what = json.dumps([part.function, arguments])
        small.setdefault(what, replace(part, limit=180.0, arguments=arguments))
    return list(small.values())


def content_key(part: Part, device: str, machine: Mapping[str, Any], sources: str) -> str:
    """Return the name of a result: equal names are of the same measurement by the same code."""
    what = [part.name, part.function, dict(part.arguments), device, dict(machine), sources]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def hash_of_sources() -> str:
    """Return the hash of all code that a part may run."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def describe_machine(device: str) -> dict[str, Any]:
    """Return the card's name and memory, and the versions of what is installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    facts: dict[str, Any] = {"device": device, "python": sys.version.split()[0], **versions}
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name, "memory GB": round(properties.total_memory / 1e9, 1),
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
        }  # fmt: skip
    return facts


def work(parent: Connection, function: str, device: str, arguments: Mapping[str, Any]) -> None:
    """Run a part in this process, a child; send each of its rows, and then its status."""
    with contextlib.suppress(PermissionError):
        os.setsid()  # so that all that the part starts is ended with it
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    module, _, name = function.partition(":")
    try:
        part = getattr(import_module(module), name)
    except ImportError as error:
        parent.send(("status", f"{LEFT_OUT}: {error}"))
        return
    try:
        for row in part(device, **arguments):
            parent.send(("row", row))
        status = DONE
    except NotHereError as error:
        status = f"{LEFT_OUT}: {error}"
    except ImportError as error:
        status = f"{LEFT_OUT}: {str(error).splitlines()[0]}"
    except Exception as error:  # a part may fail as it likes; the others go on
        told = str(error).strip().splitlines() or [""]
        status = f"failed: {type(error).__name__}: {told[0][:300]}"
    parent.send(("status", status))


def run_part(part: Part, device: str, limit: float) -> Result:
    """Run a part in a process of its own for ``limit`` seconds at most."""
    began = time.monotonic()
    result = Result(part.name, "")
    with Worker(work, part.function, device, dict(part.arguments)) as worker:
        try:
            while not result.status:
                left = limit - (time.monotonic() - began)
                if left <= 0 or not worker.pipe.poll(left):
                    result.status = f"ended after {limit:.0f} s"
                    break
                kind, value = worker.receive()
                if kind == "row":
                    result.rows.append(value)
                else:
                    result.status = value
        except RuntimeError as error:  # the process ended
            result.status = f"failed: {error}"
        finally:
            _kill(worker.process.pid)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _kill(process: int | None) -> None:
    """End a process and all that it started."""
    if process is None:
        return
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def run(
    parts: Sequence[Part], device: str, *, file: Path, minutes: float, fresh: bool
) -> tuple[dict[str, Any], list[Result]]:
    """Run the parts that ``file`` does not have yet, and keep each there at once.

    Returns:
        What is known of the machine, and a result for each part.
    """
    machine, sources = describe_machine(device), hash_of_sources()
    kept: dict[str, Any] = {}
    if file.exists() and not fresh:
        kept = json.loads(file.read_text())["parts"]
    ends = time.monotonic() + 60 * minutes
    lock = threading.Lock()

    def one(part: Part) -> Result:
        key = content_key(part, device, machine, sources)
        left = ends - time.monotonic()
        if key in kept and kept[key]["status"] == DONE:
            return Result(**kept[key])
        if part.needs_gpu and device == "cpu":
            return Result(part.name, f"{LEFT_OUT}: needs a GPU")
        if left < min(LEAST_SECONDS, part.limit):
            return Result(part.name, NO_TIME)
        result = run_part(part, device, min(part.limit, left))
        with lock:
            kept[key] = asdict(result)
            _write(file, {"machine": machine, "parts": kept})
            sys.stderr.write(f"{part.name}: {result.status}, {result.seconds:.0f} s\n")
        return result

    if device == "cuda":
        return machine, [one(part) for part in parts]
    with ThreadPoolExecutor(2) as pool:  # nobody reads the times of a CPU
        return machine, list(pool.map(one, parts))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(file)


def tables(results: Sequence[Result]) -> list[str]:
    """Return a table for each part that has rows."""
    found = []
    for result in results:
        if not result.rows:
            continue
        columns = list(dict.fromkeys(name for row in result.rows for name in row))
        rows = [[_cell(row.get(name)) for name in columns] for row in result.rows]
        found.append(f"{result.name}\n\n{format_table(columns, rows)}")
    return found


def _cell(value: Figure) -> Cell:
    if value is None:
        return "–"
    return f"{value:.2g}" if isinstance(value, float) and 0 < abs(value) < 5e-4 else value


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Return the summary: how many parts are done, and how ours does against the aims."""
    rows = [row for result in results for row in result.rows]
    ours = [row for row in rows if row.get("method") == "ours, Triton" and "× matmuls" in row]
    summary: dict[str, Figure] = {
        "benchmark": "gpu",
        "done": sum(result.status == DONE for result in results),
        "parts": len(results),
        "failed": sum(result.status.startswith("failed") for result in results),
    }
    if ours:
        summary["worst × matmuls"] = max(float(row["× matmuls"] or 0) for row in ours)
    liger = {
        row["case"]: row for row in rows if row.get("method") == "Liger" and "× matmuls" in row
    }
    against = [(row, liger[row["case"]]) for row in ours if row["case"] in liger]
    for name, column in (("time", "ms"), ("memory", "peak MiB")):
        shares = [
            float(one[column] or 0) / float(other[column] or 1)
            for one, other in against
            if one.get(column) is not None
        ]
        if shares:
            summary[f"worst {name} / Liger"] = round(max(shares), 3)
    teacher = [float(row["of the bare"] or 0) for row in rows if "of the bare" in row]
    if teacher:
        summary["teacher, of the bare forward pass"] = min(teacher)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print tables, the aims and one line of JSON; fail if a part failed.

    Raises:
        SystemExit: a part failed, or there is no such part or device.
    """
    parser = argument_parser(__doc__, quick="tiny sizes: that every part runs at all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts; default 8")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check.json"))
    parser.add_argument("--fresh", action="store_true", help="measure what the file has, too")
    parser.add_argument("--parts", nargs="*", metavar="NAME", help="some parts; default all")
    arguments = parser.parse_args(argv)
    chosen = _chosen(parser, arguments)
    machine, results = run(
        chosen, arguments.device, file=arguments.output, minutes=arguments.minutes,
        fresh=arguments.fresh,
    )  # fmt: skip
    sys.stdout.write("\n\n".join(tables(results)) + "\n\n")
    print_report(
        f"GPU check on {machine['device']}, torch {machine['torch']}: {arguments.output}",
        ["part", "status", "seconds"],
        [[result.name, result.status, result.seconds] for result in results],
        figures(results),
        notes=NOTES,
    )
    if any(result.status.startswith("failed") for result in results):
        raise SystemExit(1)


def _chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Part]:
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here; use --device cpu --quick to try the parts")
    elif not arguments.quick:
        parser.error("--device cpu needs --quick: the sizes are a GPU's")
    names = [part.name for part in PARTS]
    for name in arguments.parts or ():
        if name not in names:
            parser.error(f"--parts {name!r}: the parts are {', '.join(map(repr, names))}")
    chosen = [part for part in PARTS if not arguments.parts or part.name in arguments.parts]
    return quick(chosen, arguments.device) if arguments.quick else chosen


if __name__ == "__main__":
    main()

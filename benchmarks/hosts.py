"""A run whose parts stand on five hosts, and what becomes of it where hosts and cables fail.

Two rollout servers, a teacher and two FSDP2 ranks are processes in network namespaces of this
machine: each has an address and a name of its own, and reaches the others through a switch. First
one process trains alone, then the two ranks; their losses are compared. Then the ranks train again
while this program kills servers, ranks and the teacher, freezes servers and unplugs cables, at
moments that a seed chooses. What dies is started again, the run with --resume_from_checkpoint auto.
The weights at the end are compared with those of the undisturbed run, to the last bit.

    python -m benchmarks.hosts --quick
    python -m benchmarks.hosts [--seeds 0 1 2] [--output docs/results/hosts.json]

It needs root, `ip` of iproute2, vLLM, and 8 GB of memory.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_report
from benchmarks.hosts_parts import RANKS, Hosts, Plan, Run, disturb, losses, plan
from tests.support.models import save_model, save_tokenizer
from tests.support.namespaces import network
from tests.support.weights import different_weights
from tests.support.world import make_world

STEPS = 30
NOTES = (
    "resumed: how often the run had to be started again.",
    "lost: how often a rank gave up a rollout server that wrote.",
    "repeated: transfers of weights that failed and were repeated.",
    "equal: the weights at the end are those of the undisturbed run, to the last bit.",
)


@dataclass(frozen=True)
class Disturbed:
    """The outcome of a disturbed run.

    Attributes:
        faults: what was done to it, in order, with the step and host.
        resumed: how often it was started again.
        codes: of the launchers, each time that it ended before.
        lost: how often a rank gave up a rollout server.
        repeated: how often a transfer of weights failed and was repeated.
        equal: its weights are those of the undisturbed run.
    """

    seed: int
    staleness: int
    faults: list[dict[str, Any]]
    resumed: int
    codes: list[list[int]]
    lost: int
    repeated: int
    seconds: float
    equal: bool


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """Yield five hosts with a teacher and two rollout servers that answer."""
    world = make_world(folder / "world")
    student = folder / "student"
    save_tokenizer(student)
    save_model(student, head_dim=32, hidden_size=16, seed=1)  # vLLM has no smaller heads
    with network(5) as nodes, contextlib.closing(Hosts(nodes, world, student, folder)) as five:
        five.start(*five.servers)
        five.wait_until_ready(*five.servers)
        yield five


def relative_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two rows of losses, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def disturbed(five: Hosts, chosen: Plan, steps: int, staleness: int, whole: Path) -> Disturbed:
    """Train while the faults of a plan happen, and compare with the undisturbed run."""
    output = five.folder / f"disturbed-{chosen.seed}"
    began = time.monotonic()
    run = Run(five, output, steps=steps, staleness=staleness)
    happened = disturb(run, chosen)
    return Disturbed(
        chosen.seed, staleness, [asdict(one) for one in happened], run.resumed, run.codes,
        run.said(" is lost: ", *RANKS),
        run.said("weights did not reach all rollout servers", RANKS[0]),
        round(time.monotonic() - began, 1), not different_weights(whole, output),
    )  # fmt: skip


def measure(
    folder: Path, seeds: Sequence[int], steps: int, faults: int | None
) -> Iterator[dict[str, Any]]:
    """Yield what is found, after each disturbed run: losses, and what became of the run."""
    found: dict[str, Any] = {"steps": steps, "losses": {}, "difference": 0.0, "runs": []}
    with hosts(folder) as five:
        for staleness in sorted({seed % 2 for seed in seeds}):
            one, two = folder / f"one-{staleness}", folder / f"two-{staleness}"
            Run(five, one, steps=steps, staleness=staleness, ranks=1).finish()
            Run(five, two, steps=steps, staleness=staleness).finish()
            found["losses"][str(staleness)] = {"one": losses(one), "two": losses(two)}
            difference = relative_difference(losses(one), losses(two))
            found["difference"] = max(found["difference"], difference)
            print(f"staleness {staleness}: losses differ by {difference:.1e}", file=sys.stderr)
            for seed in (one for one in seeds if one % 2 == staleness):
                chosen = plan(seed, steps, faults)
                found["runs"].append(asdict(disturbed(five, chosen, steps, staleness, two)))
                print(json.dumps(found["runs"][-1]), file=sys.stderr, flush=True)
                yield found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__, quick="one seed with three faults, over 8 steps")
    odd = "of disturbed runs; odd ones train with --rollout_staleness 1"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=odd)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--folder", type=Path, help="keep logs and models here")
    options = parser.parse_args(argv)
    seeds, steps, faults = options.seeds, STEPS, None
    if options.quick:
        seeds, steps, faults = seeds[:1], 8, 3
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for found in measure(options.folder or Path(temporary), seeds, steps, faults):
                if options.output is not None:
                    text = json.dumps({**found, "quick": options.quick}, indent=1)
                    options.output.write_text(text + "\n")
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"network namespaces are not permitted here: {error}")
    rows = [
        (f"seed {run['seed']}", run["staleness"], len(run["faults"]), run["resumed"], run["lost"],
         run["repeated"], run["seconds"], "yes" if run["equal"] else "NO")
        for run in found["runs"]
    ]  # fmt: skip
    print_report(
        f"{steps} steps on five hosts",
        ("run", "staleness", "faults", "resumed", "lost", "repeated", "seconds", "equal"), rows,
        {"difference": found["difference"], "equal": all(run["equal"] for run in found["runs"])},
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()

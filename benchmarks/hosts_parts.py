"""The parts of `benchmarks.hosts`: hosts and their processes, a run on them, and its faults."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tests.support.namespaces import Node
from tests.support.world import World

ROLLOUT_TIMEOUT, TEACHER_TIMEOUT = 8, 40  # seconds, of the run's flags
SHORT, LONG = 2.0, ROLLOUT_TIMEOUT + 6.0  # seconds of a freeze or of an unplugged cable
_PATIENCE = 300.0
_RESUMED = 20  # times at most
_FSDP2 = Path(__file__).parents[1] / "examples" / "accelerate" / "fsdp2.yaml"
# Asks a server from its own host until the answer matches, at most so many seconds.
_WATCH = """
import re, sys, time, urllib.request
url, text, end = sys.argv[1], sys.argv[2], time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            if re.search(text, answer.read().decode()):
                sys.exit(0)
    except OSError:
        time.sleep(0.2)
    time.sleep(0.002)
sys.exit(1)
"""
_TAKES_WEIGHTS = ("is_paused", '"is_paused": *true')
_WRITES = ("metrics", "vllm:num_requests_running{[^}]*} [1-9]")


@dataclass(frozen=True)
class Fault:
    """Something that happens to a host.

    Attributes:
        step: the run has logged so many steps before; of a fault that has happened, how many it
            had logged at that moment.
        what: a key of `_FAULTS`.
        host: "teacher", "rollout-0", "rollout-1", "rank-0" or "rank-1".
        delay: seconds after the step.
    """

    step: int
    what: str
    host: str
    delay: float


@dataclass(frozen=True)
class Plan:
    """The faults of a run, in the order of their steps."""

    seed: int
    faults: tuple[Fault, ...]


SERVERS, RANKS = ("rollout-0", "rollout-1"), ("rank-0", "rank-1")
# What happens, and to which hosts.
_FAULTS = {
    "killed": (*SERVERS, *RANKS, "teacher"),
    "killed, and away until the run ends": ("teacher",),
    "frozen": SERVERS,
    "frozen for long": SERVERS,
    "unplugged": (*SERVERS, *RANKS, "teacher"),
    "unplugged while it writes": SERVERS,
    "unplugged while it takes weights": SERVERS,
    "unplugged for long while it writes": SERVERS,
    "unplugged for long while it takes weights": SERVERS,
}
_CERTAIN = (("killed", SERVERS), ("killed", RANKS), ("killed", ("teacher",)))


def plan(seed: int, steps: int, faults: int | None) -> Plan:
    """Return faults at steps that the seed chooses.

    A server, a rank and the teacher are killed in each plan.

    Args:
        faults: their number; None for one in five steps.
    """
    rng = random.Random(seed)
    count = max(len(_CERTAIN), steps // 5) if faults is None else faults
    chosen = [(what, rng.choice(hosts)) for what, hosts in _CERTAIN[:count]]
    others = [what for what in _FAULTS if what != "killed"]
    for what in rng.sample(others, count - len(chosen)):
        chosen.append((what, rng.choice(_FAULTS[what])))
    rng.shuffle(chosen)
    at = sorted(rng.sample(range(1, 3 * steps // 4), count))
    return Plan(
        seed,
        tuple(
            Fault(step, what, host, round(rng.uniform(0, 0.5), 3))
            for step, (what, host) in zip(at, chosen, strict=True)
        ),
    )


class Hosts:
    """Five hosts, and the servers on three of them.

    Attributes:
        nodes: {name: host}.
        servers: the names of the hosts that have a server.
    """

    servers = (*SERVERS, "teacher")

    def __init__(self, nodes: Sequence[Node], world: World, student: Path, folder: Path) -> None:
        self.nodes = dict(zip((*self.servers, *RANKS), nodes, strict=True))
        self.world, self.student, self.folder = world, student, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def url(self, name: str) -> str:
        """Return the address of a server."""
        return f"http://{self.nodes[name].address}:{8000 if name == 'teacher' else 8001}"

    def start(self, *names: str) -> None:
        """Start the servers of these hosts, and wait for nothing."""
        for name in names:
            if name == "teacher":
                argv = [
                    "-m", "teacher_server", "serve", str(self.world.teacher), "--host", "0.0.0.0",
                    "--port", "8000", "--backend", "transformers", "--allow-unauthenticated",
                    "--max-batch-tokens", "1",  # in company a sequence is rounded otherwise
                ]  # fmt: skip
            else:  # what `vllm serve` runs; in the CPU build that command finds no package
                argv = [
                    "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.student),
                    "--host", "0.0.0.0", "--port", "8001", "--tokens-only",
                    "--dtype", "float32", "--enforce-eager",
                    "--max-model-len", "256", "--weight-transfer-config", '{"backend": "gloo"}',
                    "--worker-extension-cls", "shared.vllm_sampling.SeededSampling",
                ]  # fmt: skip
            self._processes[name] = self.launch(name, argv, self.folder / f"{name}.log")

    def launch(
        self, name: str, argv: Sequence[str], log: Path, **more: str
    ) -> subprocess.Popen[bytes]:
        """Start Python on a host; what it says is added to a log."""
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1",
            "VLLM_SERVER_DEV_MODE": "1", **more,
        }  # fmt: skip
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.nodes[name].launcher, sys.executable, *argv],
                env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_until_ready(self, *names: str) -> None:
        """Wait until these servers answer.

        Raises:
            RuntimeError: one does not.
        """
        for name in names:
            route = "ready" if name == "teacher" else "health"
            if not self.saw(name, route, "", _PATIENCE):
                raise RuntimeError(f"{name} is not ready: see {self.folder / name}.log")

    def saw(self, name: str, route: str, text: str, seconds: float) -> bool:
        """Return whether a server answers a text within a time; asks from its own host."""
        url = f"{self.url(name)}/{route}"
        watch = [sys.executable, "-S", "-c", _WATCH, url, text, str(seconds)]
        return subprocess.run([*self.nodes[name].launcher, *watch], check=False).returncode == 0

    def alive(self, name: str) -> bool:
        """Return whether a server runs and answers."""
        return self._processes[name].poll() is None and self.saw(name, "health", "", 2)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a server and to all processes that it started."""
        signal_all(self._processes[name].pid, number)
        if number == signal.SIGKILL:
            self._processes[name].wait()

    def close(self) -> None:
        """Kill all servers."""
        for name in self._processes:
            self.signal(name, signal.SIGKILL)


def signal_all(pid: int, number: int) -> None:
    """Send a signal to a process and to all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Run:
    """A run on the hosts ``rank-0`` and ``rank-1``, or on the first alone.

    Attributes:
        resumed: how often it was started again.
        codes: exit codes of its launchers each time that it ended before its last step.
    """

    def __init__(
        self, hosts: Hosts, output: Path, *, steps: int, staleness: int, ranks: int = 2
    ) -> None:
        self.hosts, self.output, self.steps = hosts, output, steps
        self._staleness, self._ranks = staleness, ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        self.resumed = -1
        self.codes: list[list[int]] = []

    def start(self) -> None:
        """Start all ranks; they go on where the last checkpoint is."""
        self.resumed += 1
        first = self.hosts.nodes[RANKS[0]].address
        options = {
            "model_name_or_path": self.hosts.student, "dataset_name": self.hosts.world.rows,
            "teacher_url": self.hosts.url("teacher"), "teacher_timeout": TEACHER_TIMEOUT,
            "rollout_timeout": ROLLOUT_TIMEOUT, "rollout_staleness": self._staleness,
            "lmbda": 1, "beta": 0, "top_k_logprobs": 16, "max_new_tokens": 24,
            "per_device_train_batch_size": 8 // self._ranks, "learning_rate": 1e-2,
            "max_steps": self.steps, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
            "output_dir": self.output, "resume_from_checkpoint": "auto",
            "report_to": "none", "disable_tqdm": "true",
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in options.items()]
        flags += ["--rollout_url", *(self.hosts.url(name) for name in SERVERS)]
        launchers = [
            (f"--config_file={_FSDP2}", "--num_machines=2", "--num_processes=2",
             f"--main_process_ip={first}", f"--machine_rank={rank}")
            for rank in range(2)
        ] if self._ranks == 2 else [("--cpu", "--num_processes=1")]  # fmt: skip
        self.output.mkdir(exist_ok=True)
        self._processes = [
            self.hosts.launch(
                name,
                ["-m", "accelerate.commands.launch", *launcher, "-m", "student_trainer", "distill",
                 *flags],
                self.output / f"{name}.log",
                GLOO_SOCKET_IFNAME="eth0",
            )
            for name, launcher in zip(RANKS, launchers, strict=False)
        ]  # fmt: skip

    def kill(self, name: str) -> None:
        """Kill a rank, but not its launcher."""
        launcher = psutil.Process(self._processes[RANKS.index(name)].pid)
        for rank in launcher.children(recursive=True):
            rank.kill()

    def wait(self) -> list[int]:
        """Return the exit codes of the launchers, once all have ended."""
        end = time.monotonic() + _PATIENCE
        try:
            return [one.wait(max(0.1, end - time.monotonic())) for one in self._processes]
        finally:
            for one in self._processes:
                signal_all(one.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Run to the last step.

        Raises:
            RuntimeError: it fails.
        """
        if not self._processes:
            self.start()
        codes = self.wait()
        if any(codes):
            raise RuntimeError(f"the run ended with {codes}: see the logs in {self.output}")

    def running(self) -> bool:
        """Return whether no launcher has ended."""
        return all(one.poll() is None for one in self._processes)

    def resume(self) -> None:
        """Wait until all processes have ended, and start again."""
        self.codes.append(self.wait())
        self.start()

    def reach(self, step: int) -> bool:
        """Return whether a step is logged before the end; where the run fails, start it again.

        Raises:
            RuntimeError: it does not get there.
        """
        end = time.monotonic() + _PATIENCE
        while last_step(self.output) < step:
            if not self.running():
                if not any(self.wait()):
                    return False
                self.resume()
            if time.monotonic() > end or self.resumed > _RESUMED:
                raise RuntimeError(f"the run does not reach step {step}: see {self.output}")
            time.sleep(0.01)
        return self.running()

    def said(self, text: str, *ranks: str) -> int:
        """Return how often the logs of ranks have a text."""
        return sum((self.output / f"{rank}.log").read_text().count(text) for rank in ranks)


def last_step(output: Path) -> int:
    """Return the last step that a run has logged."""
    live = output / "_log_history.jsonl"
    lines = live.read_text().splitlines() if live.exists() else []
    return max((int(json.loads(line).get("step", 0)) for line in lines[-3:]), default=0)


def losses(output: Path) -> list[float]:
    """Return a run's divergence at each step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["train/divergence"] for row in history if "train/divergence" in row]


def disturb(run: Run, chosen: Plan) -> list[Fault]:
    """Train to the end while faults happen; return those that did, as some may come too late."""
    run.start()
    happened = []
    for fault in chosen.faults:
        if fault.host in SERVERS:  # the other one has to answer meanwhile
            run.hosts.wait_until_ready(*SERVERS)
        if not run.reach(fault.step):
            continue
        time.sleep(fault.delay)
        if not _moment_comes(run.hosts, fault):
            continue
        now = replace(fault, step=last_step(run.output))
        if now.step >= run.steps:
            break
        print(f"seed {chosen.seed}: {now}", file=sys.stderr, flush=True)
        _happen(run, now)
        happened.append(now)
    while any(run.wait()):
        run.resume()
    return happened


def _moment_comes(hosts: Hosts, fault: Fault) -> bool:
    """Wait until a server does what a fault shall interrupt; return whether it does so."""
    if "while" not in fault.what:
        return True
    return hosts.saw(fault.host, *(_WRITES if "writes" in fault.what else _TAKES_WEIGHTS), 10)


def _happen(run: Run, fault: Fault) -> None:
    """Let a fault happen, and mend what it has broken."""
    hosts, node = run.hosts, run.hosts.nodes[fault.host]
    seconds = LONG if "for long" in fault.what else SHORT
    if fault.host in RANKS and fault.what == "killed":
        run.kill(fault.host)
        run.resume()
    elif fault.what == "killed":
        hosts.signal(fault.host, signal.SIGKILL)
        hosts.start(fault.host)
    elif fault.what.startswith("killed"):
        hosts.signal(fault.host, signal.SIGKILL)
        run.codes.append(run.wait())
        hosts.start(fault.host)
        hosts.wait_until_ready(fault.host)
        run.start()
    elif fault.what.startswith("frozen"):
        hosts.signal(fault.host, signal.SIGSTOP)
        time.sleep(seconds)
        hosts.signal(fault.host, signal.SIGCONT)
    else:
        node.unplug()
        time.sleep(seconds)
        node.plug_in()

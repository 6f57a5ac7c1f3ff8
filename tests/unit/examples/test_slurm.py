"""The batch scripts, run with stand-ins for Slurm and for our two commands."""

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from student_trainer.config.teachers import teachers_of
from tests.support.flags import flag_value, read_server, read_trainer, with_key
from tests.support.http import until

FOLDER = Path(__file__).parents[3] / "examples" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))

STAND_INS = {
    # Starts a task for each rank, and passes SIGTERM on.
    "srun": """
        shift
        trap 'kill -TERM $(jobs -p)' TERM
        for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
        for task in $(jobs -p); do wait $task || wait $task; done
    """,
    "scontrol": """
        if [ "$1" = requeue ]; then echo "$2" >>"$RUN/requeued"; else echo first; echo second; fi
    """,
    "student-trainer": """
        trap 'echo told >>"$RUN/told-$RANK"; sleep 0.2; exit 0' TERM
        printf '%s\\n' "$@" >"$RUN/words-$RANK"
        echo "$LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >"$RUN/ranks-$RANK"
        while [ -e "$RUN/training" ]; do sleep 0.05; done
    """,
    "teacher-server": """
        printf '%s\\n' "$@" >"$RUN/words"
        trap 'sleep 0.2; echo answered >"$RUN/told"; exit 0' TERM
        while [ -e "$RUN/serving" ]; do sleep 0.05; done
        exit 3
    """,
    "vllm": """
        printf '%s\\n' "$@" >"$RUN/vllm-words"
        echo "$VLLM_SERVER_DEV_MODE" "${VLLM_ALLOW_RUNTIME_LORA_UPDATING:-0}" >"$RUN/vllm-mode"
        trap 'exit 0' TERM
        while [ -e "$RUN/serving" ]; do sleep 0.05; done
        exit 3
    """,
}


@pytest.fixture
def start(tmp_path):
    """Starts a script as Slurm would."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}", "RUN": str(tmp_path), "TEACHER": "org/teacher",
        "STUDENT": "org/student", "DATASET": "data.jsonl", "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    processes = []

    def start(name, **more):
        line = ["bash", str(FOLDER / f"{name}.sbatch")]
        processes.append(subprocess.Popen(line, env={**environment, **more}))
        return processes[-1]

    yield start
    (tmp_path / "training").unlink(missing_ok=True)
    (tmp_path / "serving").unlink(missing_ok=True)
    for process in processes:
        process.kill()
        process.wait()


def words(file):
    return file.read_text().splitlines()


def teachers(folder, *urls):
    (folder / "teachers").mkdir()
    for number, url in enumerate(urls):
        (folder / "teachers" / f"{number}.url").write_text(f"{url}\n")


def test_each_task_is_a_rank_and_all_ask_every_teacher(start, tmp_path):
    urls = ["http://node3:8000", "http://node4:8000"]
    teachers(tmp_path, *urls)
    assert start("trainer", FLAGS="--use_peft --beta 0.1").wait(20) == 0
    for rank in ("0", "1"):
        assert words(tmp_path / f"ranks-{rank}") == [f"{rank} 2 first 29500"]
        *_, teacher, args = read_trainer(with_key(words(tmp_path / f"words-{rank}"), tmp_path))
        assert teacher.teacher_url == urls
        assert (args.beta, args.resume_from_checkpoint) == (0.1, "auto")
    assert not (tmp_path / "requeued").exists()


def test_before_its_time_is_over_a_run_is_saved_and_queued_again(start, tmp_path):
    (tmp_path / "training").touch()
    teachers(tmp_path, "http://node3:8000")
    job = start("trainer")
    until(lambda: all((tmp_path / f"ranks-{rank}").exists() for rank in (0, 1)))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert [words(tmp_path / f"told-{rank}") for rank in (0, 1)] == [["told"], ["told"]]
    assert words(tmp_path / "requeued") == ["7"]


def test_a_trainer_begins_when_there_is_a_teacher(start, tmp_path):
    job = start("trainer")
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(0.5)
    teachers(tmp_path, "http://node3:8000")
    assert job.wait(30) == 0


def test_a_replica_is_at_its_address_until_it_has_answered(start, tmp_path, monkeypatch):
    (tmp_path / "serving").touch()
    address = tmp_path / "teachers" / "1.url"
    job = start("teacher", FLAGS="--max-top-k 128", PORT="8123")
    until(lambda: (tmp_path / "words").exists() and address.exists())
    assert words(address) == [f"http://{socket.gethostname()}:8124"]  # 8123 is that of task 0
    settings = read_server(with_key(words(tmp_path / "words"), tmp_path), monkeypatch)
    assert (settings.model, settings.port, settings.max_top_k) == ("org/teacher", 8124, 128)
    assert settings.engine_flags == ("--tensor-parallel-size", "4")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert words(tmp_path / "told") == ["answered"]
    assert not address.exists()


@pytest.mark.parametrize(
    ("jobs", "found"),
    [
        (
            [("math", "0", "8000"), ("math", "1", "8000"), ("code", "0", "8010")],
            {"code": [8010], "math": [8000, 8001]},
        ),
        ([("math code", "0", "8000")], {"math": [8000], "code": [8000]}),
    ],
    ids=["replicas", "adapters"],
)
def test_several_teachers_are_found_under_their_names(start, tmp_path, jobs, found):
    (tmp_path / "serving").touch()
    wanted = sum(map(len, found.values()))
    trainer = start("trainer", WANTED=str(wanted))
    running = []
    for names, task, port in jobs:
        with pytest.raises(subprocess.TimeoutExpired):
            trainer.wait(0.2)  # for the others
        adapters = "--lora-modules math=math-lora code=code-lora" if " " in names else ""
        more = {"NAMES": names, "PORT": port, "SLURM_ARRAY_TASK_ID": task, "FLAGS": adapters}
        running.append(start("teacher", **more))
    assert trainer.wait(30) == 0
    *_, teacher, _ = read_trainer(with_key(words(tmp_path / "words-0"), tmp_path))
    host = socket.gethostname()
    assert [(one.name, list(one.urls)) for one in teachers_of(teacher.teacher_url)] == [
        (name, [f"http://{host}:{port}" for port in ports]) for name, ports in found.items()
    ]
    for job in running:
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 0
    assert not list((tmp_path / "teachers").iterdir())


def test_a_trainer_gives_weights_to_the_rollout_servers_that_it_waits_for(start, tmp_path):
    (tmp_path / "serving").touch()
    teachers(tmp_path, "http://node3:8000")
    trainer = start("trainer", ROLLOUTS="1")
    with pytest.raises(subprocess.TimeoutExpired):
        trainer.wait(0.5)
    server = start("rollout", FLAGS="--max-model-len 4096")
    assert trainer.wait(30) == 0
    parts = read_trainer(with_key(words(tmp_path / "words-1"), tmp_path))
    address = f"http://{socket.gethostname()}:8101"  # 8100 is that of task 0
    assert flag_value(parts, "rollout_url") == [address]
    until((tmp_path / "vllm-mode").exists)
    assert words(tmp_path / "vllm-mode") == ["1 0"]
    assert "--enable-lora" not in words(tmp_path / "vllm-words")
    serve, model, *flags = words(tmp_path / "vllm-words")
    assert (serve, model) == ("serve", "org/student")
    given = dict(zip(flags, [*flags[1:], ""], strict=True))
    assert "--tokens-only" in given
    assert json.loads(given["--weight-transfer-config"]) == {"backend": "nccl"}
    assert [given[f"--{name}"] for name in ("port", "tensor-parallel-size", "max-model-len")] == [
        "8101", "4", "4096",
    ]  # fmt: skip
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert not list((tmp_path / "rollouts").iterdir())


def test_rollout_servers_take_adapters_alone_where_a_rank_is_given(start, tmp_path):
    assert start("rollout", LORA_RANK="16", FLAGS="--max-model-len 4096").wait(20) == 3
    assert words(tmp_path / "vllm-mode") == ["1 1"]
    assert words(tmp_path / "vllm-words")[-7:] == [
        "--enable-lora", "--max-lora-rank", "16",
        "--worker-extension-cls", "shared.vllm_adapters.ReceivedAdapters",
        "--max-model-len", "4096",
    ]  # fmt: skip


def test_without_rollout_servers_the_trainer_has_no_flag_of_theirs(start, tmp_path):
    teachers(tmp_path, "http://node3:8000")
    assert start("trainer").wait(30) == 0
    assert "--rollout_url" not in words(tmp_path / "words-0")


def test_a_teacher_that_fails_leaves_no_address(start, tmp_path):
    assert start("teacher").wait(20) == 3
    assert not list((tmp_path / "teachers").iterdir())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_job_ends_in_time_for_what_it_has_begun(script):
    """Slurm's own signal, to the script alone, and early enough."""
    (line,) = [line for line in script.read_text().splitlines() if "--signal" in line]
    seconds = int(line.rpartition("@")[2])
    assert line.startswith("#SBATCH --signal=B:")
    assert seconds >= 60

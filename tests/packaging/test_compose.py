"""docker-compose.yml, as far as it can be judged without Docker; both of its versions read it."""

import json
import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from student_trainer.commands import main as student_trainer
from student_trainer.config.teachers import ServedTeacher, teachers_of
from teacher_server import cli as teacher_server
from tests.support.flags import flag_value, read_server, read_trainer

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
OURS = ["teacher", "trainer", "teacher-gpu", "trainer-gpu"]
NAMED = ["teacher-math", "teacher-math-replica", "teacher-code", "teacher-adapters"]
OF_NAMED = ["trainer-of-teachers", "trainer-of-adapters"]
WITH_ROLLOUTS = ["teacher-beside-rollouts", "rollouts", "trainer-with-rollouts"]
ALL = [*OURS, *NAMED, *OF_NAMED, *WITH_ROLLOUTS]


def parsed(**settings):
    """The file with ``settings``, and its own defaults for the others."""
    text = VARIABLE.sub(lambda found: settings.get(*found.groups()), COMPOSE.read_text())
    assert "${" not in text
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def services():
    return parsed()["services"]


def cards(service):
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    return device["device_ids"]


def test_the_example_of_settings_has_each_that_is_read_with_its_default():
    read = dict(VARIABLE.findall(COMPOSE.read_text()))
    example = re.findall(r"^#([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in example) == sorted(read)
    defaults = {name: default for name, default in read.items() if default}
    assert {name: value for name, value in example if name in defaults} == defaults


def test_without_a_setting_a_gpu_is_neither_needed_nor_asked_for(services):
    for name in OURS:
        assert services[name].get("profiles") == (["gpu"] if name.endswith("-gpu") else None)
        assert ("deploy" in services[name]) == name.endswith("-gpu")


@pytest.mark.parametrize("name", OURS)
def test_a_trainer_waits_for_a_teacher_that_tells_when_it_is_ready(services, name):
    if name.startswith("teacher"):
        *command, script = services[name]["healthcheck"]["test"]
        assert command == ["CMD", "as-owner", "python", "-c"]
        assert "http://127.0.0.1:8000/ready" in script
    else:
        teacher = name.replace("trainer", "teacher")
        assert services[name]["depends_on"] == {teacher: {"condition": "service_healthy"}}
        assert f"--teacher_url http://{teacher}:8000" in services[name]["command"]


@pytest.mark.parametrize("name", ALL)
def test_a_container_has_few_rights_and_writes_to_its_mounts_alone(services, name):
    service = services[name]
    assert service["read_only"]
    assert service["tmpfs"] == "/tmp:exec"  # Triton loads what it compiles there
    assert service["cap_drop"] == ["ALL"]
    assert service["init"]  # needs KILL to pass signals on to another user
    assert sorted(service["cap_add"]) == ["CHOWN", "KILL", "SETGID", "SETUID"]
    # The entry point, which gives up root (test_container.py), is not gone round.
    assert not {"user", "entrypoint", "privileged", "network_mode", "pid"} & set(service)
    assert re.search(
        r"^ENTRYPOINT \[\"as-owner\"\]$", (ROOT / "docker/Dockerfile").read_text(), re.M
    )
    assert [mount.rpartition(":")[2] for mount in service["volumes"]] == ["/runs", "/cache"]


@pytest.mark.parametrize("name", ALL)
def test_what_crashes_is_started_again_but_not_for_ever(services, name):
    assert re.fullmatch(r"on-failure:\d+", services[name]["restart"])


@pytest.mark.parametrize("profile", ["", "-gpu"])
def test_an_image_is_built_once_and_never_looked_for_elsewhere(services, profile):
    teacher, trainer = services[f"teacher{profile}"], services[f"trainer{profile}"]
    assert teacher["image"] == trainer["image"]
    assert "build" in teacher
    assert "build" not in trainer
    assert trainer["pull_policy"] == "never"


def test_teacher_and_student_have_cards_of_their_own(services):
    assert cards(services["teacher-gpu"]) == ["0"]
    assert cards(services["trainer-gpu"]) == ["1"]
    given = parsed(TEACHER_GPUS="2,3", STUDENT_GPUS="0,1")["services"]
    # Docker joins the list by commas, so that one entry may name several cards.
    assert cards(given["teacher-gpu"]) == ["2,3"]
    assert cards(given["trainer-gpu"]) == ["0,1"]


def test_a_published_teacher_without_a_key_says_what_is_missing(services, monkeypatch, capsys):
    service = services["teacher-gpu"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    monkeypatch.setenv("TEACHER_API_KEYS", service["environment"]["TEACHER_API_KEYS"] or "")
    program, *words = shlex.split(service["command"])
    assert program == "teacher-server"
    assert teacher_server.main(words) == 2
    assert "TEACHER_API_KEYS" in capsys.readouterr().err


def test_both_sides_get_the_same_key():
    given = parsed(TEACHER_API_KEY="k" * 40)["services"]
    assert given["teacher-gpu"]["environment"]["TEACHER_API_KEYS"] == "k" * 40
    assert given["trainer-gpu"]["environment"]["TEACHER_API_KEY"] == "k" * 40


def test_an_unpublished_teacher_needs_none(services):
    assert "ports" not in services["teacher"]
    assert "--allow-unauthenticated" in services["teacher"]["command"]


def test_the_trainers_flags_are_right_up_to_data_that_is_not_there(tmp_path, capsys):
    missing = tmp_path / "train.jsonl"
    service = parsed(DATASET=str(missing), STUDENT_PROCESSES="2")["services"]["trainer-gpu"]
    launcher, _, command = service["command"].partition(" -m student_trainer ")
    assert launcher == "python -m torch.distributed.run --nproc_per_node 2 --shutdown_timeout 600"
    assert service["stop_grace_period"] == "11m"  # in which that timeout ends
    words = command.replace("/runs/", f"{tmp_path}/")
    assert student_trainer.main(shlex.split(words)) == 2
    assert f"{missing}: no such file or folder" in capsys.readouterr().err


def flags_of_trainer(service, tmp_path):
    """Return the flags that its trainer reads, up to data that is not there."""
    launcher, *words = shlex.split(service["command"])
    assert launcher == "student-trainer"
    words = [word.replace("/runs/", f"{tmp_path}/") for word in words]
    return words, read_trainer([word for word in words if word not in ("--bf16",)])[6]


@pytest.mark.parametrize(
    ("profile", "named"),
    [
        ("teachers", {"math": ["teacher-math", "teacher-math-replica"], "code": ["teacher-code"]}),
        ("adapters", {"math": ["teacher-adapters"], "code": ["teacher-adapters"]}),
    ],
)
def test_a_profile_of_several_teachers_names_those_that_it_serves(
    services, tmp_path, monkeypatch, profile, named
):
    own = {name: one for name, one in services.items() if one.get("profiles") == [profile]}
    trainer = services[f"trainer-of-{profile}"]
    served = {name for name in own if name.startswith("teacher")}
    _, teacher = flags_of_trainer(trainer, tmp_path)
    assert teachers_of(teacher.teacher_url) == [
        ServedTeacher(name, tuple(f"http://{host}:8000" for host in hosts), None)
        for name, hosts in named.items()
    ]
    assert served == {host for hosts in named.values() for host in hosts}
    assert trainer["depends_on"] == {name: {"condition": "service_healthy"} for name in served}
    monkeypatch.delenv("TEACHER_API_KEYS", raising=False)
    for name in sorted(served):
        adapters = tmp_path / name
        command = own[name]["command"].replace("/runs/", f"{adapters}/")
        for adapter in re.findall(rf"={adapters}/(\S+)", command):
            lora_folder(adapters / adapter)
        program, *words = shlex.split(command)
        assert program == "teacher-server"
        settings = read_server(words, monkeypatch)
        assert "TEACHER_API_KEYS" not in own[name]["environment"]  # refused beside the flag
        assert settings.allow_unauthenticated
        assert (settings.host, settings.port, "ports" in own[name]) == ("0.0.0.0", 8000, False)
        if profile == "adapters":
            assert {module.name for module in settings.adapters} == set(named)
    # Replicas are of one model, and each container has a card of its own.
    for hosts in named.values():
        assert len({services[host]["command"] for host in hosts}) == 1
    assert len({tuple(cards(one)) for one in own.values()}) == len(own)
    # One of a profile builds the image, which the others use.
    assert sum("build" in one for one in own.values()) == 1
    assert {one["image"] for one in own.values()} == {"sparse-gkd:gpu"}
    assert all("build" in one or one["pull_policy"] == "never" for one in own.values())


def test_the_trainer_sends_weights_to_the_server_of_its_own_student(services, tmp_path):
    command = services["trainer-with-rollouts"]["command"].replace("/runs/", f"{tmp_path}/")
    words = shlex.split(command.partition(" -m student_trainer ")[2])
    flags = partial(flag_value, read_trainer([word for word in words if word != "--bf16"]))
    assert flags("teacher_url") == ["http://teacher-beside-rollouts:8000"]
    assert flags("rollout_url") == ["http://rollouts:8001"]
    server = services["rollouts"]
    assert server["environment"]["VLLM_SERVER_DEV_MODE"] == "1"
    served = shlex.split(server["command"])
    assert served[:3] == ["vllm", "serve", flags("model_name_or_path")]
    assert served[served.index("--port") + 1] == "8001"
    assert "--tokens-only" in served
    assert json.loads(served[served.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert "http://127.0.0.1:8001/health" in server["healthcheck"]["test"][-1]
    assert services["trainer-with-rollouts"]["depends_on"] == {
        name: {"condition": "service_healthy"} for name in WITH_ROLLOUTS[:2]
    }


@pytest.mark.parametrize("rank", [None, "64"], ids=["merged", "adapters"])
def test_the_server_takes_adapters_alone_where_a_rank_is_given(rank):
    added = ["--enable-lora", "--max-lora-rank", rank] if rank else []
    server = parsed(ROLLOUT_FLAGS=" ".join(added))["services"]["rollouts"]
    assert server["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    served = shlex.split(server["command"])
    extension = served.index("--worker-extension-cls")
    assert served[extension + 1 :] == ["shared.vllm_adapters.ReceivedAdapters", *added]
    assert "/tmp:exec" in server["tmpfs"]  # where it writes them


def test_the_routes_that_take_weights_are_reached_by_their_profile_alone(services):
    for name, service in services.items():
        assert service.get("networks") == (["rollouts"] if name in WITH_ROLLOUTS else None)
    for name in WITH_ROLLOUTS:
        assert services[name]["profiles"] == ["rollouts"]
        assert "ports" not in services[name]
    assert [cards(services[name]) for name in WITH_ROLLOUTS] == [["0"], ["2"], ["1"]]
    assert ["build" in services[name] for name in WITH_ROLLOUTS] == [True, False, False]


def lora_folder(folder):
    """A folder that looks like an adapter, as far as flags are checked."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()


@pytest.mark.parametrize("compose", ["docker compose", "docker-compose"])
def test_compose_reads_the_file(compose, tmp_path):
    words = compose.split()
    if (
        shutil.which(words[0]) is None
        or subprocess.run([*words, "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"{compose} is not installed")
    shown = subprocess.run(
        [
            *words, "--file", COMPOSE, "--profile", "gpu", "--profile", "teachers",
            "--profile", "adapters", "--profile", "rollouts", "config", "--services",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(ALL) <= set(shown.stdout.split())

"""The overlays with several teachers agree with what they change, and with the flags."""

import re

import pytest
import yaml

from student_trainer.config.teachers import teachers_of
from tests.support.certificates import make_authority
from tests.support.flags import read_server, read_trainer, with_key
from tests.unit.examples.test_kubernetes import (
    ALL,
    FOLDER,
    KUBECTL,
    TEACHERS,
    kustomized,
    manifests,
)

OVERLAYS = {
    "named-teachers": {
        "math": ["teacher-0.teacher", "teacher-1.teacher"], "code": ["code-0.code"],
    },
    "adapters": {
        "math": ["teacher-0.teacher", "teacher-1.teacher"],
        "code": ["teacher-0.teacher", "teacher-1.teacher"],
    },
}  # fmt: skip


def overlay(folder):
    return FOLDER.with_name(f"kubernetes-{folder}")


def changed(folder):
    """The parts that a folder changes or adds."""
    kept = yaml.safe_load((overlay(folder) / "kustomization.yaml").read_text())
    files = [*kept["resources"], *(patch["path"] for patch in kept["patches"])]
    assert kept["resources"][0] == "../kubernetes"
    found = {}
    for file in files[1:]:
        found.update(manifests((overlay(folder) / file).read_text()))
    return found


def args(part):
    (container,) = part["spec"]["template"]["spec"]["containers"]
    return container["args"]


def test_each_folder_is_tested():
    folders = FOLDER.parent.glob("kubernetes-*")
    elsewhere = {"rollouts", "rollout-adapters"}  # test_rollout*_on_kubernetes.py
    assert {path.name.removeprefix("kubernetes-") for path in folders} == {*OVERLAYS, *elsewhere}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_trainer_names_teachers_that_are_served(folder, tmp_path):
    parts = changed(folder)
    words = args(parts["Job", "trainer"])
    *_, teacher, _ = read_trainer(with_key(words[words.index("student_trainer") + 1 :], tmp_path))
    assert {one.name: list(one.urls) for one in teachers_of(teacher.teacher_url)} == {
        name: [f"https://{host}:8000" for host in hosts] for name, hosts in OVERLAYS[folder].items()
    }
    sets = {name: one for (kind, name), one in {**ALL, **parts}.items() if kind == "StatefulSet"}
    replicas = {name: one["spec"].get("replicas", TEACHERS["spec"]["replicas"])
                for name, one in sets.items()}  # fmt: skip
    asked = {host for hosts in OVERLAYS[folder].values() for host in hosts}
    assert asked == {f"{name}-{i}.{name}" for name, n in replicas.items() for i in range(n)}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_a_patch_changes_the_model_and_names_and_nothing_else(folder):
    for (kind, name), part in changed(folder).items():
        before = ALL.get((kind, name))
        if before is None or kind not in ("Job", "StatefulSet"):
            continue
        own = {"deepseek-ai", "Qwen/", "https://", "math=", "code=", "--lora-modules"}

        def fixed(words, own=own):
            return [word for word in words if not any(part in word for part in own)]

        assert fixed(args(part)) == fixed(args(before))


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_servers_flags_are_right(folder, tmp_path, monkeypatch):
    secret = make_authority(tmp_path / "authority")
    files = {"/tls/tls.crt": secret.certificate, "/tls/tls.key": secret.key}
    served = [one for (kind, _), one in changed(folder).items() if kind == "StatefulSet"]
    assert served
    for part in served:
        command, *words = args(part)
        assert command == "teacher-server"
        adapters = [word for word in words if re.match(r"\w+=/runs", word)]
        for mounted, file in files.items():
            words = [word.replace(mounted, str(file)) for word in words]
        kept = [word for word in words if word not in (*adapters, "--lora-modules")]
        settings = read_server(with_key(kept, tmp_path), monkeypatch)
        assert (settings.port, settings.backend) == (8000, "vllm")
        if folder == "adapters":
            assert {word.partition("=")[0] for word in adapters} == set(OVERLAYS[folder])
            spec = part["spec"]["template"]["spec"]
            (mount,) = spec["containers"][0]["volumeMounts"]
            assert mount == {"name": "runs", "mountPath": "/runs", "readOnly": True}
            (volume,) = spec["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] in {
                name for kind, name in ALL if kind == "PersistentVolumeClaim"
            }


def test_the_added_teacher_is_as_the_first_and_reached_by_the_trainer_alone():
    parts = changed("named-teachers")
    code, first = parts["StatefulSet", "code"], TEACHERS
    labels = code["spec"]["template"]["metadata"]["labels"]
    assert labels == {"app": "code"} == code["spec"]["selector"]["matchLabels"]
    assert parts["Service", "code"]["spec"]["selector"] == labels
    for field in ("securityContext", "terminationGracePeriodSeconds", "volumes"):
        pods = [one["spec"]["template"]["spec"][field] for one in (code, first)]
        assert pods[0] == pods[1]
    for field in ("startupProbe", "readinessProbe", "livenessProbe", "securityContext"):
        containers = [one["spec"]["template"]["spec"]["containers"][0] for one in (code, first)]
        assert containers[0][field] == containers[1][field]
    policy = parts["NetworkPolicy", "code"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"] == ALL["NetworkPolicy", "teacher"]["spec"]["ingress"]
    assert "DNS:code-0.code" in (overlay("named-teachers") / "kustomization.yaml").read_text()


@KUBECTL
@pytest.mark.parametrize("folder", OVERLAYS)
def test_kustomize_renders_the_overlay(folder):
    rendered = kustomized(overlay(folder))
    for key, part in changed(folder).items():
        if key[0] in ("Job", "StatefulSet"):
            assert args(rendered[key]) == args(part)
            (one,) = rendered[key]["spec"]["template"]["spec"]["containers"]
            assert one["image"] == "registry.example.com/sparse-gkd:gpu"

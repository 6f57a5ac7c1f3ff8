"""The overlay with rollout servers agrees with its base, the trainer's flags and vLLM's."""

import json
from functools import partial

import yaml

from tests.support.flags import flag_value, read_trainer, with_key
from tests.unit.examples.test_kubernetes import (
    ALL,
    FOLDER,
    KUBECTL,
    PODS,
    TEACHERS,
    kustomized,
    manifests,
)

OVERLAY = FOLDER.with_name("kubernetes-rollouts")
ADDED = {
    **manifests((OVERLAY / "rollout.yaml").read_text()),
    **manifests((OVERLAY / "network.yaml").read_text()),
}
SERVERS = ADDED["StatefulSet", "rollout"]
POD = SERVERS["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]
PORT = 8001
POLICIES = [
    one["spec"] for parts in (ALL, ADDED) for (kind, _), one in parts.items()
    if kind == "NetworkPolicy"
]  # fmt: skip


def trainer_args():
    ((_, patch),) = manifests((OVERLAY / "trainer.yaml").read_text()).items()
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    return container["args"]


def trainer_flags(tmp_path):
    words = trainer_args()
    words = with_key(words[words.index("student_trainer") + 1 :], tmp_path)
    return partial(flag_value, read_trainer(words))


def value(flag):
    """The value of a flag of ``vllm serve``."""
    (found,) = [word for word in SERVER["args"] if word.startswith(f"--{flag}=")]
    return found.partition("=")[2]


def admitted(labels, port):
    """Apps that some policy lets in to a port of the pods with these labels."""
    return {
        peer["podSelector"]["matchLabels"]["app"]
        for policy in POLICIES
        if policy["podSelector"].get("matchLabels", {}).items() <= labels.items()
        for rule in policy.get("ingress", [])
        if any(
            entry["port"] <= port <= entry.get("endPort", entry["port"])
            for entry in rule.get("ports", [{"port": 0, "endPort": 65535}])
        )
        for peer in rule["from"]
    }


def test_the_servers_take_weights_and_token_ids_for_the_trainers_own_student(tmp_path):
    flags = trainer_flags(tmp_path)
    assert SERVER["args"][:3] == ["vllm", "serve", flags("model_name_or_path")]
    assert {"name": "VLLM_SERVER_DEV_MODE", "value": "1"} in SERVER["env"]
    assert "--tokens-only" in SERVER["args"]
    assert json.loads(value("weight-transfer-config")) == {"backend": "nccl"}
    assert value("dtype") == flags("torch_dtype")
    assert int(value("max-model-len")) >= flags("max_length") > flags("max_new_tokens")
    assert int(value("tensor-parallel-size")) == SERVER["resources"]["limits"]["nvidia.com/gpu"]


def test_the_trainer_sends_weights_to_each_server_by_its_name(tmp_path):
    flags = trainer_flags(tmp_path)
    service = ADDED["Service", SERVERS["spec"]["serviceName"]]
    assert service["spec"]["clusterIP"] == "None"  # each pod has an address
    assert service["spec"]["selector"] == {"app": "rollout"} == POD["metadata"]["labels"]
    assert {int(value("port")), SERVER["ports"][0]["containerPort"]} == {PORT}
    assert [port["port"] for port in service["spec"]["ports"]] == [PORT]
    assert flags("rollout_url") == [
        f"http://rollout-{i}.rollout:{PORT}" for i in range(SERVERS["spec"]["replicas"])
    ]
    startup = SERVER["startupProbe"]
    assert flags("rollout_timeout") >= startup["periodSeconds"] * startup["failureThreshold"]


def test_the_patch_adds_flags_of_rollouts_and_changes_nothing_else():
    base = PODS["trainer"]["spec"]["containers"][0]["args"]
    changed = iter(trainer_args())
    assert all(word in changed for word in base)  # all of them, in this order


def test_only_the_trainer_reaches_the_routes_that_take_weights():
    assert admitted(POD["metadata"]["labels"], PORT) == {"trainer"}
    assert admitted(POD["metadata"]["labels"], 40_000) == {"trainer", "rollout"}  # NCCL


def test_a_server_reaches_the_trainers_transfer_and_not_its_ranks():
    trainer = PODS["trainer"]["metadata"]["labels"]
    assert admitted(trainer, 40_000) == {"trainer", "rollout"}
    assert admitted(trainer, 29_500) == {"trainer"}
    assert admitted(TEACHERS["spec"]["template"]["metadata"]["labels"], 8000) == {"trainer"}


def test_a_server_has_no_more_rights_than_a_teacher():
    teacher = TEACHERS["spec"]["template"]["spec"]
    for field in ("securityContext", "automountServiceAccountToken"):
        assert POD["spec"][field] == teacher[field]
    assert SERVER["securityContext"] == teacher["containers"][0]["securityContext"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVER[name]["httpGet"] == {"path": "/health", "port": SERVER["ports"][0]["name"]}


def test_the_kustomization_names_each_file():
    kept = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text())
    files = [*kept["resources"], *(patch["path"] for patch in kept["patches"])]
    assert files[0] == "../kubernetes"
    assert set(files[1:]) == {path.name for path in OVERLAY.iterdir()} - {"kustomization.yaml"}


@KUBECTL
def test_kustomize_renders_the_servers():
    rendered = kustomized(OVERLAY)
    assert rendered.keys() == ALL.keys() | ADDED.keys()
    (container,) = rendered["Job", "trainer"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == trainer_args()
    (server,) = rendered["StatefulSet", "rollout"]["spec"]["template"]["spec"]["containers"]
    assert server["image"] == "registry.example.com/sparse-gkd:gpu"

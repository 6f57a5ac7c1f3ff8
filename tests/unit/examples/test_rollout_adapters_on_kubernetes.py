"""The overlay whose rollout servers take adapters alone agrees with the one below it."""

from importlib import import_module

import yaml

from tests.unit.examples.test_kubernetes import ALL, FOLDER, KUBECTL, kustomized, manifests
from tests.unit.examples.test_rollouts_on_kubernetes import ADDED, SERVER, trainer_flags

OVERLAY = FOLDER.with_name("kubernetes-rollout-adapters")
((_, PATCH),) = manifests((OVERLAY / "rollout.yaml").read_text()).items()
(PATCHED,) = PATCH["spec"]["template"]["spec"]["containers"]


def flags():
    return dict(word.partition("=")[::2] for word in PATCHED["args"] if word.startswith("--"))


def test_the_patch_adds_what_loads_adapters_and_changes_nothing_else(tmp_path):
    added = PATCHED["args"][len(SERVER["args"]) :]
    assert PATCHED["args"][: len(SERVER["args"])] == SERVER["args"]
    assert [word.partition("=")[0] for word in added] == [
        "--enable-lora", "--max-lora-rank", "--worker-extension-cls",
    ]  # fmt: skip
    of_trainer = trainer_flags(tmp_path)
    assert of_trainer("use_peft")
    assert int(flags()["--max-lora-rank"]) >= of_trainer("lora_r")
    assert PATCHED.keys() == {"name", "args", "env"}
    assert PATCHED["env"] == [{"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"}]


def test_the_extension_is_one_of_this_package_and_writes_where_the_pod_may(tmp_path):
    module, _, name = flags()["--worker-extension-cls"].rpartition(".")
    assert hasattr(import_module(module), name)
    assert {"name": "tmp", "mountPath": "/tmp"} in SERVER["volumeMounts"]


def test_the_network_policies_are_those_of_the_overlay_below():
    kept = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text())
    assert kept["resources"] == ["../kubernetes-rollouts"]
    files = {path.name for path in OVERLAY.iterdir()} - {"kustomization.yaml"}
    assert {patch["path"] for patch in kept["patches"]} == files == {"rollout.yaml"}


@KUBECTL
def test_kustomize_renders_servers_that_load_adapters():
    rendered = kustomized(OVERLAY)
    assert rendered.keys() == ALL.keys() | ADDED.keys()
    (server,) = rendered["StatefulSet", "rollout"]["spec"]["template"]["spec"]["containers"]
    assert server["args"] == PATCHED["args"]
    given = {one["name"]: one["value"] for one in server["env"]}
    assert given == {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    assert server["image"] == "registry.example.com/sparse-gkd:gpu"
    assert server["volumeMounts"] == SERVER["volumeMounts"]

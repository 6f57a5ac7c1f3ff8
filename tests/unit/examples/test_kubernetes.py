"""The manifests agree with the commands, with each other and with the image."""

import contextlib
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from teacher_server.app import TeacherApp
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from tests.support.certificates import make_authority
from tests.support.flags import read_server, read_trainer, with_key
from tests.support.http import until

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "kubernetes"


KUBECTL = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def kustomized(folder):
    """The manifests that kubectl renders of a folder with a kustomization."""
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    )
    return manifests(done.stdout)


def manifests(text):
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


ALL = {
    **manifests((FOLDER / "teacher.yaml").read_text()),
    **manifests((FOLDER / "trainer.yaml").read_text()),
    **manifests((FOLDER / "network.yaml").read_text()),
}
POLICIES = [one["spec"] for (kind, _), one in ALL.items() if kind == "NetworkPolicy"]
TEACHERS, TRAINER = ALL["StatefulSet", "teacher"], ALL["Job", "trainer"]
PODS = {"teacher": TEACHERS["spec"]["template"], "trainer": TRAINER["spec"]["template"]}


def container(name):
    (one,) = PODS[name]["spec"]["containers"]
    return one


def trainer_words():
    args = container("trainer")["args"]
    return args[args.index("student_trainer") + 1 :]


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture
def settings(tmp_path, monkeypatch, secret):
    command, *words = container("teacher")["args"]
    assert command == "teacher-server"
    files = {"/tls/tls.crt": str(secret.certificate), "/tls/tls.key": str(secret.key)}
    for mounted, file in files.items():
        words = [word.replace(mounted, file) for word in words]
    return read_server(with_key(words, tmp_path), monkeypatch)


def test_probes_ask_what_the_server_answers(settings):
    paths = TeacherApp(settings, Metrics(), ApiKeys([])).api.openapi()["paths"]
    asked = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container("teacher")[name]["httpGet"]
        assert probe["port"] == container("teacher")["ports"][0]["name"]
        assert probe["scheme"] == "HTTPS"
        assert "get" in paths[probe["path"]]
        asked[name] = probe["path"]
    # A teacher that drains takes no more work, and shall not be killed for it.
    assert asked["livenessProbe"] == "/health"
    assert asked["readinessProbe"] == asked["startupProbe"] == "/ready"


def test_a_teacher_has_the_time_to_answer_what_it_began(settings):
    assert PODS["teacher"]["spec"]["terminationGracePeriodSeconds"] >= settings.drain_timeout + 15


def test_the_trainer_asks_every_replica_by_its_name(settings, tmp_path):
    *_, teacher, args = read_trainer(with_key(trainer_words(), tmp_path))
    service = ALL["Service", TEACHERS["spec"]["serviceName"]]
    assert service["spec"]["clusterIP"] == "None"  # each pod has an address
    (port,) = service["spec"]["ports"]
    assert port["port"] == container("teacher")["ports"][0]["containerPort"] == settings.port
    assert teacher.teacher_url == [
        f"https://teacher-{i}.{service['metadata']['name']}:{settings.port}"
        for i in range(TEACHERS["spec"]["replicas"])
    ]
    startup = container("teacher")["startupProbe"]
    assert teacher.teacher_timeout >= startup["periodSeconds"] * startup["failureThreshold"]
    assert args.resume_from_checkpoint == "auto"


def test_a_process_for_each_gpu_of_each_node():
    spec, args = TRAINER["spec"], container("trainer")["args"]
    given = dict(word.removeprefix("--").split("=") for word in args if re.match("--.*=", word))
    nodes = int(given["num_machines"])
    assert spec["completions"] == spec["parallelism"] == nodes
    gpus = container("trainer")["resources"]["limits"]["nvidia.com/gpu"]
    assert int(given["num_processes"]) == nodes * gpus
    service = ALL["Service", PODS["trainer"]["spec"]["subdomain"]]
    assert given["main_process_ip"] == f"trainer-0.{service['metadata']['name']}"
    (node,) = (one for one in container("trainer")["env"] if "valueFrom" in one)
    assert given["machine_rank"] == f"$({node['name']})"
    assert (ROOT / given["config_file"]).exists()  # the image holds examples/


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        ("touch train_results.json", 0),
        ("true", 1),  # told to end, and saved
        ("exit 3", 3),
        ("trap 'touch told; exit 0' TERM; touch begun; sleep 9 & wait", 1),
        ("trap 'touch train_results.json; exit 0' TERM; touch begun; sleep 9 & wait", 0),
    ],
)
def test_a_run_is_done_once_it_has_results(tmp_path, ranks, code):
    shell, option, script, name = container("trainer")["args"][:4]
    # What is read of a secret, and written to a mount, does not exist here.
    script = script.replace("/runs/student", str(tmp_path)).replace("/tmp/auth", f"{tmp_path}/auth")
    words = [shell, option, script.replace("/tls/tls.crt", "/dev/null"), name]
    with subprocess.Popen([*words, "sh", "-c", ranks], cwd=tmp_path) as process:
        if "begun" in ranks:
            until((tmp_path / "begun").exists)
            process.terminate()
        assert process.wait(20) == code
    assert (tmp_path / "told").exists() == ("told" in ranks)


def test_tensor_parallelism_takes_the_gpus_of_a_teacher(settings):
    gpus = container("teacher")["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--tensor-parallel-size={gpus}" in settings.engine_flags


@pytest.mark.parametrize("name", PODS)
def test_nobody_is_root_or_writes_outside_mounts(name):
    pod, own = PODS[name]["spec"]["securityContext"], container(name)["securityContext"]
    image_user = int(re.search(r"useradd --uid (\d+)", (ROOT / "docker/Dockerfile").read_text())[1])
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == pod["fsGroup"] == image_user
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert PODS[name]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", PODS)
def test_the_key_is_a_secret_mounted_where_the_flag_looks(name):
    mounts = {m["name"]: m["mountPath"] for m in container(name)["volumeMounts"]}
    claims = {c["metadata"]["name"] for c in TEACHERS["spec"]["volumeClaimTemplates"]}
    volumes = {v["name"]: v for v in PODS[name]["spec"]["volumes"]}
    assert set(mounts) <= set(volumes) | (claims if name == "teacher" else set())
    assert volumes["key"]["secret"]["secretName"] == "teacher-key"
    text = " ".join(container(name)["args"])
    assert re.search(r"api[-_]key[-_]file=(\S+)", text)[1] == f"{mounts['key']}/teacher.key"
    assert (
        "generic teacher-key --from-literal=teacher.key="
        in (FOLDER / "kustomization.yaml").read_text()
    )


def ports_open():
    """(name of the pods, port) of each port that a container or a Service names."""
    for name in PODS:
        yield from ((name, port["containerPort"]) for port in container(name)["ports"])
        yield from ((name, port["port"]) for port in ALL["Service", name]["spec"]["ports"])


def admitted(name, port):
    """Labels of the pods that some policy lets in; None where no policy covers the pods."""
    labels = PODS[name]["metadata"]["labels"]
    covering = [
        one
        for one in POLICIES
        if "Ingress" in one["policyTypes"]
        and one["podSelector"].get("matchLabels", {}).items() <= labels.items()
    ]
    if not covering:
        return None
    return [
        peer["podSelector"]["matchLabels"]
        for one in covering
        for rule in one.get("ingress", [])
        if "ports" not in rule or port in [entry["port"] for entry in rule["ports"]]
        for peer in rule["from"]
    ]


@pytest.mark.parametrize(("name", "port"), sorted(set(ports_open())))
def test_only_the_trainer_reaches_a_port(name, port):
    assert admitted(name, port) == [PODS["trainer"]["metadata"]["labels"]]
    if name == "teacher":
        assert admitted(name, port + 1) == []


def test_pods_that_nobody_thought_of_are_reached_by_nobody():
    (everything,) = (one for one in POLICIES if one["podSelector"] == {})
    assert "ingress" not in everything


def test_the_key_travels_under_tls_alone(settings, tmp_path):
    *_, teacher, _ = read_trainer(with_key(trainer_words(), tmp_path))
    assert teacher.teacher_api_key_file
    assert {url.partition(":")[0] for url in teacher.teacher_url} == {"https"}
    assert settings.ssl_certfile
    assert settings.ssl_keyfile
    for name in PODS:
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in container(name)[
            "volumeMounts"
        ]
        volumes = {v["name"]: v for v in PODS[name]["spec"]["volumes"]}
        assert volumes["tls"]["secret"]["secretName"] == "teacher-tls"
    assert volumes["tls"]["secret"]["items"] == [{"key": "tls.crt", "path": "tls.crt"}]
    assert "create secret tls teacher-tls " in (FOLDER / "kustomization.yaml").read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_certificate_is_trusted_under_each_replicas_name(tmp_path):
    (line,) = re.findall(r"^# (openssl req .*)$", (FOLDER / "kustomization.yaml").read_text(), re.M)
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    script = container("trainer")["args"][2].splitlines()[0]
    assert script.endswith("> /tmp/authorities.pem")
    (trusted,) = (e["value"] for e in container("trainer")["env"] if e["name"] == "SSL_CERT_FILE")
    assert trusted == "/tmp/authorities.pem"
    subprocess.run(
        ["sh", "-c", script.replace("/tls/", "./").replace("/tmp/auth", "./auth")],
        cwd=tmp_path, check=True, timeout=60,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client = ssl.create_default_context(cafile=tmp_path / "authorities.pem")
    assert client.cert_store_stats()["x509_ca"] > 50  # the Hub's too
    for replica in range(TEACHERS["spec"]["replicas"]):
        shake_hands(client, server, f"teacher-{replica}.teacher")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server, "elsewhere")


def shake_hands(client, server, name):
    """A TLS handshake in memory."""
    back, forth = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(back, forth, server_hostname=name)
    there = server.wrap_bio(forth, back, server_side=True)
    for _ in range(4):
        for side in (here, there):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert here.version() == "TLSv1.3"


@pytest.mark.parametrize("name", ["teacher", "trainer"])
def test_selectors_find_the_pods(name):
    labels = PODS[name]["metadata"]["labels"]
    assert ALL["Service", name]["spec"]["selector"] == labels
    if name == "teacher":
        assert TEACHERS["spec"]["selector"]["matchLabels"] == labels
        budget = ALL["PodDisruptionBudget", "teacher"]["spec"]
        assert budget["selector"]["matchLabels"] == labels
        assert budget["maxUnavailable"] < TEACHERS["spec"]["replicas"]


@KUBECTL
def test_kustomize_renders_all_in_one_namespace_with_one_image():
    rendered = kustomized(FOLDER)
    assert rendered.keys() == ALL.keys()
    assert {one["metadata"]["namespace"] for one in rendered.values()} == {"gkd"}
    for kind in (("StatefulSet", "teacher"), ("Job", "trainer")):
        (one,) = rendered[kind]["spec"]["template"]["spec"]["containers"]
        assert one["image"] == "registry.example.com/sparse-gkd:gpu"

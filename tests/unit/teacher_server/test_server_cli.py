"""The command: one clear line and exit code 2 for what cannot work, before anything loads."""

import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from shared import __version__
from teacher_server.cli import main
from teacher_server.engine_flags import check_engine_flags, vllm_flags
from teacher_server.settings import Settings
from tests.support.flags import read_server


def refused(capsys, *arguments):
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("teacher-server: error: ")
    assert error.count("\n") == 1
    return error


def test_a_missing_folder_is_refused(capsys):
    for name in ("/no/such", "a" * 300, "~nobody-9/such"):
        assert f"folder {name} does not exist" in refused(capsys, name)


def test_a_wrong_value_is_refused(capsys, llama_folder):
    assert "--port 70000" in refused(capsys, str(llama_folder), "--port", "70000")


def test_a_flag_that_only_vllm_may_know_is_refused_on_the_other_backend(capsys, llama_folder):
    flags = ["--backend", "transformers", "--tensor-parallel-size", "2"]
    error = refused(capsys, str(llama_folder), *flags)
    assert "--tensor-parallel-size 2: unknown to this server" in error
    assert "use --backend vllm" in error


def test_vllm_where_it_is_not_installed_is_refused(capsys, llama_folder, monkeypatch):
    monkeypatch.setattr("teacher_server.settings.find_spec", lambda name: None)
    error = refused(capsys, str(llama_folder), "--backend", "vllm")
    assert "vllm is not installed here; pip install 'sparse-gkd[vllm]'" in error


def file_of(tmp_path, text):
    (tmp_path / "serve.yaml").write_text(text)
    return ["--config", str(tmp_path / "serve.yaml")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"model": "org/file", "port": 8123, "trust_remote_code": True}),
        (["org/given"], {"model": "org/given"}),
        (["--port", "9000", "--no-trust-remote-code"], {"port": 9000, "trust_remote_code": False}),
    ],
)
def test_a_file_holds_the_flags_and_the_command_line_wins(tmp_path, monkeypatch, words, expected):
    text = "model: org/file\nport: 8123\ntrust_remote_code: true\nbackend: vllm\n" + (
        "tensor-parallel-size: 2\nenable-prefix-caching: false\ndevice:\n"
        "hf-overrides: {rope_theta: 1.0}\nallowed-media-domains: [a, b]\n"
    )
    settings = read_server(["serve", *words, *file_of(tmp_path, text)], monkeypatch)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.device == "auto"
    assert settings.engine_flags == (
        "--tensor-parallel-size=2", "--no-enable-prefix-caching",
        '--hf-overrides={"rope_theta": 1.0}', "--allowed-media-domains", "a", "b",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [one.name for one in fields(Settings) if isinstance(one.default, bool)]
)
def test_a_switch_of_a_file_may_be_spelt_in_any_of_yamls_ways(tmp_path, monkeypatch, name):
    for spelt, expected in (("yes", True), ("on", True), ("true", True), ("Off", False)):
        text = f"model: org/file\nbackend: vllm\n{name}: {spelt}\n"
        settings = read_server(["serve", *file_of(tmp_path, text)], monkeypatch)
        assert getattr(settings, name) is expected


@pytest.mark.parametrize("flag", ["--api-key=sk-secret", "--api_key=sk-secret", "--api_key"])
def test_a_key_among_the_flags_is_refused_and_not_shown(capsys, llama_folder, flag):
    flags = [flag] if "=" in flag else [flag, "sk-secret"]
    error = refused(capsys, str(llama_folder), "--backend", "transformers", *flags)
    assert "use --api-key-file, or TEACHER_API_KEYS" in error
    assert "sk-secret" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 70000\nmodel: {model}\n", "--port 70000"),
        ("prot: 8000\nmodel: {model}\nbackend: transformers\n", "--prot=8000: unknown to this"),
        ("- port\n", "must hold `name: value` lines"),
        ("port: {\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(capsys, tmp_path, llama_folder, text, said):
    assert said in refused(capsys, *file_of(tmp_path, text.replace("{model}", str(llama_folder))))


def test_flags_are_not_abbreviated(capsys, llama_folder):
    """Half a name of ours could be the whole name of one of vLLM's."""
    flags = ["--backend", "transformers", "--max-model", "32"]
    assert "--max-model 32: unknown" in refused(capsys, str(llama_folder), *flags)


def test_a_port_in_use_is_refused_before_the_model_loads(capsys, llama_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refused(capsys, str(llama_folder), "--port", port)
    assert f"127.0.0.1 port {port}: Address already in use" in error
    assert "another --port" in error


def test_an_address_of_another_machine_is_refused(capsys, llama_folder):
    flags = ["--host", "192.0.2.1", "--port", "0", "--allow-unauthenticated"]
    error = refused(capsys, str(llama_folder), *flags)
    assert "cannot listen on 192.0.2.1" in error


def test_a_model_that_does_not_load_ends_the_server(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    flags = ["--port", "0", "--backend", "transformers"]
    assert "does not load" in refused(capsys, str(tmp_path), *flags)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["serve", "m", "--backend", "tgi"],
        ["serve", "m", "--dtype", "int8"],
        ["serve", "m", "--port", "http"],
        ["fly"],
        ["--fly", "bench", "http://127.0.0.1:9"],
        ["completion", "bash", "--fly"],
    ],
)
def test_wrong_flags_exit_with_two_and_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("teacher-server: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["org/m", "--prot", "80"], "--prot: neither this server nor vLLM takes it. Did you mean"),
        (["--prot", "80"], "takes it. Did you mean --port?"),
        (["org/m", "--tensor_paralel_size=2"], "Did you mean --tensor-parallel-size?"),
        (["org/m", "--api-key-fil=k"], "Did you mean --api-key-file?"),
        (["--model", "org/m"], "give the model alone: teacher-server serve MODEL"),
        (["org/m", "--model=other"], "--model=other is set by this server"),
    ],
)
def test_a_misspelt_flag_is_refused_before_vllm_is_imported(capsys, monkeypatch, flags, message):
    flags = [*flags, "--backend", "vllm"]
    names = frozenset({"--tensor-parallel-size", "--enable-prefix-caching"})
    monkeypatch.setattr("teacher_server.engine_flags.vllm_flags", lambda: names)
    monkeypatch.setattr("teacher_server.settings.find_spec", lambda name: name)
    assert message in refused(capsys, *flags)


def test_flags_that_vllm_may_know_are_left_to_it(monkeypatch):
    names = frozenset({"--tensor-parallel-size", "--enable-prefix-caching", "--hf-overrides"})
    monkeypatch.setattr("teacher_server.engine_flags.vllm_flags", lambda: names)
    flags = (
        "--tensor-parallel", "2", "--no-enable-prefix-caching", "--hf_overrides.a=1", "-tp", "2",
        "--zzz-of-a-plugin",
    )  # fmt: skip
    check_engine_flags(flags, "vllm", ["--port", "--device"])


def test_the_flags_of_an_installed_vllm_are_read_from_its_source():
    pytest.importorskip("vllm.engine.arg_utils")
    assert {"--tensor-parallel-size", "--quantization", "--max-num-seqs"} <= vllm_flags()


def test_a_value_of_the_file_is_refused_with_its_line(capsys, tmp_path, llama_folder):
    file = file_of(tmp_path, f"model: {llama_folder}\n\nmax_held_mib: 2\n")
    assert f"({file[1]}, line 3)" in refused(capsys, *file)


@pytest.mark.parametrize(("text", "expected"), [("yes", True), ("On", True), ("no", False)])
def test_a_switch_of_the_file_may_be_yes_or_no(tmp_path, monkeypatch, text, expected):
    file = file_of(tmp_path, f"model: org/m\ntrust_remote_code: {text}\n")
    assert read_server(["serve", *file], monkeypatch).trust_remote_code is expected


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"teacher-server {__version__}"


def test_help_names_every_flag_and_loads_no_model_library():
    code = (
        "import sys\n"
        "from teacher_server.cli import main\n"
        "try:\n    main(['serve', '--help'])\n"
        "finally:\n    libraries = {'torch', 'transformers', 'vllm'}\n"
        "    print('LOADED', sorted(libraries & sys.modules.keys()))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in shown.stdout
    for flag in ("--host", "--port", "--backend", "--dtype", "--device", "--max-model-len",
                 "--max-batch-tokens", "--max-queued-tokens", "--request-timeout", "--max-top-k",
                 "--score-chunk-mib",
                 "--trust-remote-code", "--served-model-name", "--drain-timeout",
                 "--tensor-parallel-size", "4.98 GB"):  # fmt: skip
        assert flag in shown.stdout


def test_without_the_extra_serve_names_it():
    code = (
        "import sys\n"
        "sys.modules['uvicorn'] = None\n"
        "from teacher_server.cli import main\n"
        "sys.exit(main(['serve', 'org/model']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    expected = (
        "teacher-server: error: uvicorn is not installed; pip install 'sparse-gkd[teacher]'\n"
    )
    assert done.stderr == expected


def test_a_signal_does_not_wait_for_a_model_that_loads_for_minutes(llama_folder):
    code = (
        "import sys, time\n"
        "from teacher_server import cli, serve\n"
        "serve.make_backend = lambda *_: time.sleep(120)\n"
        f"sys.exit(cli.main(['serve', {str(llama_folder)!r}, '--port', '0']))\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert "Listening" in server.stderr.readline()
        time.sleep(0.5)  # uvicorn starts, and with it the signal handlers
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_help_names_serve_first(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    commands = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    assert [name for name in commands if name in ("serve", "bench", "completion")] == [
        "serve", "bench", "completion",
    ]  # fmt: skip

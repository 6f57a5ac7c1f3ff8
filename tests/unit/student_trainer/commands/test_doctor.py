"""`doctor`: each line tells what is there, and what to do about what is not."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta

import pytest

from student_trainer.commands import doctor_machine, doctor_teacher
from student_trainer.commands.main import main
from tests.support.stub import StubTeacher


def lines(capsys, *words):
    """(exit code, what each check says)."""
    code = main(["doctor", *words, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    return code, {finding["check"]: finding for finding in told["findings"]}


def test_what_is_needed_is_there_and_fits(capsys):
    code, found = lines(capsys)
    assert code == 0
    assert found["torch"]["status"] == found["transformers"]["status"] == "ok"
    assert found["torch"]["detail"].endswith("(<3,>=2.11)")
    assert {"python", "disk here", "hub", "clock"} <= set(found)
    assert not [
        f for f in found.values() if f["status"] == "off" and "pip install" not in f["remedy"]
    ]


def test_lines_are_for_eyes_without_escapes_in_a_log(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert any(line.startswith("ok   torch           2.13.0") for line in out.splitlines())
    assert "\033" not in out
    assert re.fullmatch(
        r"\d+ ok.*; no teacher was checked: add --teacher_url http://host:8000",
        out.splitlines()[-1],
    )


def test_a_package_that_is_missing_or_does_not_fit_fails_with_the_remedy(capsys, monkeypatch):
    there = {"transformers": "4.57.0", "peft": None, "vllm": "0.11.0"}
    known = doctor_machine._version
    monkeypatch.setattr(doctor_machine, "_version", lambda name: there.get(name, known(name)))
    monkeypatch.setitem(there, "torch", "2.13.0+cu130")
    code, found = lines(capsys)
    assert code == 1
    assert found["transformers"]["status"] == found["peft"]["status"] == "fail"
    assert "4.57.0; needed is <5.25,>=5.16.1" in found["transformers"]["detail"]
    assert "pip install 'peft<1,>=0.19'" in found["peft"]["remedy"]
    assert found["torch"]["status"] == "ok"
    assert found["vllm"]["status"] == "warn"


def test_the_extras_of_the_wheel_are_those_of_the_source(monkeypatch, tmp_path):
    """A wheel has no pyproject.toml, and says the same in its own way."""
    source = doctor_machine.requirements()
    wheel = [*source[""], *(f"{line}; extra == 'trainer'" for line in source["trainer"])]
    monkeypatch.setattr(
        doctor_machine, "__file__", str(tmp_path / "student_trainer" / "doctor_machine.py")
    )
    monkeypatch.setattr(doctor_machine.importlib.metadata, "requires", lambda name: wheel)
    found = doctor_machine.requirements()
    assert (found[""], found["trainer"]) == (source[""], source["trainer"])


def test_a_wheel_is_told_its_own_extras_and_no_versions_of_tests(capsys, monkeypatch, tmp_path):
    known = doctor_machine._version
    there = {"fastapi": None, "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor_machine, "_version", lambda name: there.get(name, known(name)))
    _, source = lines(capsys)
    assert source["fastapi"]["remedy"] == "pip install -c constraints.txt '.[teacher]'"
    (tmp_path / "student_trainer" / "commands").mkdir(parents=True)
    module = tmp_path / "student_trainer" / "commands" / "doctor_machine.py"
    module.touch()
    wheel = [f"{line}; extra == 'trainer'" for line in doctor_machine.requirements()["trainer"]]
    monkeypatch.setattr(doctor_machine, "__file__", str(module))
    monkeypatch.setattr(doctor_machine.importlib.metadata, "requires", lambda name: wheel)
    _, found = lines(capsys)
    assert found["fastapi"]["remedy"] == "pip install 'sparse-gkd[teacher]'"
    assert found["torch"]["detail"] == "2.13.0+cpu (<3,>=2.11)"


def test_little_disk_warns_and_hardly_any_fails(monkeypatch, tmp_path):
    for free, status in ((20, "ok"), (9, "warn"), (0.9, "fail")):
        usage = type("usage", (), {"free": free * 2**30, "total": 100 * 2**30})
        monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert doctor_machine._free("disk here", tmp_path, 10, "").status == status


def test_a_clock_that_is_behind_fails(monkeypatch):
    assert doctor_machine._clock().status == "ok"
    monkeypatch.setattr(doctor_machine, "_now", lambda: datetime(2020, 1, 1, tzinfo=UTC))
    assert doctor_machine._clock().status == "fail"


def test_a_teacher_is_told_with_latency_identity_and_key(capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "a-secret-of-ours-1234")
    with StubTeacher(key="a-secret-of-ours-1234").serving() as stub:
        assert main(["doctor", "--teacher_url", stub.url]) == 0
    out = capsys.readouterr().out
    assert f"{stub.url} answers in" in out
    assert "stub: float32, stub 1, fingerprint 0000000000000000; 100 tokens, context 64" in out
    assert "ours is accepted, and strangers are refused" in out
    assert "a-secret" not in out


def test_what_is_the_matter_with_a_teacher_fails_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "another-secret-5678")
    with StubTeacher(key="a-secret-of-ours-1234").serving() as stub:
        code, found = lines(capsys, "--teacher_url", stub.url)
    assert (code, found["teacher's key"]["status"]) == (1, "fail")
    assert "TEACHER_API_KEY" in found["teacher's key"]["remedy"]
    code, found = lines(capsys, "--teacher_url", "http://127.0.0.1:9")
    assert (code, found["teacher"]["status"]) == (1, "fail")
    assert "teacher-server serve MODEL" in found["teacher"]["remedy"]
    with StubTeacher().serving() as stub:
        code, found = lines(capsys, "--teacher_url", stub.url)
    assert (code, found["teacher's key"]["status"]) == (0, "warn")


def test_a_teacher_that_cannot_be_asked_for_want_of_a_package_is_a_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "student_trainer.config.checks", None)
    code, found = lines(capsys, "--teacher_url", "http://127.0.0.1:9")
    assert (code, found["teacher"]["status"]) == (1, "fail")
    assert "pip install" in found["teacher"]["remedy"]


@pytest.mark.parametrize("url", ["host:8000", "http://host:8000/v1", "http://me:s3cret@host"])
def test_what_is_no_address_is_a_wrong_flag_and_shows_no_password(capsys, url):
    assert main(["doctor", "--teacher_url", url]) == 2
    written = capsys.readouterr()
    assert not written.out
    assert "s3cret" not in written.err
    assert "give " in written.err


def test_certificates_that_are_not_there_are_a_line(capsys, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.crt")
    code, found = lines(capsys, "--teacher_url", "http://127.0.0.1:9")
    assert (code, found["teacher"]["status"]) == (1, "fail")
    assert "SSL_CERT_FILE /nowhere/ca.crt: No such file" in found["teacher"]["detail"]


def test_clocks_that_disagree_are_told(capsys, monkeypatch):
    monkeypatch.setattr(doctor_teacher, "_now", lambda: datetime.now(UTC) + timedelta(hours=1))
    with StubTeacher().serving() as stub:
        _, found = lines(capsys, "--teacher_url", stub.url)
    assert found["teacher's clock"]["status"] == "warn"
    assert re.match(r"36\d\d s behind", found["teacher's clock"]["detail"])


def test_a_version_that_fits_but_is_not_the_tested_one_says_so(capsys, monkeypatch):
    known = doctor_machine._version
    monkeypatch.setattr(
        doctor_machine, "_version", lambda name: "99.0" if name == "tenacity" else known(name)
    )
    _, found = lines(capsys)
    assert found["tenacity"]["status"] == "ok"
    assert re.fullmatch(r"99\.0 \(>=9\.0; tested with 9\.\S+\)", found["tenacity"]["detail"])
    assert "tested" not in found["torch"]["detail"]


def test_a_named_teacher_is_called_by_its_name(capsys):
    with StubTeacher().serving() as stub:
        _, found = lines(capsys, "--teacher_url", f"math={stub.url}")
    assert found["teacher math"]["status"] == "ok"
    assert stub.url in found["teacher math"]["detail"]


def test_whatever_it_finds_is_exit_code_1_and_its_own_flags_are_2(capsys):
    code, found = lines(capsys, "--teacher_url", "http://127.0.0.1:9")  # nothing listens there
    assert (code, found["teacher"]["status"]) == (1, "fail")
    assert main(["doctor", "--model_name_or_path", "org/model"]) == 2
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit code 1 if a line says fail, 2 for a wrong flag" in text

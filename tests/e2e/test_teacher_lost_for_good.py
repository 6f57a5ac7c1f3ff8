"""One of two teachers dies for good: the run ends with a checkpoint, and goes on with a new one."""

import json
import signal

import pytest

from student_trainer.commands.main import main
from tests.e2e.test_distillation import flags
from tests.support import forked
from tests.support.http import until
from tests.support.server import running_server, server_running
from tests.support.trainer_process import assert_same_weights, checkpoints

NAMES = ("math", "code")
STEPS = 12
ALONE = ("--max-batch-tokens", "1")  # runs are compared to the bit


@pytest.fixture(scope="module")
def rows(unserved_world, tmp_path_factory):
    """The world's rows, every other one the coder's."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.loads(line) for line in unserved_world.rows.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["teacher"] = NAMES[number % 2]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("unreachable", ["stop", "wait"])
def test_a_run_says_which_teacher_is_lost_and_goes_on_with_another_of_the_same_weights(
    unserved_world, tmp_path, rows, capfd, unreachable
):
    def argv(output, *urls):
        options = {
            "lmbda": 0.5, "max_steps": STEPS, "learning_rate": 1e-3, "top_k_logprobs": 16,
            "dataset_name": rows, "teacher_timeout": 4, "teacher_unreachable": unreachable,
            "resume_from_checkpoint": "auto", "logging_steps": 1,
        }  # fmt: skip
        served = [f"{name}={url}" for name, url in zip(NAMES, urls, strict=True)]
        return ["distill", *flags(unserved_world, tmp_path / output, **options),
                "--teacher_url", *served]  # fmt: skip

    with running_server(unserved_world.teacher, *ALONE) as math:
        with server_running(unserved_world.teacher, *ALONE) as code:
            assert main(argv("whole", math, code.url)) == 0
            process = forked.start(main, argv("lost", math, code.url), tmp_path / "said.txt")
            try:
                log = tmp_path / "lost" / "_log_history.jsonl"
                until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
                code.process.send_signal(signal.SIGKILL)
                assert process.wait(60) == 1
            finally:
                process.kill()
        said = (tmp_path / "said.txt").read_text()
        [step] = checkpoints(tmp_path / "lost")
        assert 0 < step < STEPS
        assert f"no answer from the teacher code at {code.url}" in said
        assert ("within 4 s" in said) == (unreachable == "wait")
        assert "--resume_from_checkpoint auto goes on" in said
        assert math not in said.split("no answer from")[1]
        capfd.readouterr()
        # Without it the run waits before anything is learned, and says for whom.
        assert main(argv("lost", math, code.url)) == 1
        said = capfd.readouterr().err
        assert f"the teacher code at {code.url} is not reachable" in said
        assert checkpoints(tmp_path / "lost") == [step]
        with running_server(unserved_world.teacher, *ALONE) as again:
            assert main(argv("lost", math, again)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "lost")

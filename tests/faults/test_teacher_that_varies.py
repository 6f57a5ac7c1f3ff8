"""A teacher that answers the same question twice differently."""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from shared import wire
from shared.errors import TeacherAnswerError
from shared.protocol import InfoResponse, ScoreRequest, ScoreResponse
from student_trainer.commands.main import main
from student_trainer.data.sample import Example
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.repeatability import check_repeats
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support import stub
from tests.support.paced import scores_of


@dataclass
class Varying:
    """Noise in each answer, as of dropout that was left on."""

    info: InfoResponse
    noise: float  # share of the named tokens' probability that is lost, at most
    asked: int = 0

    def get(self, path):
        return stub.packed(self.info) if path == "/v1/info" else (200, {}, b"{}")

    def post(self, path, body):
        request = wire.load(ScoreRequest, body, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 28)
        self.asked += 1
        rng = np.random.default_rng(self.asked)
        sequences = []
        for sequence in request.sequences:
            exact = scores_of(sequence, self.info.vocab_size, request.top_k)
            lost = np.log1p(-rng.uniform(0, self.noise, len(exact))).astype(np.float32)
            given = {
                "next_token_logprob": exact.next_token_logprob + lost,
                "logprobs": exact.logprobs + lost[:, None],
            }
            sequences.append(exact.model_copy(update=given))
        return stub.packed(
            ScoreResponse(sequences=sequences, teacher=self.info.teacher, request_id="r")
        )


@pytest.fixture
def varying(teacher_info):
    return lambda noise: Varying(teacher_info, noise)


def test_it_is_refused_before_training_with_both_numbers(command, varying, tmp_path, capsys):
    teacher = varying(0.9)
    with stub.serving(teacher) as url:
        assert main(command(url, tmp_path / "out", max_steps=1)) == 1
        said = capsys.readouterr().err
        assert re.search("the teacher scored .* twice, and gave", said)
        once, again = re.search(r"the probability (0\.\d+), then (0\.\d+)", said).groups()
        assert abs(float(once) - float(again)) > 0.05
        assert "--teacher_repeat_tolerance is 0.05" in said
        assert teacher.asked == 2
        assert not (tmp_path / "out").exists()
        accepted = command(url, tmp_path / "out", max_steps=1, teacher_repeat_tolerance=1)
        assert main(accepted) == 0


def test_rounding_is_no_reason_to_refuse_it(command, varying, tmp_path):
    with stub.serving(varying(0.01)) as url:
        assert main(command(url, tmp_path / "out", max_steps=1)) == 0


def test_a_cache_does_not_hide_it(command, varying, tmp_path, capsys):
    """Its answers are all kept; it is asked all the same, unless it is switched off."""
    options = {"lmbda": 0, "rollout_staleness": 0, "max_steps": 2, "save_strategy": "no",
               "teacher_cache": tmp_path / "cache", "resume_from_checkpoint": "false",
               "overwrite_output_dir": "true"}  # fmt: skip
    teacher = varying(0.0)
    with stub.serving(teacher) as url:
        words = command(url, tmp_path / "out", **options)
        assert main(words) == 0
        asked, teacher.noise = teacher.asked, 0.9
        assert main(words) == 1
        assert re.search("the teacher scored .* twice, and gave", capsys.readouterr().err)
        assert teacher.asked == asked + 2
    assert main(words) == 0
    assert teacher.asked == asked + 2


def test_prompts_of_one_token_hide_it_no_more(varying):
    example = Example(0, "row 1", np.array([5], np.uint32), None, None, "one token")
    method = DistillationConfig(
        lmbda=1.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(), top_k=4,
        max_new_tokens=8, seed=0, stop_ids=(1,),
    )  # fmt: skip
    with stub.serving(varying(0.5)) as url, SparseGkdTeacher([url]) as client:
        client.connect()
        with pytest.raises(TeacherAnswerError, match="row 1"):
            check_repeats(client, [example], method, tolerance=0.01)

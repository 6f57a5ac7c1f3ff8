"""A student that a teacher without a model distils, and what it becomes if nothing goes wrong."""

import pytest
from transformers import AutoTokenizer

from shared.identity import tokenizer_identity
from student_trainer.commands.main import main
from tests.support import stub
from tests.support.paced import PacedTeacher
from tests.support.world import make_world

STEPS = 10  # an epoch has 6


@pytest.fixture(scope="session")
def unserved_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def teacher_info(unserved_world):
    tokenizer = tokenizer_identity(AutoTokenizer.from_pretrained(unserved_world.student))
    return stub.info(tokenizer=tokenizer, vocab_size=260, max_model_len=256)


@pytest.fixture(scope="session")
def serving(teacher_info):
    """Serves a teacher whose scores depend on the tokens alone; calls something at each request."""

    def serve(on_request=lambda number: None):
        asked = []

        def seconds_for(tokens):
            asked.append(tokens)
            on_request(len(asked))
            return 0.0

        return stub.serving(PacedTeacher(teacher_info, seconds_for, one_at_a_time=False))

    return serve


@pytest.fixture(scope="session")
def command(unserved_world):
    """The words of an on-policy run whose rollouts are a step ahead."""

    def words(url, output, **options):
        settings = {
            "model_name_or_path": unserved_world.student,
            "dataset_name": unserved_world.rows,
            "output_dir": output,
            "teacher_url": url,
            "teacher_timeout": 20,
            "top_k_logprobs": 16,
            "max_new_tokens": 12,
            "lmbda": 1,
            "rollout_staleness": 1,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "resume_from_checkpoint": "auto",
            "report_to": "none",
            "disable_tqdm": "true",
            **options,
        }
        return ["distill", *(f"--{name}={value}" for name, value in settings.items())]

    return words


@pytest.fixture(scope="session")
def whole(command, serving, tmp_path_factory):
    """The folder of the run that nothing happened to, all its checkpoints, and its requests."""
    output, asked = tmp_path_factory.mktemp("whole"), []
    with serving(asked.append) as url:
        assert main(command(url, output, save_total_limit=STEPS)) == 0
    return output, len(asked)

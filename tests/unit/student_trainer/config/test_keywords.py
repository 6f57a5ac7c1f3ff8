"""Errors of the Python functions name keywords, in the place of flags."""

import pytest

from shared.errors import ConfigurationError, InvalidRequestError
from student_trainer.config.keywords import in_keywords, keywords_in_errors


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--teacher_url is missing", "teacher_url= is missing"),
        ("--beta 2.0 must be from 0 to 1", "beta=2.0 must be from 0 to 1"),
        ("--learning_rate 1e-05: too low", "learning_rate=1e-05: too low"),
        ("add --use_peft", "add use_peft=True"),
        ("--bf16_full_eval True has no effect", "bf16_full_eval=True has no effect"),
        (
            "--tail renormalize has no effect with --teacher_support sampled",
            "tail='renormalize' has no effect with teacher_support='sampled'",
        ),
        ("--teacher_url 'host' must", "teacher_url='host' must"),
        ("--model_name_or_path ./x: no", "model='./x': no"),
        ("needs --eval_dataset_name", "needs eval_dataset="),
        ("run `merge --output_dir DIR`; drop --max_steps", None),
        ("serve with --max-logprobs 9 or --api-key-file", None),
    ],
)
def test_flags_become_keywords(message, expected):
    parameters = {"model_name_or_path": "model", "eval_dataset_name": "eval_dataset"}
    found = in_keywords(message, parameters, {"model_name_or_path": "./x"})
    assert found == (expected or message.replace("--max_steps", "max_steps="))


def test_an_error_keeps_its_class_and_its_detail():
    with pytest.raises(InvalidRequestError, match="max_steps=3") as caught, keywords_in_errors():
        raise InvalidRequestError("--max_steps 3", field="f")
    assert (caught.value.detail, caught.value.field) == ("max_steps=3", "f")

    @keywords_in_errors()
    def fail(value: int) -> None:
        raise ConfigurationError(f"--max_steps {value}")

    for value in (1, 2):
        with pytest.raises(ConfigurationError, match=f"^max_steps={value}$"):
            fail(value)

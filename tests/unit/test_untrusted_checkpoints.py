"""A checkpoint is data: loading one runs none of its code, on either side."""

import json
import os
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigurationError
from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_config, load_model, load_tokenizer
from teacher_server.backends.transformers import TransformersBackend
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model as load_plainly

LOADERS = {
    "teacher": lambda folder: TransformersBackend(Settings(str(folder)), Metrics()),
    "student": lambda folder: load_model(ModelArguments(str(folder))),
    "student's tokenizer": lambda folder: load_tokenizer(ModelArguments(str(folder))),
    "student's config": lambda folder: load_config(ModelArguments(str(folder))),
}


class Exploit:
    """Pickled, it is a command that unpickling runs."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path / "model")
    save_model(tmp_path / "model")
    return tmp_path / "model"


def as_pickle(folder, **more):
    """The same weights in pytorch_model.bin, and ``more`` beside them."""
    state = load_plainly(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({**state, **more}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_weights_in_a_pickle_load_as_weights_only(folder, tmp_path, side):
    as_pickle(folder)
    LOADERS[side](folder)
    mark = tmp_path / "exploited"
    save_model(folder)
    as_pickle(folder, exploit=Exploit(mark))
    with pytest.raises(ConfigurationError, match="does not load"):
        LOADERS[side](folder)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap was set
    assert mark.exists()


@pytest.mark.parametrize("side", LOADERS)
def test_code_in_a_checkpoint_is_refused_and_not_run(folder, tmp_path, side):
    mark = tmp_path / "exploited"
    trap = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    names = {"AutoConfig": "C", "AutoModelForCausalLM": "M", "AutoTokenizer": ["T", None]}
    (folder / "trap.py").write_text(trap)
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        auto_map = {
            auto: [f"trap.{name[0]}", None] if isinstance(name, list) else f"trap.{name}"
            for auto, name in names.items()
        }
        content |= {"model_type": "trap", "tokenizer_class": "Trap", "auto_map": auto_map}
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        LOADERS[side](folder)
    assert not mark.exists()


def test_adapters_in_a_pickle_load_as_weights_only(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapters, mark = tmp_path / "adapters", tmp_path / "exploited"
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(load_plainly(folder), lora)
    model.save_pretrained(adapters)
    (adapters / "adapter_model.safetensors").unlink()
    torch.save({"exploit": Exploit(mark)}, adapters / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="adapters do not load: Weights only load failed"):
        load_model(ModelArguments(str(adapters)))
    assert not mark.exists()


def test_no_file_of_ours_asks_for_more():
    """One call of ``torch.load`` or pickle would undo all of the above."""
    root = Path(__file__).parents[2]
    packages = [root / name for name in ("shared", "teacher_server", "student_trainer")]
    found = [
        f"{path.name}: {word}"
        for package in packages
        for path in package.rglob("*.py")
        for word in ("import pickle", "torch.load(", "weights_only=False", "yaml.load(", "marshal")
        if word in path.read_text()
    ]
    assert found == []

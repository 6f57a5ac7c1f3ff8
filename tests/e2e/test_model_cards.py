"""The folder of a run is a model that others can take: it loads, and tells what it is."""

import pytest
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, trainer

from student_trainer.commands.main import main
from tests.e2e.test_distillation import distill, flags


def test_a_distilled_folder_loads_and_names_teacher_and_numbers(world, tmp_path):
    assert distill(world, tmp_path / "out", max_steps=1, lmbda=1) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert "The teacher was `teacher` (`float32`, `transformers" in card.text
    assert "| divergence in training, nats a token |" in card.text
    assert str(tmp_path) not in card.content
    assert world.url not in card.content
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 260


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_pushed_to_the_hub_has_the_card(unserved_world, tmp_path, monkeypatch, adapters):
    pushed = []

    class Repository:
        repo_id = "org/student"

    class Hub:
        def create_repo(self, *_, **__):
            return Repository

        def upload_folder(self, *, folder_path, ignore_patterns, **options):
            pushed.append((ModelCard.load(f"{folder_path}/README.md"), ignore_patterns))

    monkeypatch.setattr(trainer, "hf_api", Hub)
    options = {"use_peft": "true"} if adapters else {}
    hub = {"push_to_hub": "true", "hub_strategy": "end", "hub_model_id": "org/student"}
    words = flags(unserved_world, tmp_path, max_steps=1, **hub, **options)
    assert main(["sft", *words]) == 0
    card, ignored = pushed[-1]
    assert card.text.strip().startswith("# student\n")
    assert card.data.library_name == ("peft" if adapters else "transformers")
    assert "_*" in ignored  # what quotes held-out rows stays here
    if adapters:
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path).peft_config

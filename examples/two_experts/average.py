"""Average the weights of several models of one shape, adapters merged, into one model.

python -m examples.two_experts.average --models programs-lora problems-lora --output_dir average
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders of models or adapters")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    average(arguments.models, arguments.output_dir)


@torch.no_grad()
def average(folders: Sequence[str], output: Path) -> None:
    """Write the model whose every weight is the mean of that weight in the models.

    Raises:
        ValueError: the models have different weights, by name or by shape.
    """
    sources = [
        ModelArguments(model_name_or_path=folder, torch_dtype="checkpoint") for folder in folders
    ]
    first, *others = (load_model(source) for source in sources)
    weights = {name: weight.double() for name, weight in first.state_dict().items()}
    for folder, other in zip(folders[1:], others, strict=True):
        added = other.state_dict()
        shapes = {name: weight.shape for name, weight in added.items()}
        if shapes != {name: weight.shape for name, weight in weights.items()}:
            raise ValueError(
                f"{folder} has other weights than {folders[0]}; give models of one base"
            )
        for name, weight in added.items():
            weights[name] += weight.double()
    for name, weight in first.state_dict().items():
        weight.copy_(weights[name] / len(folders))
    first.save_pretrained(output)
    load_tokenizer(sources[0]).save_pretrained(output)


if __name__ == "__main__":
    main()

"""Write a published model with some of its layers, or with all, in float32.

    python -m examples.pruned_coder.prune --output_dir DIR --layers 12

The model is Qwen2.5-Coder-0.5B-Instruct, from the Hub or from the folder that the environment
variable PRUNED_CODER_MODEL names. The output layer is also the embedding, as it was published; some
copies of the model hold it twice.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import ModuleList
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_models import keep_in_config, kept_layers

PUBLISHED = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=os.environ.get("PRUNED_CODER_MODEL") or PUBLISHED)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="how many to keep; default: all")
    arguments = parser.parse_args()
    try:
        prune(arguments.model, arguments.output_dir, arguments.layers)
    except ValueError as error:
        parser.error(str(error))


def prune(model: str, folder: Path, layers: int | None = None) -> None:
    """Write the model with so many evenly spaced layers, the first and the last included.

    Raises:
        ValueError: fewer than 2 layers, or more than the model has.
    """
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    decoder = whole.get_decoder()
    total = len(decoder.layers)
    kept = kept_layers(total, total if layers is None else layers)
    keep_in_config(whole.config, kept)
    decoder.layers = ModuleList(decoder.layers[number] for number in kept)
    with torch.no_grad():
        whole.get_input_embeddings().weight.copy_(whole.get_output_embeddings().weight)
    whole.config.tie_word_embeddings = True
    whole.tie_weights()
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


if __name__ == "__main__":
    main()

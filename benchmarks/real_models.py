"""Students of published models: every n-th layer of a model, with its tokenizer.

    python -m benchmarks.real_models prune MODEL OUT --layers 12

Benchmarks on real language models need a smaller student that shares the teacher's tokenizer. This
one keeps layers that are evenly spaced, the first and the last among them, and all else as it is:
embedding, output layer, norms, and what the configuration says of each layer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("REAL_MODELS") or Path.home() / ".cache" / "real-models")
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def kept_layers(total: int, layers: int) -> list[int]:
    """Return the numbers of ``layers`` of ``total`` layers, evenly spaced, first and last included.

    Raises:
        ValueError: there are not so many layers, or fewer than 2 are to be kept.
    """
    if not 2 <= layers <= total:
        raise ValueError(f"--layers {layers}: the model has {total}; keep 2 to {total}")
    return [round(place * (total - 1) / (layers - 1)) for place in range(layers)]


def prune(model: Path, out: Path, layers: int, dtype: str = "auto") -> list[int]:
    """Write ``model`` with so many of its layers into ``out``; return their numbers.

    Args:
        dtype: of the weights written: bfloat16, float32, …, or auto for the model's own.

    Raises:
        ValueError: see `kept_layers`, or ``out`` has files already.
    """
    from torch.nn import ModuleList
    from transformers import AutoModelForCausalLM

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} has files already; name a new folder")
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    decoder = whole.get_decoder()
    kept = kept_layers(len(decoder.layers), layers)
    keep_in_config(whole.config.get_text_config(), kept)
    decoder.layers = ModuleList(decoder.layers[number] for number in kept)
    whole.save_pretrained(out)
    for file in model.iterdir():  # the tokenizer's and the template's
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    return kept


def keep_in_config(config: Any, kept: list[int]) -> None:
    """Change a configuration in place to the layers ``kept``: their number, and lists by layer."""
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == total:
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "prune", help="write a model with fewer layers"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="folder of the whole model")
    command.add_argument("out", type=Path, metavar="OUT", help="new folder")
    command.add_argument("--layers", type=int, required=True, help="how many to keep")
    command.add_argument("--dtype", default="auto", help="of the weights; default the model's own")
    arguments = parser.parse_args()
    try:
        kept = prune(arguments.model, arguments.out, arguments.layers, arguments.dtype)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{arguments.out}: layers {' '.join(map(str, kept))}\n")


if __name__ == "__main__":
    main()

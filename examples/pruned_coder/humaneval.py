"""Write HumanEval's problems as they are published.

    python -m examples.pruned_coder.humaneval --output_dir DIR

They are from the Hub, or from the file that the environment variable PRUNED_CODER_HUMANEVAL names
(HumanEval.jsonl or HumanEval.jsonl.gz). The folder then holds humaneval.jsonl.
"""

import argparse
import gzip
import json
import os
from pathlib import Path

from examples.mini_humaneval.folder import Row, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    file = os.environ.get("PRUNED_CODER_HUMANEVAL")
    write_rows(folder, {"humaneval": _from_file(Path(file)) if file else _from_hub()})


def _from_file(path: Path) -> list[Row]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.splitlines()]


def _from_hub() -> list[Row]:
    from datasets import load_dataset

    return list(load_dataset("openai/openai_humaneval", split="test"))


if __name__ == "__main__":
    main()

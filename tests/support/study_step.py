"""The command of a study's cells in tests, whose flags say what to do.

It writes ``value.txt``, the sum of ``--add`` and of the values in its ``--inputs``, and
``results.json`` (its negative as ``loss``), and appends a line to ``--journal``. With ``--weights``
it also writes a file in the place of a model's weights, and reads those of its inputs.
"""

import argparse
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--inputs", type=Path, nargs="*", default=[])
parser.add_argument("--add", type=float, default=0.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--journal", type=Path)
parser.add_argument("--wait_for", type=Path)
parser.add_argument("--weights", default=None)
arguments = parser.parse_args()

if arguments.journal:
    with arguments.journal.open("a") as file:
        file.write(f"{arguments.output_dir.parent.name}/{arguments.output_dir.name}\n")
arguments.output_dir.mkdir(parents=True)
(arguments.output_dir / "pid").write_text(str(os.getpid()))
while arguments.wait_for and not arguments.wait_for.exists():
    time.sleep(0.02)
if arguments.weights:
    for folder in arguments.inputs:
        (folder / "model.safetensors").read_text()
    (arguments.output_dir / "model.safetensors").write_text("weights")
read = sum(float((folder / "value.txt").read_text()) for folder in arguments.inputs)
value = read + arguments.add + arguments.seed
(arguments.output_dir / "value.txt").write_text(str(value))
(arguments.output_dir / "results.json").write_text(json.dumps({"pass@1": value, "loss": -value}))

"""lm-eval's own commands, as docs/how-to/benchmarks.md has them, on what a run leaves."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from student_trainer.commands.main import main
from tests.docs.test_commands import ROOT, blocks, commands
from tests.support import forked
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model
from tests.support.server import running_server

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Say {{{{question}}}}:"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
CONTINUED = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Say {{{{question}}}}:"
doc_to_target: "{{{{expected}}}}"
generation_kwargs: {{until: ["\\n", "{stop}"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
STOP = "e"
PAGE = (ROOT / "docs/how-to/benchmarks.md").read_text()


def lm_eval(argv):
    """Run the command `lm-eval`, which reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


class Bench:
    """The folders of a run, two local tasks, and the commands of the page."""

    def __init__(self, folder):
        self.folder = folder
        self.base, self.adapters, self.out = (folder / n for n in ("base", "adapters", "out"))
        found = [c for block in blocks(PAGE) if not block.language for c in commands(block)]
        self.commands = [c for c in found if c.startswith("lm-eval run")]

    def run(self, number, tasks, *more, url="", **replaced):
        """(metrics, samples) by task, of a command of the page with ``more`` at its end."""
        words = shlex.split(self.commands[number])[1:]
        output = self.folder / f"scores-{number}"
        words[words.index("--tasks") + 1] = tasks
        words[words.index("--output_path") + 1] = str(output)
        arguments = words.index("--model_args") + 1
        words[arguments] = ",".join(
            f"{key}={replaced.get(key, value)}".replace("http://localhost:8000", url)
            for key, value in (pair.split("=", 1) for pair in words[arguments].split(","))
        )
        words += more
        words += ["--include_path", str(self.folder / "tasks")]
        [done] = forked.run(lm_eval, words)
        assert done.returncode == 0, done.stderr
        (results,) = output.glob("*/results_*.json")
        metrics = json.loads(results.read_text())["results"]
        samples = {}
        for task in tasks.split(","):
            (file,) = output.glob(f"*/samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[task] = sorted(rows, key=lambda row: row["doc_id"])
        return metrics, samples


def greedy(model, ids, count):
    with torch.inference_mode():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model that writes letters alone, so that its answers are text; adapters; both merged.

    Its chat template reads ``enable_thinking``.
    """
    bench = Bench(tmp_path_factory.mktemp("lm_eval"))
    tokenizer = save_tokenizer(bench.base)
    tokenizer.chat_template += "{% if enable_thinking is false %}I say: {% endif %}"
    save_model(bench.base)
    model = load_model(bench.base)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    silent = [i for i in range(260) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0
    model.save_pretrained(bench.base)
    torch.manual_seed(5)
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(load_model(bench.base), lora).save_pretrained(bench.adapters)
    tokenizer.save_pretrained(bench.adapters)
    flags = [f"--model_name_or_path={bench.adapters}", f"--output_dir={bench.out}"]
    assert main(["merge", *flags]) == 0

    model, rows = load_model(bench.out), bench.folder / "rows.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(bench.out)
    with rows.open("w") as file:
        for number in range(9):
            question = chr(ord("a") + number) * 3
            ids = tokenizer(f"Say {question}:")["input_ids"]
            written = tokenizer.decode(greedy(model, ids, 12)[len(ids) :])
            choices = ["zebra", "word", written[:4]]
            # A third of the answers is another than the model would give.
            answer = choices.index("zebra" if number % 3 == 0 else written[:4])
            expected = "wrong" if number % 3 == 0 else written.split(STOP)[0]
            row = {"question": question, "choices": choices, "answer": answer}
            file.write(json.dumps({**row, "expected": expected, "written": written}) + "\n")
    (bench.folder / "tasks").mkdir()
    for name, text in (("choices", CHOICES), ("continued", CONTINUED)):
        path = bench.folder / "tasks" / f"{name}.yaml"
        path.write_text(text.format(rows=rows, stop=STOP))
    return bench


@pytest.fixture(scope="module")
def url(bench):
    with running_server(bench.out) as url:
        yield url


BOTH = "choices,continued"


@pytest.fixture(scope="module")
def by_hf(bench):
    return bench.run(0, BOTH, pretrained=bench.out)


def likelihoods(samples):
    """[(log-likelihood, whether it is the greedy answer)] of all choices."""
    found = [response for row in samples["choices"] for (response,) in row["resps"]]
    return [(float(value), greedy == "True") for value, greedy in found]


def check_the_same(found, expected):
    (metrics, samples), (their_metrics, their_samples) = found, expected
    for task, metric in (("choices", "acc,none"), ("continued", "exact_match,none")):
        assert metrics[task][metric] == their_metrics[task][metric]
    ours, theirs = likelihoods(samples), likelihoods(their_samples)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    texts = [[row["resps"] for row in of["continued"]] for of in (samples, their_samples)]
    assert texts[0] == texts[1]


def test_a_folder_is_measured_by_transformers(by_hf):
    metrics, samples = by_hf
    assert metrics["choices"]["acc,none"] == pytest.approx(6 / 9)
    assert metrics["continued"]["exact_match,none"] == pytest.approx(6 / 9)
    assert [greedy for _, greedy in likelihoods(samples)] == [False, False, True] * 9
    texts = [(row["doc"]["written"], row["resps"][0][0]) for row in samples["continued"]]
    assert [text for _, text in texts] == [written.split(STOP)[0] for written, _ in texts]
    assert any(STOP in written for written, _ in texts)


def test_adapters_are_measured_on_their_base_model(bench, by_hf):
    replaced = {"pretrained": bench.base, "peft": bench.adapters, "tokenizer": bench.adapters}
    check_the_same(bench.run(1, BOTH, **replaced), by_hf)


def test_the_served_model_has_the_same_figures(bench, url, by_hf):
    replaced = {"model": bench.out, "tokenizer": bench.out, "max_length": 256}
    check_the_same(bench.run(2, BOTH, url=url, **replaced), by_hf)


def test_the_server_applies_its_own_chat_template(bench, url):
    arguments = {"pretrained": f"{bench.out},enable_thinking=False"}
    _, expected = bench.run(3, "continued", **arguments)
    prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in expected["continued"]]
    assert prompts[0] == "<|user|>Say aaa:<|end|><|assistant|>I say: "
    (kwargs,) = re.findall(r"--gen_kwargs '(.+?)'", PAGE)
    _, found = bench.run(4, "continued", "--gen_kwargs", kwargs, url=url, model=bench.out)
    assert [row["resps"] for row in found["continued"]] == [
        row["resps"] for row in expected["continued"]
    ]


def test_the_task_of_the_page_is_one(bench):
    (task,) = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    path = bench.folder / "tasks" / "arithmetic_rows.yaml"
    path.write_text(task)
    validate = [str(Path(sys.executable).with_name("lm-eval")), "validate"]
    words = [*validate, "--tasks", "arithmetic_rows", "--include_path", str(path.parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

"""The numbers in docs/explanation/results-real.md are those of the JSON files in docs/results/."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "explanation" / "results-real.md"


def section(title):
    """The table of a section, as lists of cells without its head."""
    text = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def read(name):
    return json.loads((DOCS / "results" / name).read_text())


def words(page):
    return re.sub(r"\s+", " ", page.read_text())


def test_starts_of_a_disjoint_student():
    found = read("plateau.json")
    fields = ("forward_kl", "jsd", "reverse_kl", "student_mass")
    states = {"none": found["before"]}
    states |= {f"`--beta {name}`": after for name, after in found["after"].items()}
    assert section("Where a disjoint student can start") == [
        [name, *(f"{state[field]:.2g}" for field in fields)] for name, state in states.items()
    ]
    norms = found["gradient_norm"]
    told = ", ".join([
        f"{norms['0']:,.0f} at beta 0",
        *(f"{norms[beta]:.1f} at {beta}" for beta in ("0.1", "0.5", "0.9", "1")),
    ])  # fmt: skip
    assert told in words(PAGE)
    assert f"That of JSD is {norms['0'] / norms['0.5']:.0f} times smaller" in words(PAGE)
    assert f"that of reverse KL {norms['0'] / norms['1']:.0f} times" in words(PAGE)
    said = f"forward KL had {norms['0'] / norms['0.5']:.0f} times the gradient of 0.5"
    assert said in words(DOCS / "how-to" / "choose.md")


def test_the_readme_says_the_same():
    said = "a cosine of .92 to .999 to the dense one"
    assert said in words(PAGE)
    assert said in words(DOCS.parent / "README.md")


def test_accuracy_of_the_sparse_divergence():
    found = read("accuracy_real.json")
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    shown = {
        (
            one["model"], one["state"], one["completions"], f"{one['temperature']:g}",
            one["support"], one["tail"], str(one["k"]),
            *(f"{by_beta[beta]['gradient_cosine']:.4f}" for beta in (0.0, 0.5, 1.0)),
        )
        for one in rows
        if one["kind"] == "all"
        for by_beta in [{other["beta"]: other for other in rows if same(one, other)}]
    }  # fmt: skip
    table = section("What k costs on a real model")
    assert len(table) >= 8
    assert {tuple(row) for row in table} - shown == set()


def test_accuracy_on_more_texts_and_after_training():
    found = read("accuracy_real_texts.json")
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    title = "More texts, and a student after some training"
    table = section(title)
    assert len(table) == 15
    for state, completions, support, tail, k, *cosines in table:
        names = {"state": state, "completions": completions, "support": support, "tail": tail,
                 "k": int(k), "kind": "all", "temperature": 1.0}  # fmt: skip
        matching = {
            row["beta"]: f"{row['gradient_cosine']:.4f}"
            for row in rows
            if names.items() <= row.items()
        }
        assert [matching[beta] for beta in (0.0, 0.1, 0.5, 0.9, 1.0)] == cosines
    healed = [[float(x) for x in row[5:9]] for row in table if row[:1] + row[2:5] ==
              ["healed", "default", "bucket", "64"]]  # fmt: skip
    least = [f"{min(column):.3f}".removeprefix("0") for column in zip(*healed, strict=True)]
    said = f"at least {least[1]}, {least[2]} and {least[3]} at β = .1, .5 and .9"
    assert said in words(PAGE)


def same(one, other):
    names = ("model", "state", "completions", "temperature", "support", "tail", "k", "kind")
    return all(one[name] == other[name] for name in names)

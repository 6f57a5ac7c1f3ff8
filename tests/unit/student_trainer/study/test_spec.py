"""A fault in a study's file is named with the file and the key, before anything runs."""

from pathlib import Path

import pytest
import yaml

from shared.errors import ConfigurationError
from student_trainer.config.commands import ARGUMENTS
from student_trainer.study.flags import check_flags
from student_trainer.study.plan import make_plan, select
from student_trainer.study.spec import TRAINER_COMMANDS, load_study

STEP = "tests.support.study_step"
EXAMPLE = Path(__file__).parents[4] / "examples/mini_humaneval/study.yaml"
TWO_EXPERTS = EXAMPLE.parents[1] / "two_experts/study.yaml"


def write(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def step(**flags):
    return {"command": STEP, "flags": flags}


def distill(**flags):
    return {"command": "distill", "teacher": "t", "flags": flags}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cell": {}}, "cell: unknown key; did you mean cells?"),
        ({"cells": {"a": {"comand": "sft"}}}, "cells.a.comand: unknown key; did you mean command?"),
        ({"cells": {"a": {"command": "stf"}}}, "cells.a.command: 'stf' is none of sft, distill"),
        ({"cells": {"a b": step()}}, "cells.a b: a name has letters"),
        ({"cells": {"a": step()}, "seeds": ["x"]}, "seeds: ['x'] must be a list of whole numbers"),
        (
            {"cells": {"teacher": step(), "b": step(inputs="{taecher}")}},
            "cells.b.flags.inputs: unknown cell 'taecher'; did you mean teacher?",
        ),
        ({"cells": {"b": step()}, "drop_weights": "all"}, "drop_weights: 'all' must be true or"),
        ({"cells": {"b": distill()}}, "cells.b.teacher: unknown cell 't'; there is b"),
        ({"cells": {"b": {"command": "distill"}}}, "cells.b.teacher is missing"),
        (
            {"cells": {"a": step(), "b": {**distill(), "teacher": {"x": "a", "y": "c"}}}},
            "cells.b.teacher: unknown cell 'c'; there is a, b",
        ),
        (
            {"cells": {"a": step(), "b": {**distill(), "teacher": ["a"]}}},
            "cells.b.teacher: ['a'] is neither a cell nor `name: cell` lines",
        ),
        (
            {"cells": {"a": step(inputs="{b}"), "b": step(inputs="{c}"), "c": step(inputs="{a}")}},
            "cells.a: a cycle, a → b → c → a",
        ),
        ({"cells": {"a": step(output_dir="x")}}, "cells.a.flags.output_dir: the study sets it"),
        (
            {"cells": {"a": {**step(), "grid": {"add": [1, 1]}}}},
            "cells.a: a second cell named a.1",
        ),
        (
            {"cells": {"a": step()}, "tables": {"t": {"cells": ["b*"]}}},
            "tables.t.cells: 'b*' matches no cell; there is a",
        ),
        (
            {"cells": {"a": step()}, "tables": {"t": {"cells": ["a"], "x": "k"}}},
            "tables.t.x: the grid of a has no 'k'",
        ),
        (
            {"cells": {"a": step()}, "tables": {"t": {"cells": ["a"], "differences": [["a"]]}}},
            "tables.t.differences: ['a'] must be [cell, the cell it is held against]",
        ),
        (
            {"cells": {"a": step()}, "tables": {"t": {"cells": ["a"]}}, "measure": step()},
            "measure.flags: none has {model}",
        ),
    ],
)
def test_a_mistake_is_named_with_file_and_key(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigurationError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"top_k": 4, "lmbda": 1}, "cells.b.flags.top_k: distill has no such flag"),
        ({"lambda": 0.5}, "cells.b.flags.lambda: distill has no such flag. Did you mean lmbda?"),
        (
            {"max_steps": "many"},
            "cells.b.flags.max_steps: invalid int value",
        ),
        ({"tail": "drop"}, "cells.b.flags.tail: invalid choice: 'drop'"),
    ],
)
def test_a_bad_flag_is_found_before_anything_runs(tmp_path, flags, message):
    path = write(tmp_path, {"cells": {"t": step(), "b": distill(**flags)}})
    with pytest.raises(ConfigurationError) as caught:
        check_flags(load_study(path))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_every_command_with_flags_that_leaves_a_result_can_be_a_cell():
    assert {*TRAINER_COMMANDS, "precompute"} == set(ARGUMENTS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml: No such file"):
        load_study(tmp_path / "none.yaml")


def test_a_grid_makes_a_cell_for_each_combination(tmp_path):
    grid = [{"tail": ["bucket"], "k": [1, 16]}, {"tail": ["drop"], "k": [4], "teacher": "u"}]
    cells = {"t": step(), "u": step(), "b": {**distill(k=64, n=3), "grid": grid}}
    found = load_study(write(tmp_path, {"cells": cells})).cells
    assert list(found) == ["t", "u", "b.bucket.1", "b.bucket.16", "b.drop.4"]
    assert found["b.bucket.16"].flags == {"k": 16, "n": 3, "tail": "bucket"}
    assert found["b.bucket.16"].teachers == {"": "t"}
    assert found["b.drop.4"].teachers == {"": "u"}  # a scalar is set, and not named


def test_only_what_a_seed_flows_into_is_made_for_every_seed(tmp_path):
    cells = {
        "shared": step(seed=0),
        "seeded": step(seed="{seed}", inputs=["{shared}"]),
        "heir": step(inputs=["{seeded}"]),
    }
    plan = make_plan(load_study(write(tmp_path, {"cells": cells})), (0, 1))
    assert list(plan.jobs) == [
        "shared/shared", "seed-0/seeded", "seed-0/heir", "seed-1/seeded", "seed-1/heir",
    ]  # fmt: skip
    assert plan.jobs["seed-1/seeded"].argv == ("--seed=1", "--inputs", "{shared/shared}")


def test_cells_with_equal_commands_are_one_job(tmp_path):
    cells = {"a": step(add=1, seed=2), "b": step(seed=2, add=1), "c": step(add=2, seed=2)}
    plan = make_plan(load_study(write(tmp_path, {"cells": cells})), (0,))
    assert list(plan.jobs) == ["shared/a", "shared/c"]
    assert plan.folder_of["b", 0] == "shared/a"


def test_a_selected_cell_brings_its_inputs_and_its_measure(tmp_path):
    content = {
        "cells": {"a": step(), "b": step(inputs=["{a}"], add=1), "c": step(add=2)},
        "measure": step(inputs=["{model}"]),
        "tables": {"t": {"cells": ["b", "c"]}},
    }
    study = load_study(write(tmp_path, content))
    plan = make_plan(study, (0,))
    chosen = [job.cell.name for job in select(study, plan, (0,), ["b"])]
    assert chosen == ["a", "b", f"b.{STEP}"]
    chosen = [job.cell.name for job in select(study, plan, (0,), ["t"])]  # a table's name
    assert {"a", "b", "c"} < set(chosen)
    message = r"--only d matches no table and no cell of .*study\.yaml; there is t, a, b"
    with pytest.raises(ConfigurationError, match=message):
        select(study, plan, (0,), ["d"])


def test_an_evaluation_that_a_table_names_is_its_own_measure(tmp_path):
    old, new = ({"command": "evaluate", "flags": {"dataset_name": name}} for name in ("old", "new"))
    models = {"grid": {"model_name_or_path": ["{a}", "{b}"]}}
    content = {
        "cells": {"a": step(), "b": step(add=1), "old": old | models, "new": new | models},
        "measure": {"metric": "pass@1"},
        "tables": {"t": {"cells": ["new.*", "old.*"], "differences": [["old.b", "new.b"]]}},
    }
    study = load_study(write(tmp_path, content))
    assert list(study.cells) == ["a", "b", "old.a", "old.b", "new.a", "new.b"]
    assert study.cells["old.b"].flags == {"dataset_name": "old", "model_name_or_path": "{b}"}
    assert study.cells["old.b"].measures == "old.b"
    assert study.tables[0].differences == (("old.b", "new.b"),)
    plan = make_plan(study, (0,))
    chosen = [job.cell.name for job in select(study, plan, (0,), ["new.b"])]
    assert chosen == ["b", "new.b"]


def test_an_evaluation_and_the_measure_may_ask_a_teacher(tmp_path):
    evaluate = {"command": "evaluate", "flags": {"model_name_or_path": "{t}"}}
    content = {
        "cells": {"t": step(), "e": {**evaluate, "teacher": "t"}},
        "measure": {**evaluate, "flags": {"model_name_or_path": "{model}"}, "teacher": "t"},
        "tables": {"all": {"cells": ["t", "e"]}},
    }
    study = load_study(write(tmp_path, content))
    assert {name for name, cell in study.cells.items() if cell.teachers} == {"e", "t.evaluate"}
    assert study.cells["t.evaluate"].inputs() == ["t"]
    content["cells"]["e"]["command"] = "sft"
    with pytest.raises(ConfigurationError, match="only distill and evaluate ask one"):
        load_study(write(tmp_path, content))


def test_named_teachers_are_inputs_and_their_names_are_part_of_the_job(tmp_path):
    def planned(teacher):
        cells = {"t": step(), "u": step(add=1), "b": {**distill(), "teacher": teacher}}
        return make_plan(load_study(write(tmp_path, {"cells": cells})), (0,)).jobs["shared/b"]

    job = planned({"x": "t", "y": "u"})
    assert job.teachers == (("x", "shared/t"), ("y", "shared/u"))
    assert job.inputs == ("shared/t", "shared/u")
    others = [{"x": "u", "y": "t"}, {"x": "t", "z": "u"}, {"x": "t"}, "t"]
    assert len({job.digest, *(planned(other).digest for other in others)}) == 5


def test_a_change_reaches_descendants_and_nobody_else(tmp_path):
    def digests(add, content="rows"):
        (tmp_path / "data.txt").write_text(content)
        cells = {
            "a": step(add=add, journal=str(tmp_path / "data.txt")),
            "b": step(inputs=["{a}"]),
            "c": step(add=7),
        }
        plan = make_plan(load_study(write(tmp_path, {"cells": cells})), (0,))
        return {name: plan.jobs[folder].digest for (name, _), folder in plan.folder_of.items()}

    before = digests(1)
    for after in (digests(2), digests(1, content="other rows")):  # a flag; a file that it names
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"a", "b"}


def test_the_example_is_a_study_whose_flags_exist():
    study = load_study(EXAMPLE)
    check_flags(study)
    assert len(study.seeds) >= 5
    plan = make_plan(study, (0,))
    # The sweeps' middles are cells of the main table, and are not made twice.
    same = ["gkd.teacher_sft", "k.bucket.16", "lmbda.1.0", "beta.0.5"]
    assert {plan.folder_of[name, 0] for name in same} == {"seed-0/gkd.teacher_sft"}
    steps = {c.flags["max_steps"] for c in study.cells.values() if c.command == "distill"}
    assert steps == {study.cells["student_sft"].flags["max_steps"]}


def test_the_study_of_two_experts_gives_all_students_the_same_updates():
    study = load_study(TWO_EXPERTS)
    check_flags(study)
    assert len(study.seeds) >= 5
    assert study.metrics() == ["pass@1", "exact_match"]
    students = [cell for name, cell in study.cells.items() if name.startswith("from_")]
    flags = [dict(cell.flags) for cell in [*students, study.cells["sft"]] if not cell.measures]
    assert len(flags) == 5
    for key in ("max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps"):
        assert len({one[key] for one in flags}) == 1
    assert all(one == flags[0] for one in flags[:4])
    names = {"programs": "programs_expert", "problems": "problems_expert"}
    assert study.cells["from_both"].teachers == names


def test_the_study_of_samples_has_the_models_of_the_study():
    study, samples = load_study(EXAMPLE), load_study(EXAMPLE.with_name("samples.yaml"))
    check_flags(samples)
    made = {job.digest for job in make_plan(study, (0,)).jobs.values()}
    plan = make_plan(samples, (0,))
    same = ["teacher_sft", "student_sft", "supervised", "seq_kd", "warm.bucket.16"]
    for name in same:
        assert plan.jobs[plan.folder_of[name, 0]].digest in made

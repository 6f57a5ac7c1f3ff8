"""The file that keeps the batch of a step which is not finite."""

import numpy as np

from student_trainer.data.sample import Sample
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.training.nonfinite import load_batch, save_batch
from tests.support.stub import scores


def scored(teacher, prompt):
    ids = np.array([5, 6, 7, 1], np.uint32)
    sample = Sample(ids, 2, np.ones(2, bool), "dataset")
    own = None if prompt is None else np.array(prompt, np.uint32)
    return ScoredSample(sample, scores(2, 3), teacher=teacher, teacher_prompt_ids=own)


def test_the_teacher_and_what_it_alone_saw_are_kept(tmp_path):
    batch = [[scored(None, None), scored("code", [9, 8, 7])], [scored("math", [3])]]
    save_batch(tmp_path / "batch.npz", batch)
    found = load_batch(tmp_path / "batch.npz")
    assert [[one.teacher for one in part] for part in found] == [[None, "code"], ["math"]]
    prompts = [one.teacher_prompt_ids for part in found for one in part]
    assert prompts[0] is None
    assert [prompt.tolist() for prompt in prompts[1:]] == [[9, 8, 7], [3]]


def test_a_file_of_before_teachers_had_names_is_read(tmp_path):
    save_batch(tmp_path / "new.npz", [[scored("code", [9])]])
    with np.load(tmp_path / "new.npz") as file:
        old = {n: file[n] for n in file if not n.startswith(("teacher_name", "teacher_prompt"))}
    np.savez(tmp_path / "old.npz", **old)
    [[one]] = load_batch(tmp_path / "old.npz")
    assert (one.teacher, one.teacher_prompt_ids) == (None, None)

"""One generation batch from prompts to scored samples."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import DatasetError
from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from student_trainer.data import Example, Sample
from student_trainer.pipeline import Method, Pipeline
from student_trainer.rollouts import Rollout

METHOD = Method(
    lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0, temperature=1.0, top_k=2,
    max_new_tokens=4, seed=3, stop_ids=(1,),
)  # fmt: skip


def ids(*values):
    return np.array(values, dtype=np.uint32)


def example(index, completion=(8, 1)):
    prompt = ids(5, 10 + index)
    sample = None
    if completion is not None:
        mask = np.ones(len(completion), bool)
        sample = Sample(ids(*prompt, *completion), len(prompt), mask, "dataset")
    return Example(index, f"row {index}", prompt, sample, None, "text")


def scores_for(token_ids, start):
    rows = len(token_ids) - start
    return SparseLogprobs(
        token_ids=np.full((rows, 2), int(token_ids[0]) + len(token_ids)),
        logprobs=np.zeros((rows, 2), np.float32),
        next_token_logprob=np.zeros(rows, np.float32),
        tail_logprob=np.zeros(rows, np.float32),
    )


class RecordingTeacher:
    """Answers at once, and remembers what it was asked."""

    def __init__(self):
        self.scored, self.prompts, self.requested = [], [], []

    def submit_score(self, sequences, *, top_k, temperature, requested):
        self.scored.append([tuple(ids.tolist()) for ids, _ in sequences])
        self.requested.append(requested)
        future = Future()
        future.set_result([scores_for(ids, start) for ids, start in sequences])
        return future

    def submit_generate(self, prompts, **options):
        self.prompts += [tuple(p.tolist()) for p in prompts]
        future = Future()
        completions = []
        for prompt in prompts:
            written = ids(int(prompt[1]) + 20, 1)
            scores = None
            if options["top_k"] is not None:
                scores = scores_for(np.append(prompt, written), len(prompt))
            completions.append(Completion(token_ids=written, finish_reason="stop", scores=scores))
        future.set_result(completions)
        return future


class CountingRollouts:
    """Writes the request's key as completion, two prompts at a time, last ones first."""

    def __init__(self):
        self.versions = []

    def sync(self, weight_version):
        self.versions.append(weight_version)

    def generate(self, requests):
        order = list(range(len(requests)))[::-1]
        for first in range(0, len(order), 2):
            yield [
                (i, Rollout(ids(requests[i].key[2] + 30, 1), truncated=False))
                for i in order[first : first + 2]
            ]


def test_the_coin_falls_on_policy_with_probability_lmbda():
    for lmbda in (0.0, 0.3, 1.0):
        method = replace(METHOD, lmbda=lmbda)
        share = np.mean([method.on_policy(step) for step in range(4000)])
        assert abs(share - lmbda) < 0.03


def test_the_coin_depends_on_seed_and_step_alone():
    tosses = [replace(METHOD, lmbda=0.5).on_policy(step) for step in range(64)]
    again = [replace(METHOD, lmbda=0.5, top_k=9).on_policy(step) for step in range(64)]
    other = [replace(METHOD, lmbda=0.5, seed=4).on_policy(step) for step in range(64)]
    assert tosses == again
    assert tosses != other


def test_supervised_kd_scores_the_datasets_completions():
    teacher = RecordingTeacher()
    pipeline = Pipeline(METHOD, teacher, None)
    scored = pipeline.collect(pipeline.submit(0, [example(0), example(1)]))
    assert teacher.scored == [[(5, 10, 8, 1), (5, 11, 8, 1)]]
    assert [item.sample.source for item in scored] == ["dataset", "dataset"]


def test_sft_asks_no_teacher():
    pipeline = Pipeline(replace(METHOD, lmbda=1.0), None, None)
    scored = pipeline.collect(pipeline.submit(0, [example(0)]))
    assert scored[0].scores is None
    assert scored[0].sample.source == "dataset"


def test_rollouts_take_the_weights_of_their_step():
    rollouts = CountingRollouts()
    pipeline = Pipeline(replace(METHOD, lmbda=1.0), RecordingTeacher(), rollouts)
    for step in (7, 8):
        pipeline.collect(pipeline.submit(step, [example(0, completion=None)]))
    assert rollouts.versions == [7, 8]


def test_on_policy_groups_leave_as_they_finish_and_come_back_in_order():
    teacher = RecordingTeacher()
    pipeline = Pipeline(replace(METHOD, lmbda=1.0), teacher, CountingRollouts())
    examples = [example(i, completion=None) for i in range(5)]
    scored = pipeline.collect(pipeline.submit(7, examples))
    assert [len(group) for group in teacher.scored] == [2, 2, 1]
    assert [item.sample.token_ids.tolist() for item in scored] == [
        [5, 10 + i, 30 + i, 1] for i in range(5)
    ]
    for item in scored:
        assert item.scores.token_ids[0, 0] == 5 + len(item.sample.token_ids)
    assert {item.sample.source for item in scored} == {"student"}


def test_seq_kd_asks_for_each_prompt_once_and_reuses_the_completion():
    teacher = RecordingTeacher()
    pipeline = Pipeline(replace(METHOD, seq_kd=True), teacher, None)
    first = pipeline.collect(pipeline.submit(0, [example(0), example(1)]))
    assert teacher.scored == []  # the scores came with the completions
    second = pipeline.collect(pipeline.submit(1, [example(1), example(2)]))
    assert teacher.prompts == [(5, 10), (5, 11), (5, 12)]
    assert teacher.scored == [[(5, 11, 31, 1)]]
    assert second[0].sample.token_ids.tolist() == first[1].sample.token_ids.tolist()
    assert {item.sample.source for item in first + second} == {"teacher"}


def test_seq_kd_uses_what_other_ranks_shared():
    teacher = RecordingTeacher()
    written = {}

    def share(new):
        written.update(new)
        return written

    ranks = [Pipeline(replace(METHOD, seq_kd=True), teacher, None, share=share) for _ in range(2)]
    ranks[0].collect(ranks[0].submit(0, [example(0)]))
    ranks[1].collect(ranks[1].submit(0, [example(1)]))
    ranks[1].collect(ranks[1].submit(1, [example(0)]))
    assert teacher.prompts == [(5, 10), (5, 11)]


def propose(samples):
    """The last token of each sequence, in each row."""
    return [np.full((len(s.completion_mask), 1), s.token_ids[-2]) for s in samples]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_proposed_ids_are_requested_and_travel_with_the_sample(lmbda):
    teacher = RecordingTeacher()
    pipeline = Pipeline(replace(METHOD, lmbda=lmbda), teacher, CountingRollouts(), propose=propose)
    scored = pipeline.collect(pipeline.submit(0, [example(i) for i in range(3)]))
    for index, item in enumerate(scored):
        expected = 30 + index if lmbda else 8
        assert item.requested.tolist() == [[expected], [expected]]
    asked = [group[0, 0] for call in teacher.requested for group in call]
    assert sorted(asked) == ([30, 31, 32] if lmbda else [8, 8, 8])


def test_seq_kd_with_proposals_scores_the_whole_batch_in_a_second_call():
    """So that every rank makes one proposal a step, however many prompts it met before."""
    teacher, calls = RecordingTeacher(), []

    def counted(samples):
        calls.append(len(samples))
        return propose(samples)

    pipeline = Pipeline(replace(METHOD, seq_kd=True), teacher, None, propose=counted)
    for step, examples in enumerate([[0, 1], [1, 2], [1, 2]]):
        pending = pipeline.submit(step, [example(i) for i in examples])
        assert len(calls) == step  # not before the completions are there
        scored = pipeline.collect(pending)
        assert [item.requested[0, 0] for item in scored] == [30 + i for i in examples]
        assert all(item.scores is not None for item in scored)
    assert calls == [2, 2, 2]
    assert teacher.prompts == [(5, 10), (5, 11), (5, 12)]
    assert teacher.scored[0] == [(5, 10, 30, 1), (5, 11, 31, 1)]


def test_a_bare_prompt_off_policy_is_refused_by_name():
    pipeline = Pipeline(METHOD, RecordingTeacher(), None)
    with pytest.raises(DatasetError, match="row 4: no completion to learn from"):
        pipeline.submit(0, [example(4, completion=None)])


def test_seconds_are_reported_by_name():
    seconds = {}
    pipeline = Pipeline(
        replace(METHOD, lmbda=1.0), RecordingTeacher(), CountingRollouts(),
        clock=lambda name, value: seconds.update({name: value}),
    )  # fmt: skip
    pipeline.collect(pipeline.submit(0, [example(0)]))
    assert set(seconds) == {"generating", "teacher"}
    assert all(value >= 0 for value in seconds.values())

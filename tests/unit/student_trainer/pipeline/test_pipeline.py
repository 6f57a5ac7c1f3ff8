"""Generation batches from prompts to scored samples, and what is begun ahead."""

import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError, RolloutError
from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from student_trainer.data.generations import Generations
from student_trainer.data.sample import Example, Sample
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.pipeline import Pipeline
from student_trainer.pipeline.prefetched import load_prefetched, save_prefetched
from student_trainer.rollouts import Rollout, RolloutRequest
from student_trainer.runtime.timeline import Timeline
from student_trainer.teacher.named import Teachers

METHOD = DistillationConfig(
    lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(), top_k=2,
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
    """Remembers what it was asked; answers at once, or when told to."""

    def __init__(self, *, at_once=True):
        self.scored, self.prompts, self.requested, self.seeds = [], [], [], []
        self.at_once = at_once
        self.unanswered = []
        self.live = self  # there is no cache before it

    def submit(self, call, *arguments, **options):
        future = Future()
        answer = call(*arguments, **options)
        self.unanswered.append(lambda: future.set_result(answer))
        if self.at_once:
            self.unanswered.pop()()
        return future

    def score(self, sequences, options, *, requested):
        self.seeds.append(options.sample_seed)
        self.scored.append([tuple(ids.tolist()) for ids, _ in sequences])
        self.requested.append(requested)
        return [scores_for(ids, start) for ids, start in sequences]

    def generate(self, prompts, sampling):
        self.prompts += [tuple(p.tolist()) for p in prompts]
        completions = []
        for prompt in prompts:
            written = ids(int(prompt[1]) + 20, 1)
            scores = None
            if sampling.top_k is not None:
                scores = scores_for(np.append(prompt, written), len(prompt))
            completions.append(Completion(token_ids=written, finish_reason="stop", scores=scores))
        return completions


class CountingRollouts:
    """Writes the request's key as completion, two prompts at a time, last ones first."""

    elsewhere = False

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


class PatientRollouts(CountingRollouts):
    """Writes in processes of its own, one step's completions each time it is let."""

    elsewhere = True

    def __init__(self):
        super().__init__()
        self.let = threading.Semaphore(0)
        self.writing = False

    def sync(self, weight_version):
        assert not self.writing, "new weights in the middle of a completion"
        super().sync(weight_version)

    def generate(self, requests):
        self.writing = True
        assert self.let.acquire(timeout=30)
        yield from super().generate(requests)
        self.writing = False


def pipeline_of(method, teacher, rollouts=None, *, batches=(), **options):
    """Step t learns ``batches[t]``; lists of examples."""
    return Pipeline(method, teacher, rollouts, upcoming=lambda step: list(batches[step]), **options)


def collect(pipeline, step, last=0):
    batch = pipeline.take(step, last)
    samples = pipeline.samples(batch)
    return pipeline.scored(batch, range(len(samples)))


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
    pipeline = pipeline_of(METHOD, teacher, batches=[[example(0), example(1)]])
    scored = collect(pipeline, 0)
    assert teacher.scored == [[(5, 10, 8, 1), (5, 11, 8, 1)]]
    assert [item.sample.source for item in scored] == ["dataset", "dataset"]


def test_sft_asks_no_teacher():
    pipeline = pipeline_of(replace(METHOD, lmbda=1.0), None, batches=[[example(0)]])
    scored = collect(pipeline, 0)
    assert scored[0].scores is None
    assert scored[0].sample.source == "dataset"


def test_rollouts_take_the_weights_of_their_step():
    rollouts = CountingRollouts()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), RecordingTeacher(), rollouts, staleness=1,
        batches=[[example(i, completion=None)] for i in range(4)],
    )  # fmt: skip
    for step in (0, 1, 2):
        collect(pipeline, step, last=3)
    # Of step 0 and, ahead of it, of step 1; then always of the next one.
    assert rollouts.versions == [0, 0, 1, 2]


def test_an_engine_elsewhere_writes_the_next_step_while_one_trains():
    rollouts, teacher = PatientRollouts(), RecordingTeacher()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, rollouts, staleness=1,
        batches=[[example(i, completion=None)] for i in range(3)],
    )  # fmt: skip
    for step in range(3):
        rollouts.let.release()  # the first, and then the one begun a step before
        scored = collect(pipeline, step, last=2)
        assert scored[0].sample.token_ids[-2] == step + 30
        assert len(teacher.scored) == step + 1  # the next is being written, and not waited for
    assert rollouts.versions == [0, 0, 1]


def test_what_an_engine_elsewhere_writes_is_complete_in_a_checkpoint():
    rollouts = PatientRollouts()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), RecordingTeacher(), rollouts, staleness=1,
        batches=[[example(i, completion=None)] for i in range(3)],
    )  # fmt: skip
    rollouts.let.release()
    collect(pipeline, 0, last=2)
    threading.Timer(0.05, rollouts.let.release).start()
    [ahead] = pipeline.prefetched(1)
    assert [int(sample.token_ids[-2]) for sample in ahead.samples] == [31]


def test_ranks_wait_together_for_an_engine_before_a_checkpoint():
    """If it fails on one alone, the others would wait in the next collective operation."""
    rollouts, waits = PatientRollouts(), []

    def together(wait):
        waits.append(None)
        return wait()

    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), RecordingTeacher(), rollouts, staleness=1, together=together,
        batches=[[example(i, completion=None)] for i in range(3)],
    )  # fmt: skip
    rollouts.let.release()
    collect(pipeline, 0, last=2)
    waits.clear()
    rollouts.let.release()
    pipeline.finish_writing()
    assert len(waits) == 1
    pipeline.finish_writing()  # nothing is being written, on any rank
    assert len(waits) == 1


def test_a_failure_of_an_engine_elsewhere_stops_the_run():
    class Dead(PatientRollouts):
        def generate(self, requests):
            raise RolloutError("vLLM's engine is dead")

    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), RecordingTeacher(), Dead(), batches=[[example(0)]]
    )
    with pytest.raises(RolloutError, match="is dead"):
        collect(pipeline, 0)


def test_on_policy_groups_leave_as_they_finish_and_come_back_in_order():
    teacher = RecordingTeacher()
    batch = [example(i, completion=None) for i in range(5)]
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, CountingRollouts(), batches=[[]] * 7 + [batch]
    )
    scored = collect(pipeline, 7)
    assert [len(group) for group in teacher.scored] == [2, 2, 1]
    assert [item.sample.token_ids.tolist() for item in scored] == [
        [5, 10 + i, 30 + i, 1] for i in range(5)
    ]
    for item in scored:
        assert item.scores.token_ids[0, 0] == 5 + len(item.sample.token_ids)
    assert {item.sample.source for item in scored} == {"student"}
    assert {item.sample.weight_version for item in scored} == {7}


def test_each_completion_of_a_prompt_has_random_numbers_of_its_own():
    """The first has those of a run with one completion of each prompt."""
    keys = []

    class Keys(CountingRollouts):
        def generate(self, requests):
            keys.append([request.key for request in requests])
            yield from super().generate(requests)

    rows = [example(i, completion=None) for i in range(2)]
    for batch in (rows, [Generations(rows, 3)[place] for place in range(6)]):
        pipeline = pipeline_of(
            replace(METHOD, lmbda=1.0), RecordingTeacher(), Keys(), batches=[[], batch]
        )
        scored = collect(pipeline, 1)
        assert len(scored) == len(batch)
    alone, many = keys
    assert alone == [(3, 1, 0), (3, 1, 1)]
    assert many[::3] == alone
    assert len({RolloutRequest(ids(1), key).seed for key in many}) == 6


def test_rollouts_finished_together_are_asked_for_shortest_first():
    """As they are trained: rollouts are written, and so scored, in about that order."""

    class Together(CountingRollouts):
        def generate(self, requests):
            yield [(i, Rollout(ids(*[9] * length), False)) for i, length in enumerate((3, 1, 2, 1))]

    teacher = RecordingTeacher()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, Together(), request_size=2,
        batches=[[example(i, completion=None) for i in range(4)]],
    )  # fmt: skip
    collect(pipeline, 0)
    assert [[ids[1] - 10 for ids in request] for request in teacher.scored] == [[1, 3], [2, 0]]


def test_a_micro_batch_waits_for_its_own_scores_alone():
    teacher = RecordingTeacher(at_once=False)
    pipeline = pipeline_of(
        METHOD, teacher, batches=[[example(i) for i in range(4)]], request_size=2
    )
    batch = pipeline.take(0, 0)
    assert len(pipeline.samples(batch)) == 4  # known, and countable, before any score
    teacher.unanswered[0]()
    first = pipeline.scored(batch, [0, 1])
    assert [item.scores.token_ids[0, 0] for item in first] == [9, 9]
    assert [one.answer is None for one in batch.pending] == [True, True, False, False]
    assert all(one.scores is None for one in batch.pending)  # handed out, or not there yet
    assert not batch.pending[2].answer.done()
    teacher.unanswered[1]()
    assert pipeline.scored(batch, [2, 3])[1].sample.token_ids[1] == 13


def test_each_sample_gets_its_own_scores_out_of_a_request_of_several():
    """The request is in the order of the lengths, 1, 2, 0."""
    rows = [example(0, (1,)), example(1, (8, 8, 8, 1)), example(2, (8, 1))]
    scored = collect(pipeline_of(METHOD, RecordingTeacher(), batches=[rows], request_size=3), 0)
    assert [len(item.scores) for item in scored] == [1, 4, 2]
    assert [int(item.scores.token_ids[0, 0]) for item in scored] == [5 + 3, 5 + 6, 5 + 4]


def steps_begun(teacher):
    """The prompts of what was asked; `one_each` has prompt 10 + t in step t."""
    return [sequence[1] - 10 for request in teacher.scored for sequence in request]


def one_each(steps):
    return [[example(step)] for step in range(steps)]


def test_off_policy_batches_are_begun_so_many_steps_ahead_and_no_more():
    teacher = RecordingTeacher()
    pipeline = pipeline_of(METHOD, teacher, batches=one_each(6), prefetch_steps=2)
    begun = []
    for step in range(6):
        collect(pipeline, step, last=5)
        begun.append(len(steps_begun(teacher)))
    assert begun == [3, 4, 5, 6, 6, 6]
    assert steps_begun(teacher) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_rollouts_run_ahead_by_the_staleness_and_no_more(staleness):
    teacher = RecordingTeacher()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, CountingRollouts(), batches=one_each(6),
        staleness=staleness, prefetch_steps=5,
    )  # fmt: skip
    for step in range(6):
        scored = collect(pipeline, step, last=5)
        assert scored[0].sample.weight_version == max(0, step - staleness)
        assert max(steps_begun(teacher)) == min(step + staleness, 5)
    assert sorted(steps_begun(teacher)) == [0, 1, 2, 3, 4, 5]


def test_in_a_mixture_what_the_dataset_wrote_does_not_wait_for_rollouts():
    method = replace(METHOD, lmbda=0.5)
    off_policy = [step for step in range(1, 8) if not method.on_policy(step)]
    assert 0 < len(off_policy) < 7
    teacher = RecordingTeacher()
    pipeline = pipeline_of(
        method, teacher, CountingRollouts(), batches=one_each(8), prefetch_steps=7
    )
    collect(pipeline, 0, last=7)
    assert steps_begun(teacher) == [0, *off_policy]


def test_proposals_are_made_with_weights_no_older_than_the_staleness():
    for staleness in (0, 1):
        teacher = RecordingTeacher()
        pipeline = pipeline_of(
            METHOD, teacher, batches=one_each(4), propose=propose, prefetch_steps=3,
            staleness=staleness,
        )  # fmt: skip
        collect(pipeline, 0, last=3)
        assert max(steps_begun(teacher)) == staleness


class ProposingRollouts(PatientRollouts):
    """Proposes the id 40 + step beside each completion."""

    def generate(self, requests):
        for group in super().generate(requests):
            yield [
                (i, replace(rollout, proposed=np.full((1, 2), 40 + requests[i].key[1], np.uint32)))
                for i, rollout in group
            ]


def test_an_engine_that_proposes_still_writes_while_the_student_trains():
    rollouts, teacher, proposed = ProposingRollouts(), RecordingTeacher(), []
    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, rollouts, staleness=1, propose=proposed.append,
        batches=[[example(i, completion=None)] for i in range(3)],
    )  # fmt: skip
    for step in range(3):
        rollouts.let.release()
        [scored] = collect(pipeline, step, last=2)
        assert len(teacher.scored) == step + 1  # the next is being written, and not waited for
        assert scored.requested.tolist() == [[40 + step, 40 + step]]
        assert teacher.requested[-1][0].tolist() == [[40 + step, 40 + step]]
    assert proposed == []  # no forward pass of the student


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_what_was_begun_ahead_goes_through_a_file(tmp_path, lmbda):
    """With proposals, so that neither kind of batch can be made again from newer weights."""
    batches = [[example(i), example(i + 4, (8, 9, 1))] for i in range(4)]
    options = {"batches": batches, "staleness": 2, "propose": propose}
    method = replace(METHOD, lmbda=lmbda)
    before = pipeline_of(method, RecordingTeacher(), CountingRollouts(), **options)
    collect(before, 0, last=3)
    save_prefetched(tmp_path / "ahead.npz", before.prefetched(1))

    teacher = RecordingTeacher()
    after = pipeline_of(method, teacher, CountingRollouts(), **options)
    after.resume(load_prefetched(tmp_path / "ahead.npz"))
    assert len(teacher.scored) == 2  # steps 1 and 2 are on their way again
    for step in (1, 2, 3):
        for a, b in zip(collect(before, step, 3), collect(after, step, 3), strict=True):
            for name in ("token_ids", "completion_mask"):
                np.testing.assert_array_equal(getattr(a.sample, name), getattr(b.sample, name))
            for name in ("completion_start", "source", "truncated", "weight_version"):
                assert getattr(a.sample, name) == getattr(b.sample, name), name
            np.testing.assert_array_equal(a.requested, b.requested)
            np.testing.assert_array_equal(a.scores.token_ids, b.scores.token_ids)


def test_what_can_be_made_again_is_not_kept():
    pipeline = pipeline_of(METHOD, RecordingTeacher(), batches=one_each(3), prefetch_steps=2)
    collect(pipeline, 0, last=2)
    assert pipeline.prefetched(0) == []


def test_a_batch_is_kept_until_the_next_one_is_taken():
    """Its step may fail half-way: a checkpoint then keeps what the weights of before wrote."""
    method = replace(METHOD, lmbda=1.0)
    pipeline = pipeline_of(method, RecordingTeacher(), CountingRollouts(), batches=one_each(3))
    collect(pipeline, 0, last=2)
    assert [batch.step for batch in pipeline.prefetched(0)] == [0]
    collect(pipeline, 1, last=2)
    assert [batch.step for batch in pipeline.prefetched(0)] == [1]


def test_completions_of_other_rows_or_older_weights_are_not_gone_on_with():
    def pipeline(staleness, batches):
        return pipeline_of(
            replace(METHOD, lmbda=1.0), RecordingTeacher(), CountingRollouts(),
            batches=batches, staleness=staleness,
        )  # fmt: skip

    first = pipeline(1, one_each(3))
    collect(first, 0, last=2)
    with pytest.raises(ConfigurationError, match="for step 2, but this run has other rows"):
        pipeline(1, one_each(3)[::-1][1:] * 2).resume(first.prefetched(1))
    with pytest.raises(ConfigurationError, match="resume with --rollout_staleness 1"):
        pipeline(0, one_each(3)).resume(first.prefetched(1))


def test_seq_kd_asks_for_each_prompt_once_and_reuses_the_completion():
    teacher = RecordingTeacher()
    batches = [[example(0), example(1)], [example(1), example(2)]]
    pipeline = pipeline_of(replace(METHOD, seq_kd=True), teacher, batches=batches)
    first = collect(pipeline, 0)
    assert teacher.scored == []  # the scores came with the completions
    second = collect(pipeline, 1)
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

    method = replace(METHOD, seq_kd=True)
    ranks = [
        pipeline_of(method, teacher, batches=[[example(a)], [example(b)]], share=share)
        for a, b in ((0, 1), (1, 0))
    ]
    collect(ranks[0], 0)
    collect(ranks[1], 0)
    collect(ranks[1], 1)
    assert teacher.prompts == [(5, 10), (5, 11)]


def propose(samples):
    """The last token of each sequence, in each row."""
    return [np.full((len(s.completion_mask), 1), s.token_ids[-2]) for s in samples]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_proposed_ids_are_requested_and_travel_with_the_sample(lmbda):
    teacher = RecordingTeacher()
    pipeline = pipeline_of(
        replace(METHOD, lmbda=lmbda), teacher, CountingRollouts(), propose=propose,
        batches=[[example(i) for i in range(3)]],
    )  # fmt: skip
    scored = collect(pipeline, 0)
    for index, item in enumerate(scored):
        expected = 30 + index if lmbda else 8
        assert item.requested.tolist() == [[expected], [expected]]
    asked = [group[0, 0] for call in teacher.requested for group in call]
    assert sorted(asked) == ([30, 31, 32] if lmbda else [8, 8, 8])


def test_the_teacher_scores_a_group_with_proposed_ids_while_the_student_writes_the_next():
    teacher, asked = RecordingTeacher(), []

    class Watched(CountingRollouts):
        def generate(self, requests):
            for group in super().generate(requests):
                asked.append(len(teacher.scored))
                yield group

    pipeline = pipeline_of(
        replace(METHOD, lmbda=1.0), teacher, Watched(), propose=propose,
        batches=[[example(i) for i in range(3)]],
    )  # fmt: skip
    collect(pipeline, 0)
    assert asked == [0, 1]


def test_seq_kd_with_proposals_scores_the_whole_batch_after_it_is_written():
    """So that every rank makes one proposal a step, however many prompts it met before."""
    teacher, calls = RecordingTeacher(), []

    def counted(samples):
        calls.append(len(samples))
        return propose(samples)

    numbers = [[0, 1], [1, 2], [1, 2]]
    pipeline = pipeline_of(
        replace(METHOD, seq_kd=True), teacher, propose=counted,
        batches=[[example(i) for i in batch] for batch in numbers],
    )  # fmt: skip
    for step, examples in enumerate(numbers):
        batch = pipeline.take(step, step)
        assert len(calls) == step  # not before the completions are there
        pipeline.samples(batch)
        scored = pipeline.scored(batch, [0, 1])
        assert [item.requested[0, 0] for item in scored] == [30 + i for i in examples]
        assert all(item.scores is not None for item in scored)
    assert calls == [2, 2, 2]
    assert teacher.prompts == [(5, 10), (5, 11), (5, 12)]
    assert teacher.scored[0] == [(5, 10, 30, 1), (5, 11, 31, 1)]


@pytest.mark.parametrize("seq_kd", [False, True])
def test_a_drawn_support_is_drawn_anew_in_each_step_and_the_same_in_each_of_its_requests(seq_kd):
    teacher = RecordingTeacher()
    method = replace(METHOD, sampled=True, seq_kd=seq_kd)
    batches = [[example(0), example(1)], [example(0), example(1)]]
    pipeline = pipeline_of(method, teacher, batches=batches, request_size=1)
    scored = [item for step in (0, 1) for item in collect(pipeline, step)]
    assert all(item.sampled and item.scores is not None for item in scored)
    first, again, second, _ = teacher.seeds
    assert first == again != second
    other = replace(method, seed=4)
    assert other.sample_seed(0) != first == method.sample_seed(0)
    assert METHOD.sample_seed(0) is None


def test_a_bare_prompt_off_policy_is_refused_by_name():
    pipeline = pipeline_of(METHOD, RecordingTeacher(), batches=[[example(4, completion=None)]])
    with pytest.raises(DatasetError, match="row 4: no completion to learn from"):
        pipeline.take(0, 0)


def test_waiting_for_the_teacher_is_told_only_where_it_was_waited_for():
    for at_once in (True, False):
        seconds = {}
        teacher = RecordingTeacher(at_once=at_once)
        pipeline = pipeline_of(
            replace(METHOD, lmbda=1.0), teacher, CountingRollouts(), batches=[[example(0)]],
            timeline=Timeline(lambda name, value, seconds=seconds: seconds.update({name: value})),
        )  # fmt: skip
        batch = pipeline.take(0, 0)
        pipeline.samples(batch)
        if not at_once:
            threading.Timer(0.05, teacher.unanswered[0]).start()
        pipeline.scored(batch, [0])
        own = {"generating", "syncing"}
        assert set(seconds) == (own if at_once else {*own, "teacher"})
        assert at_once or seconds["teacher"] > 0.01


class TestSeveralTeachers:
    """Each row's completions are scored, or written, by its own teacher from what that one sees."""

    def run(self, method, examples, rollouts=None):
        math, code = RecordingTeacher(), RecordingTeacher()
        pipeline = Pipeline(
            method, Teachers({"math": math, "code": code}), rollouts, upcoming=lambda step: examples
        )
        batch = pipeline.take(0, 0)
        samples = pipeline.samples(batch)
        found = pipeline.scored(batch, range(len(examples)))
        return math, code, samples, found

    def test_rows_are_scored_by_the_teacher_that_they_name_or_by_the_first(self):
        examples = [example(0), replace(example(1), teacher="code"), example(2)]
        math, code, samples, found = self.run(METHOD, examples)
        assert math.scored == [[(5, 10, 8, 1), (5, 12, 8, 1)]]
        assert code.scored == [[(5, 11, 8, 1)]]
        assert [one.teacher for one in found] == [None, "code", None]
        for sample, one in zip(samples, found, strict=True):
            assert one.scores.token_ids[0, 0] == 5 + len(sample.token_ids)

    def test_a_teacher_scores_its_own_prompt_and_the_same_completion(self):
        seen = replace(example(0), teacher_prompt_ids=ids(7, 7, 7, 7))
        math, _, samples, found = self.run(METHOD, [seen, example(1)])
        assert math.scored == [[(7, 7, 7, 7, 8, 1), (5, 11, 8, 1)]]
        assert samples[0].token_ids.tolist() == [5, 10, 8, 1]  # what the student learns
        assert len(found[0].scores) == 2

    def test_a_completion_of_the_student_is_scored_behind_the_teachers_prompt(self):
        seen = replace(example(0), teacher="code", teacher_prompt_ids=ids(7, 7, 7))
        _, code, samples, _ = self.run(replace(METHOD, lmbda=1.0), [seen], CountingRollouts())
        completion = samples[0].completion_ids.tolist()
        assert code.scored == [[(7, 7, 7, *completion)]]
        assert samples[0].prompt_ids.tolist() == [5, 10]

    def test_seqkd_is_written_from_the_teachers_prompt_and_learned_under_the_students(self):
        seen = replace(example(0), teacher_prompt_ids=ids(7, 30))
        examples = [seen, replace(example(1), teacher="code"), example(2)]
        math, code, samples, _ = self.run(replace(METHOD, seq_kd=True), examples)
        assert math.prompts == [(7, 30), (5, 12)]
        assert code.prompts == [(5, 11)]
        assert [s.token_ids.tolist() for s in samples] == [
            [5, 10, 50, 1], [5, 11, 31, 1], [5, 12, 32, 1],
        ]  # fmt: skip

    def test_equal_prompts_of_different_teachers_are_written_by_each(self):
        examples = [example(0), replace(example(0), index=1, teacher="code")]
        math, code, _, _ = self.run(replace(METHOD, seq_kd=True), examples)
        assert (math.prompts, code.prompts) == ([(5, 10)], [(5, 10)])

    def test_a_prompt_is_written_once_whether_its_row_names_the_first_teacher_or_none(self):
        steps = [[example(0)], [replace(example(0), index=1, teacher="math")]]
        math, code = RecordingTeacher(), RecordingTeacher()
        pipeline = Pipeline(
            replace(METHOD, seq_kd=True), Teachers({"math": math, "code": code}), None,
            upcoming=lambda step: steps[step],
        )  # fmt: skip
        written = [pipeline.samples(pipeline.take(step, 1))[0] for step in (0, 1)]
        assert math.prompts == [(5, 10)]
        assert written[0].token_ids.tolist() == written[1].token_ids.tolist()

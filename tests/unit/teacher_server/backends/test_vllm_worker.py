"""Scoring inside an engine's steps: chunks, restarts, failures, and the hooks themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from teacher_server.backends.base import ScoreJob
from teacher_server.backends.scoring import score_positions
from teacher_server.backends.vllm_worker import (
    Float32Head,
    MissedPositionsError,
    ScoringExtension,
    Span,
    StepScorer,
    pack_failure,
    pack_job,
    pack_scores,
    unpack_job,
    unpack_scores,
)
from tests.support.vllm import VLLM

V, D = 50, 16
FIELDS = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs")
WEIGHT = torch.from_numpy(np.random.default_rng(0).normal(size=(V, D)).astype(np.float32))


def head(hidden):
    return hidden @ WEIGHT.T


def job(rng, length=20, start=7, **options):
    requested = rng.integers(0, V, (length - start, 3)).astype(np.uint32)
    options = {"top_k": 4, "temperature": 0.7, "requested_token_ids": requested, **options}
    return ScoreJob(rng.integers(0, V, length).astype(np.uint32), start, **options)


def hidden_states(rng, rows):
    return torch.from_numpy(rng.normal(size=(rows, D)).astype(np.float32))


def params(one):
    return SimpleNamespace(extra_args=pack_job(one))


def expected(one, hidden):
    """The scores of a job from the hidden states [L − 1, d] of its prompt."""
    [scores] = score_positions(hidden[one.completion_start - 1 :], head, [one], V)
    return scores


def assert_same(scores, wanted):
    for name in FIELDS:
        a, b = getattr(scores, name), getattr(wanted, name)
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [None, 0, 3])
def test_jobs_and_scores_travel_as_bytes(width, dtype):
    rng = np.random.default_rng(1)
    one = job(rng, requested_token_ids=None, logprob_dtype=dtype)
    if width is not None:
        one = job(rng, requested_token_ids=rng.integers(0, V, (13, width)).astype(np.uint32),
                  logprob_dtype=dtype)  # fmt: skip
    [packed] = pack_job(one).values()
    again = unpack_job(packed)
    np.testing.assert_array_equal(again.token_ids[7:], one.token_ids[7:])
    assert (again.completion_start, again.top_k, again.temperature) == (7, 4, 0.7)
    wanted = expected(one, hidden_states(rng, 19))
    assert_same(unpack_scores(pack_scores([wanted]).numpy(), again), wanted)


def test_a_job_that_is_drawn_in_several_steps_meets_the_draws_of_one():
    rng = np.random.default_rng(3)
    one = job(rng, draw_key=b"key")
    hidden = hidden_states(rng, 19)
    scorer = StepScorer(head, V)
    scorer.add("a", params(one))
    assert scorer.score(hidden[:11], [Span("a", 0, 0, 11)]) == {}
    [answer] = scorer.score(hidden[11:], [Span("a", 0, 11, 8)]).values()
    found, wanted = unpack_scores(answer.numpy(), one), expected(one, hidden)
    np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
    assert_same(found, wanted)


def test_a_failure_travels_as_its_message():
    one = job(np.random.default_rng(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        unpack_scores(pack_failure("out of memory").numpy(), one)


@pytest.mark.parametrize(("length", "size"), [(19, 628), (21, 732)])
def test_a_wrong_number_of_bytes_is_no_answer(length, size):
    rng = np.random.default_rng(1)
    data = pack_scores([expected(job(rng), hidden_states(rng, 19))]).numpy()
    # 13 rows of 4 ids, 4 log-probs, next token, tail and 3 requested, after a word of status.
    assert len(data) == 4 + 13 * 4 * (4 + 4 + 1 + 1 + 3) == 680
    with pytest.raises(RuntimeError, match=f"680 bytes of scores came, not {size}"):
        unpack_scores(data, job(rng, length=length))


@pytest.mark.parametrize("sizes", [(19,), (3, 16), (7, 7, 5), (6, 1, 12), (1,) * 19])
def test_a_prefill_in_chunks_is_scored_like_one_in_one_step(sizes):
    rng = np.random.default_rng(2)
    one, hidden = job(rng), hidden_states(rng, 19)
    scorer = StepScorer(head, V)
    scorer.add("a", params(one))
    position = 0
    for size in sizes:
        assert "a" in scorer
        # Rows of others come first in the step.
        step = torch.cat([hidden_states(rng, 5), hidden[position : position + size]])
        answers = scorer.score(step, [Span("a", 5, position, size)])
        position += size
        assert bool(answers) == (position == 19)
    assert_same(unpack_scores(answers["a"].numpy(), one), expected(one, hidden))
    assert "a" not in scorer


def test_a_preempted_prefill_starts_again():
    rng = np.random.default_rng(3)
    one, hidden = job(rng), hidden_states(rng, 19)
    scorer = StepScorer(head, V)
    scorer.add("a", params(one))
    assert scorer.score(hidden_states(rng, 12), [Span("a", 0, 0, 12)]) == {}
    answers = scorer.score(hidden, [Span("a", 0, 0, 19)])
    assert_same(unpack_scores(answers["a"].numpy(), one), expected(one, hidden))


def test_positions_that_are_missing_are_said_to_be():
    rng = np.random.default_rng(3)
    one = job(rng)
    scorer = StepScorer(head, V)
    scorer.add("a", params(one))
    answers = scorer.score(hidden_states(rng, 9), [Span("a", 0, 10, 9)])
    with pytest.raises(MissedPositionsError, match="position 4 came after 0 positions"):
        unpack_scores(answers["a"].numpy(), one)


def test_a_prompt_from_the_prefix_cache_needs_no_states():
    rng = np.random.default_rng(3)
    one, hidden = job(rng), hidden_states(rng, 19)
    scorer = StepScorer(head, V)
    scorer.add("a", params(one))
    answers = scorer.score(hidden[4:], [Span("a", 0, 4, 15)])  # the first 4 of 7 were cached
    assert_same(unpack_scores(answers["a"].numpy(), one), expected(one, hidden))


def test_one_bad_sequence_fails_alone():
    rng = np.random.default_rng(4)
    jobs = {name: job(rng, top_k=k) for name, k in (("a", 4), ("b", 9), ("c", 4))}
    hidden = {name: hidden_states(rng, 19) for name in jobs}
    hidden["b"][10] = float("nan")
    scorer = StepScorer(head, V)
    for name, one in jobs.items():
        scorer.add(name, params(one))
    spans = [Span(name, 19 * i, 0, 19) for i, name in enumerate(jobs)]
    answers = scorer.score(torch.cat(list(hidden.values())), spans)
    with pytest.raises(RuntimeError, match="not finite in a sequence of 20 tokens"):
        unpack_scores(answers["b"].numpy(), jobs["b"])
    for name in ("a", "c"):
        scores = unpack_scores(answers[name].numpy(), jobs[name])
        assert_same(scores, expected(jobs[name], hidden[name]))


def test_requests_that_ask_for_no_scores_cost_nothing():
    scorer = StepScorer(None, V)  # a head that cannot be called
    scorer.add("a", SimpleNamespace(extra_args=None))
    scorer.add("b", SimpleNamespace(extra_args={"other": 1}))
    assert scorer.score(torch.zeros(9, D), [Span("a", 0, 0, 4), Span("b", 4, 0, 5)]) == {}


def extension(runner):
    worker = ScoringExtension()
    worker.model_runner = runner
    return worker


class Runner:
    """The part of vLLM's V1 runner that the hook touches, with two requests of 9 + 19 rows."""

    def __init__(self, one):
        self.model = SimpleNamespace(compute_logits=head)
        self.requests = {
            "plain": SimpleNamespace(sampling_params=params(one), num_computed_tokens=0),
            "scored": SimpleNamespace(sampling_params=params(one), num_computed_tokens=0),
        }
        self.requests["plain"].sampling_params.extra_args = None
        self.input_batch = SimpleNamespace(req_id_to_index={"plain": 0, "scored": 1})
        self.query_start_loc = SimpleNamespace(np=np.array([0, 9, 28]))
        self.original_calls = []

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        self.original_calls.append(num_scheduled_tokens)
        return {}

    def sample_tokens(self, hidden):
        self._get_prompt_logprobs_dict(hidden, {"plain": 9, "scored": 19})
        return SimpleNamespace(prompt_token_id_logprobs_dict={})


def test_the_v1_runner_gets_scores_into_its_output():
    rng = np.random.default_rng(5)
    one, hidden = job(rng), hidden_states(rng, 28)
    runner = Runner(one)
    assert extension(runner).install_scoring(V) == "V1"
    output = runner.sample_tokens(hidden)
    assert runner.original_calls == [{"plain": 9, "scored": 19}]
    answers = output.prompt_token_id_logprobs_dict
    assert set(answers) == {"scored"}
    assert_same(unpack_scores(answers["scored"].numpy(), one), expected(one, hidden[9:]))
    assert runner.sample_tokens(hidden).prompt_token_id_logprobs_dict == {}  # once


def test_no_more_logits_are_made_at_once_than_was_said():
    rng = np.random.default_rng(7)
    one, hidden = job(rng), hidden_states(rng, 28)
    runner, rows = Runner(one), []
    runner.model.compute_logits = lambda states: rows.append(len(states)) or head(states)
    extension(runner).install_scoring(V, 5 * 4 * V)  # bytes of five rows in float32
    answers = runner.sample_tokens(hidden).prompt_token_id_logprobs_dict
    assert rows == [5, 5, 3]
    assert_same(unpack_scores(answers["scored"].numpy(), one), expected(one, hidden[9:]))


def test_a_runner_that_has_moved_is_refused():
    class Moved(Runner):
        def _get_prompt_logprobs_dict(self, hidden_states, scheduler_output):
            return {}

    with pytest.raises(RuntimeError, match=r"_get_prompt_logprobs_dict takes .*scheduler_output"):
        extension(Moved(job(np.random.default_rng(5)))).install_scoring(V)
    other = SimpleNamespace(model=SimpleNamespace(compute_logits=head))
    with pytest.raises(RuntimeError, match="unknown model runner SimpleNamespace"):
        extension(other).install_scoring(V)


class TestV2Runner:
    """vLLM's own prompt log-prob worker of the V2 runner, on steps made here: it needs a GPU."""

    pytestmark = VLLM

    def test_gets_scores_beside_its_own(self):
        from vllm import SamplingParams
        from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

        rng = np.random.default_rng(6)
        one, hidden = job(rng), hidden_states(rng, 28)
        worker = PromptLogprobsWorker(4, torch.device("cpu"))
        runner = SimpleNamespace(
            model=SimpleNamespace(compute_logits=head), prompt_logprobs_worker=worker
        )
        assert extension(runner).install_scoring(V) == "V2"
        worker.add_request("plain", 0, SamplingParams())
        worker.add_request("scored", 1, SamplingParams(extra_args=pack_job(one)))
        batch = SimpleNamespace(
            req_ids=["plain", "scored"],
            query_start_loc_np=np.array([0, 9, 28]),
            num_computed_prefill_tokens_np=np.array([0, 0]),
            num_scheduled_tokens=np.array([9, 19]),
        )
        answers = worker.compute_prompt_token_id_logprobs(head, hidden, batch, np.array([9, 19]))
        assert set(answers) == {"scored"}
        assert_same(unpack_scores(answers["scored"].numpy(), one), expected(one, hidden[9:]))
        worker.add_request("gone", 1, SamplingParams(extra_args=pack_job(one)))
        worker.remove_request("gone")
        batch.req_ids = ["plain", "gone"]
        assert worker.compute_prompt_token_id_logprobs(head, hidden, batch, None) == {}


class Processor(torch.nn.Module):
    """The part of vLLM's logits processor that matters: a dtype, or a refusal."""

    head_dtype = torch.bfloat16

    def __init__(self, plain):
        super().__init__()
        self.plain = plain
        self.seen = []

    def forward(self, hidden):
        self.seen.append(self.head_dtype)
        if not self.plain and self.head_dtype != torch.bfloat16:
            raise ValueError("only supported for an unquantized lm_head")
        return hidden.to(self.head_dtype)


class Model(torch.nn.Module):
    def __init__(self, plain):
        super().__init__()
        self.logits_processor = Processor(plain)

    def compute_logits(self, hidden):
        return self.logits_processor(hidden)


def test_scores_are_made_of_float32_logits_and_samples_as_configured():
    model = Model(plain=True)
    float32 = Float32Head(model)
    assert float32(torch.zeros(2, 3)).dtype == torch.float32
    assert model.compute_logits(torch.zeros(2, 3)).dtype == torch.bfloat16


def test_an_output_layer_that_cannot_answers_in_its_own_dtype_and_says_so_once(caplog):
    model = Model(plain=False)
    float32 = Float32Head(model)
    for _ in range(2):
        assert float32(torch.zeros(2, 3)).dtype == torch.bfloat16
    assert model.logits_processor.seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    [warning] = [record.message for record in caplog.records]
    assert "logits of the model's own dtype: only supported" in warning

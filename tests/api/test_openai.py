"""OpenAI-style routes, asked by the official client and by TRL's, against a real server."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from shared.text import completion_text
from tests.support.http import client_at, metric
from tests.support.reference import dense_logprobs
from tests.support.vllm import only

PROMPT = [5, 17, 200, 45, 99, 3]


@pytest.fixture
def client(teacher):
    with openai.OpenAI(base_url=f"{teacher.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def name(client):
    return client.models.list().data[0].id


@pytest.fixture
def tokenizer(teacher):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher.folder)


def dense(teacher, ids, start):
    return dense_logprobs(teacher.model, np.array(ids, np.uint32), start, 1.0)


def greedy(teacher, prompt, count):
    ids, known = list(prompt), teacher.tokens
    for _ in range(count):
        ids.append(int(dense(teacher, [*ids, 0], len(ids))[..., :known].argmax()))
    return ids[len(prompt) :]


def test_the_model_is_listed_and_retrieved_by_its_name(client, teacher, name):
    assert name == str(teacher.folder)
    card = client.models.retrieve(name)
    assert (card.id, card.object, card.owned_by) == (name, "model", "sparse-gkd")
    assert card.max_model_len == 256


def test_a_completion_of_token_ids_is_the_greedy_one_with_its_log_probs(client, teacher, name):
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    (choice,) = answer.choices
    expected = greedy(teacher, PROMPT, 6)
    assert choice.token_ids == expected
    assert choice.prompt_token_ids == PROMPT
    assert (choice.finish_reason, choice.index) == ("length", 0)
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == 12
    rows = dense(teacher, PROMPT + expected, len(PROMPT))
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in expected]
    for t, (row, token_id) in enumerate(zip(rows, expected, strict=True)):
        assert choice.logprobs.token_logprobs[t] == pytest.approx(row[token_id], abs=1e-4)
        best = sorted(choice.logprobs.top_logprobs[t].values(), reverse=True)
        np.testing.assert_allclose(best, -np.sort(-row)[:3], atol=1e-4)


def test_text_and_the_same_text_as_ids_have_the_same_completion(client, name, tokenizer):
    options = {"model": name, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    ids = tokenizer("hello there")["input_ids"]
    by_text, by_ids = client.completions.create(prompt=["hello there", "x"], **options).choices, (
        client.completions.create(prompt=[ids], **options).choices
    )  # fmt: skip
    assert [choice.index for choice in by_text] == [0, 1]
    assert by_text[0].text == by_ids[0].text
    rows = by_text[0].logprobs
    assert [len(row) for row in rows.top_logprobs] == [1] * 8  # its own alone
    assert rows.text_offset[1:] == list(np.cumsum([len(token) for token in rows.tokens])[:-1])


def test_prompt_log_probs_are_those_of_a_plain_forward_pass(client, teacher, name):
    k = 5
    answer = client.completions.create(
        model=name, prompt=[PROMPT, [7]], max_tokens=1, extra_body={"prompt_logprobs": k}
    )
    first, second = answer.choices
    assert second.prompt_logprobs == [None]
    assert first.prompt_logprobs[0] is None
    for t, row in enumerate(dense(teacher, PROMPT, 1)):
        found, next_id = first.prompt_logprobs[t + 1], PROMPT[t + 1]
        assert len(found) == k + (
            str(next_id) not in list(found)[1:] and next_id not in top(row, k)
        )
        for token_id, entry in found.items():
            assert entry["logprob"] == pytest.approx(row[int(token_id)], abs=1e-4)
        ranked = sorted(found.values(), key=lambda entry: entry["rank"])[:k]
        np.testing.assert_allclose([e["logprob"] for e in ranked], row[top(row, k)], atol=1e-4)
        assert [entry["rank"] for entry in ranked] == [1, 2, 3, 4, 5]


def top(row, k):
    return np.argsort(-row, kind="stable")[:k]


def test_max_tokens_0_scores_the_prompt_and_generates_nothing(client, teacher, name):
    written = metric(teacher.url, 'teacher_tokens_total{kind="generated"}')
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=0, extra_body={"prompt_logprobs": 0}
    )
    assert metric(teacher.url, 'teacher_tokens_total{kind="generated"}') == written
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("", "length")
    assert [list(row) for row in choice.prompt_logprobs[1:]] == [[str(i)] for i in PROMPT[1:]]
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("as_ids", [True, False], ids=["token ids", "texts"])
def test_an_echoed_prompt_has_the_log_probs_of_a_plain_forward_pass(
    client, teacher, name, tokenizer, as_ids
):
    k, prompts = 3, [PROMPT, [7]]
    answer = client.completions.create(
        model=name, prompt=prompts, max_tokens=2, temperature=0, logprobs=k, echo=True, seed=1234,
        extra_body={"return_tokens_as_token_ids": as_ids, "return_token_ids": True},
    )  # fmt: skip
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        completion = greedy(teacher, prompt, 2)
        assert choice.token_ids == completion
        assert choice.prompt_logprobs is None
        written = completion_text(tokenizer, prompt, completion)
        assert choice.text == tokenizer.decode(prompt, skip_special_tokens=False) + written
        found, ids = choice.logprobs, prompt + completion
        names = [f"token_id:{i}" if as_ids else tokenizer.decode([i]) for i in ids]
        assert found.tokens == names
        assert found.text_offset == [0, *np.cumsum([len(token) for token in names])[:-1]]
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        for t, row in enumerate(dense(teacher, ids, 1), start=1):
            own, best = found.token_logprobs[t], found.top_logprobs[t]
            assert own == pytest.approx(row[ids[t]], abs=1e-4)
            assert max(best.values()) == pytest.approx(row.max(), abs=1e-4)
            # lm-eval takes a token for the greedy one where the two are the same number.
            assert (own == max(best.values())) == (ids[t] == row.argmax())
            if as_ids:
                assert best[names[t]] == own
                assert len(best) == k + (ids[t] not in top(row, k))


def test_max_tokens_0_echoes_the_prompt_alone(client, teacher, name):
    written = metric(teacher.url, 'teacher_tokens_total{kind="generated"}')
    options = {"model": name, "prompt": "hello", "max_tokens": 0, "echo": True}
    for logprobs in (None, 0, 2):
        answer = client.completions.create(
            **options, logprobs=logprobs, extra_body={"prompt_logprobs": 1}
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == ("hello", "length")
        ids = [int(next(iter(row))) for row in choice.prompt_logprobs[1:]]
        if logprobs is not None:
            assert choice.logprobs.tokens == list("hello")
            assert choice.logprobs.text_offset == list(range(5))
            one = [choice.prompt_logprobs[t][str(i)]["logprob"] for t, i in enumerate(ids, start=1)]
            assert choice.logprobs.token_logprobs == [None, *one]
    (choice,) = client.completions.create(**options).choices
    assert (choice.text, choice.logprobs, choice.prompt_logprobs) == ("hello", None, None)
    assert metric(teacher.url, 'teacher_tokens_total{kind="generated"}') == written


def test_n_samples_differ_and_come_again_with_their_seed(client, name):
    options = {"model": name, "prompt": [PROMPT, [7, 8]], "n": 3, "max_tokens": 8, "seed": 11}
    first, again = (client.completions.create(**options).choices for _ in range(2))
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert [choice.index for choice in first] == list(range(6))
    assert len({choice.text for choice in first}) == 6


def test_stop_token_ids_end_a_completion(client, teacher, name):
    expected = greedy(teacher, PROMPT, 8)
    stop = expected[3]
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=8, temperature=0,
        extra_body={"stop_token_ids": [stop], "return_token_ids": True},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.token_ids == expected[: expected.index(stop) + 1]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("chat", [False, True])
def test_a_stop_string_ends_a_completion_before_it(client, teacher, name, tokenizer, chat):
    messages = [{"role": "user", "content": "2 + 2?"}]
    prompt = tokenizer("<|user|>2 + 2?<|end|><|assistant|>")["input_ids"] if chat else PROMPT

    def ask(count, **changes):
        options = {"model": name, "max_tokens": count, "seed": 3, **changes}
        options["extra_body"] = {"return_token_ids": True, **changes.get("extra_body", {})}
        if chat:
            return client.chat.completions.create(messages=messages, logprobs=True, **options)
        return client.completions.create(prompt=PROMPT, logprobs=0, **options)

    def text(choice):
        return choice.message.content if chat else choice.text

    whole = ask(80).choices[0]
    written, ids = text(whole), whole.token_ids
    start = next(i for i in range(2, len(written) - 3) if "\ufffd" not in written[i : i + 3])
    stop = written[start : start + 3]  # of three tokens: each is a byte or a part of a character
    start = written.find(stop)
    texts = [completion_text(tokenizer, prompt, ids[:n]) for n in range(len(ids) + 1)]
    needed = next(n for n, one in enumerate(texts) if stop in one)
    for given in (stop, [stop], ["not there", stop]):
        answer = ask(80, stop=given)
        (choice,) = answer.choices
        assert text(choice) == written[:start]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert choice.token_ids == ids[:needed]
        assert answer.usage.completion_tokens == needed < 80
        rows = choice.logprobs.content if chat else choice.logprobs.token_logprobs
        assert len(rows) == needed
    (choice,) = ask(80, stop=stop, extra_body={"include_stop_str_in_output": True}).choices
    assert text(choice) == written[: start + 3]
    (choice,) = ask(needed, stop=stop).choices  # at the length limit as well
    assert (text(choice), choice.finish_reason) == (written[:start], "stop")
    (choice,) = ask(needed, stop=["not there"]).choices
    assert (text(choice), choice.stop_reason) == (texts[needed], None)
    assert choice.finish_reason == "length"


def test_rows_of_one_batch_stop_each_at_its_own_text(client, name):
    options = {"model": name, "max_tokens": 16, "temperature": 0}
    prompts = [PROMPT, [7, 8, 9], [200, 100]]
    alone = [client.completions.create(prompt=p, **options).choices[0].text for p in prompts]
    stop = next(c for c in alone[1] if c != "\ufffd")
    answer = client.completions.create(prompt=prompts, stop=[stop], **options)
    assert [choice.text for choice in answer.choices] == [one.split(stop)[0] for one in alone]


def test_a_stop_token_is_no_part_of_the_text(client, teacher, name, tokenizer):
    expected = greedy(teacher, PROMPT, 8)
    stop = next(i for i in expected if tokenizer.decode([i]) != "\ufffd")
    ids = expected[: expected.index(stop) + 1]
    for include in (False, True):
        (choice,) = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=8, temperature=0,
            extra_body={"stop_token_ids": [stop], "include_stop_str_in_output": include},
        ).choices  # fmt: skip
        kept = ids if include else ids[:-1]
        assert choice.text == completion_text(tokenizer, PROMPT, kept)
        assert choice.stop_reason == stop


def test_a_chat_completion_continues_the_rendered_template(client, teacher, name, tokenizer):
    messages = [{"role": "user", "content": "2 + 2?"}]
    answer = client.chat.completions.create(
        model=name, messages=messages, max_completion_tokens=5, temperature=0, logprobs=True,
        top_logprobs=2, extra_body={"return_token_ids": True},
    )  # fmt: skip
    prompt = tokenizer("<|user|>2 + 2?<|end|><|assistant|>")["input_ids"]
    assert answer.prompt_token_ids == prompt
    (choice,) = answer.choices
    expected = greedy(teacher, prompt, 5)
    assert choice.token_ids == expected
    assert choice.message.role == "assistant"
    assert choice.message.content == completion_text(tokenizer, prompt, expected)
    rows = dense(teacher, prompt + expected, len(prompt))
    for entry, row, token_id in zip(choice.logprobs.content, rows, expected, strict=True):
        assert entry.token == tokenizer.decode([token_id])
        assert entry.bytes == list(entry.token.encode())
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-4)
        best = [other.logprob for other in entry.top_logprobs]
        np.testing.assert_allclose(best, row[top(row, 2)], atol=1e-4)


def test_text_in_parts_is_text(client, name):
    def ask(content):
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
        )
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert ask(parts) == ask("abc")


def test_without_a_limit_a_chat_completion_may_fill_the_context(client, name):
    messages = [{"role": "user", "content": "x" * 230}]
    answer = client.chat.completions.create(model=name, messages=messages)
    assert answer.usage.total_tokens <= 256
    (choice,) = answer.choices
    assert choice.finish_reason == ("length" if answer.usage.total_tokens == 256 else "stop")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"stream": True}, "stream", "True is not supported here"),
        ({"stop": ["a", ""]}, "stop", "a stop string of 0 characters; it may have 1 to 256"),
        ({"stop": "x" * 257}, "stop", "a stop string of 257 characters"),
        ({"stop": list("abcdefghijklmnopq")}, "stop", "17 stop strings; the limit is 16"),
        ({"stop": 5}, "stop", "must be text, or a list of texts"),
        ({"suffix": "x"}, "suffix", "'x' is not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5 is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported here"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "0.1 is not supported"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "not permitted here"),
        ({"extra_body": {"topk": 5}}, "topk", "did you mean 'top_k'"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "nothing without prompt_logprobs or echo"),
        ({"max_tokens": 0, "n": 2, "extra_body": {"prompt_logprobs": 1}}, "n", "n 2 of nothing"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "n", "n 2 of nothing"),
        ({"max_tokens": 0, "echo": True, "prompt": [5, 272]}, "prompt.0", "272"),
        ({"max_tokens": 0, "echo": True, "prompt": ""}, "prompt.0", "no row to score"),
        ({"echo": True, "prompt": [[7], [5, 272]]}, "prompt.1", "272"),
        ({"echo": True, "prompt": [5] * 250, "n": 60, "logprobs": 70}, "logprobs", "Split"),
        (
            {"max_tokens": 0, "prompt": [[5, 6], [7]], "extra_body": {"prompt_logprobs": 1}},
            "prompt.1",
            "no row to score",
        ),
        ({"prompt": [[7], [5, 272]], "extra_body": {"prompt_logprobs": 1}}, "prompt.1", "272"),
        ({"prompt": ""}, "prompt.0", "no tokens"),
        ({"max_tokens": 251}, "prompt.0", "257 tokens; the teacher's context is 256"),
        ({"prompt": [5, 272]}, "prompt.0", "272"),
        ({"prompt": []}, "prompt", "text, token ids, or a list"),
        ({"prompt": [[5], "x", []]}, "prompt", "text, token ids"),
        ({"prompt": [-1]}, "prompt", "from 0 to"),
        ({"prompt": [True]}, "prompt", "text, token ids"),
        ({"logprobs": 273}, "logprobs", "273"),
        ({"extra_body": {"prompt_logprobs": 273}}, "prompt_logprobs", "273"),
        ({"n": 600_000, "logprobs": 1}, "logprobs", "Split the request"),
        ({"n": 2000}, "prompt", "2000 sequences; the limit is 1024"),
        (
            {"temperature": 0.5, "extra_body": {"prompt_logprobs": 2}},
            "temperature",
            "/v1/score, which applies a temperature",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, name, changes, param, message):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.completions.create(**{"model": name, "prompt": PROMPT, **changes})
    assert caught.value.param == param
    assert caught.value.type == "invalid-request"
    assert message in caught.value.body["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"extra_body": {"chat_template": "x"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages.0"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_name(client, name, changes, param):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**{"model": name, "messages": messages, **changes})
    assert caught.value.param == param


def test_what_says_what_is_done_anyway_is_accepted(client, name):
    plain = client.completions.create(model=name, prompt=PROMPT, max_tokens=4, temperature=0)
    spelt = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=4, temperature=0, stream=False, stop=None, echo=False,
        best_of=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, user="me", top_p=1.0,
        extra_body={"min_p": 0.0, "repetition_penalty": 1.0, "top_k": -1, "ignore_eos": False},
    )  # fmt: skip
    assert spelt.choices[0].text == plain.choices[0].text


def test_another_model_is_not_found(client):
    for call in (
        lambda: client.completions.create(model="gpt", prompt=PROMPT),
        lambda: client.models.retrieve("gpt"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt' is not served here") as caught:
            call()
        assert caught.value.param == "model"


def test_bodies_that_are_no_json_are_refused_with_openais_error(teacher):
    for content_type, status in (("application/json", 400), ("application/msgpack", 415)):
        response = httpx.post(
            f"{teacher.url}/v1/completions", content=b"{", headers={"content-type": content_type}
        )
        assert response.status_code == status
        assert response.json()["error"]["code"] == status


def test_a_full_house_is_a_rate_limit_with_retry_after(strict):
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id

        def ask(number):
            return client.with_options(http_client=client_at(number)).completions.create(
                model=name, prompt=list(range(2, 202)), max_tokens=3700, temperature=0
            )

        with ThreadPoolExecutor(2) as threads:
            slow = [threads.submit(ask, number) for number in (1, 2)]
            while metric(strict.url, "teacher_queued_tokens") < 7800:
                assert not any(call.done() for call in slow)
            with pytest.raises(openai.RateLimitError, match="7800 tokens are queued") as caught:
                ask(3)
            assert caught.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("route", "asked", "param"),
    [
        ("completions", {"prompt": "a\ud800"}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
    ],
)
def test_half_a_character_is_refused(teacher, name, route, asked, param):
    body = json.dumps({"model": name, **asked})  # escapes it, as every encoder of JSON can
    response = httpx.post(
        f"{teacher.url}/v1/{route}", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param
    assert "is half a character" in response.json()["error"]["message"]


def trl_client(url):
    from trl.generation.vllm_client import VLLMClient  # slow, and loads vLLM

    return VLLMClient(base_url=url, connection_timeout=10)


@only("vllm")  # TRL's client wants vLLM installed beside it
def test_trls_teacher_client_gets_the_log_probs_of_a_plain_forward_pass(teacher):
    client = trl_client(teacher.url)
    sequences, lengths = [[*PROMPT, 8, 9], [4, 250, 31]], [3, 1]
    found = client.get_sequence_logprobs(sequences, lengths, top_logprobs=7)
    for number, (ids, start) in enumerate(zip(sequences, lengths, strict=True)):
        rows = dense(teacher, ids, start)
        assert [i for (i,) in found["actual_token_ids"][number]] == ids[start:]
        for t, row in enumerate(rows):
            np.testing.assert_allclose(found["logprobs"][number][t], row[top(row, 7)], atol=1e-4)
            assert set(found["logprob_token_ids"][number][t]) == set(top(row, 7).tolist())
            (actual,) = found["actual_logprobs"][number][t]
            assert actual == pytest.approx(row[ids[start + t]], abs=1e-4)
            assert math.isfinite(actual)


@only("vllm")
def test_trls_client_generates_and_chats(teacher, tokenizer):
    client = trl_client(teacher.url)
    options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 2}
    generated = client.generate([PROMPT, [7, 8]], **options)
    assert generated["prompt_ids"] == [PROMPT, [7, 8]]
    assert generated["completion_ids"][0] == greedy(teacher, PROMPT, 5)
    row = dense(teacher, [*PROMPT, generated["completion_ids"][0][0]], len(PROMPT))[0]
    np.testing.assert_allclose(generated["logprobs"][0][0], row[top(row, 2)], atol=1e-4)
    assert generated["logprob_token_ids"][0][0] == top(row, 2).tolist()
    chat = client.chat([[{"role": "user", "content": "2 + 2?"}]], **options)
    prompt = tokenizer("<|user|>2 + 2?<|end|><|assistant|>")["input_ids"]
    assert chat["prompt_ids"] == [prompt]
    assert chat["completion_ids"] == [greedy(teacher, prompt, 5)]
    assert len(chat["logprobs"][0]) == 5


def test_the_documentation_has_the_requests(teacher):
    schema = httpx.get(f"{teacher.url}/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert list(body) == ["application/json"]
    properties = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert "prompt_logprobs" in properties
    assert properties["stream"]["enum"] == [False, None]
    assert properties["repetition_penalty"]["enum"] == [1, None]

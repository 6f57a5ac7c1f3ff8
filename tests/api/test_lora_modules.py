"""One base model serves its LoRA adapters as teachers of their own, each like its merged model."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from shared import wire
from shared.errors import ConfigurationError
from shared.protocol import (
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
)
from student_trainer import TeacherClient
from tests.support.http import post
from tests.support.reference import dense_logprobs, largest_error, load_model
from tests.support.server import running_server

MSGPACK = wire.MSGPACK_MEDIA_TYPE
SAMPLES = {"math": {"r": 4, "lora_alpha": 8}, "code": {"r": 9, "target_modules": ["down_proj"]}}


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters of different ranks and layers, with effects that no tolerance hides."""
    folders = {}
    for name, options in SAMPLES.items():
        config = LoraConfig(
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            **{"target_modules": "all-linear"} | options,
        )
        model = get_peft_model(load_model(folder), config)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def served(folder, backend, adapters):
    modules = [f"{name}={path}" for name, path in adapters.items()]
    with running_server(
        folder, "--backend", backend, "--served-model-name", "base", "--lora-modules", *modules
    ) as url:
        yield url


@pytest.fixture(scope="module")
def models(folder, adapters):
    """The base model and each adapter merged into it, by the names that they are served under."""
    merged = {
        name: PeftModel.from_pretrained(load_model(folder), path).merge_and_unload().eval()
        for name, path in adapters.items()
    }
    return {None: load_model(folder), "base": load_model(folder), **merged}


def score_request(model, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [int(length) for length in rng.integers(2, 60, 4)]
    return ScoreRequest(
        sequences=[
            ScoreSequence(
                token_ids=rng.integers(0, 260, length).astype(np.uint32),
                completion_start=int(rng.integers(1, length)),
            )
            for length in lengths
        ],
        top_k=20,
        model=model,
    )


def test_each_adapter_scores_like_its_merged_model_in_batches_that_mix_them(served, models):
    requests = [score_request(name, seed) for seed in range(4) for name in models]
    with ThreadPoolExecutor(len(requests)) as pool:  # at once, so that batches hold several models
        answers = list(
            pool.map(lambda one: post(f"{served}/v1/score", one, ScoreResponse, MSGPACK), requests)
        )
    for request, answer in zip(requests, answers, strict=True):
        assert answer.teacher.model == (request.model or "base")
        for one, scores in zip(request.sequences, answer.sequences, strict=True):
            dense = dense_logprobs(models[request.model], one.token_ids, one.completion_start, 1.0)
            assert largest_error(scores, dense, one) < 1e-5


def test_an_adapter_differs_from_its_base(models):
    one = score_request(None).sequences[0]
    dense = [
        dense_logprobs(models[name], one.token_ids, one.completion_start, 1.0)
        for name in ("base", "math", "code")
    ]
    assert abs(dense[0] - dense[1]).max() > 0.1
    assert abs(dense[0] - dense[2]).max() > 0.1


def test_each_adapter_generates_like_its_merged_model(served, models):
    prompt = np.arange(3, 11, dtype=np.uint32)

    def generated(name):
        request = GenerateRequest(
            prompts=[prompt], max_new_tokens=12, temperature=0.0, top_k=5, model=name
        )
        answer = post(f"{served}/v1/generate", request, GenerateResponse, MSGPACK)
        assert answer.teacher.model == name
        return answer.completions[0][0]

    with ThreadPoolExecutor(3) as pool:
        completions = dict(
            zip(["base", *SAMPLES], pool.map(generated, ["base", *SAMPLES]), strict=True)
        )
    for name, completion in completions.items():
        ids = np.concatenate([prompt, completion.token_ids])
        dense = dense_logprobs(models[name], ids, len(prompt), 1.0)
        assert (dense[:, :260].argmax(axis=1) == completion.token_ids).all()
        sequence = ScoreSequence(token_ids=ids, completion_start=len(prompt))
        assert largest_error(completion.scores, dense, sequence) < 1e-5


def test_every_model_is_listed_with_an_identity_of_its_own(served):
    info = httpx.get(f"{served}/v1/info").json()
    names = [one["model"] for one in info["models"]]
    assert names == ["base", "math", "code"]
    assert info["teacher"] == info["models"][0]
    assert len({one["fingerprint"] for one in info["models"]}) == 3
    cards = httpx.get(f"{served}/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("base", None), ("math", "base"), ("code", "base"),
    ]  # fmt: skip


def test_openai_clients_name_the_adapter(served):
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none") as client:
        answers = {
            name: client.completions.create(
                model=name, prompt=[3, 4, 5], max_tokens=8, temperature=0
            )
            for name in ("base", "math")
        }
    assert {name: answer.model for name, answer in answers.items()} == {
        "base": "base",
        "math": "math",
    }
    assert answers["base"].choices[0].text != answers["math"].choices[0].text


def test_a_model_that_is_not_served_is_an_error_that_names_those_that_are(served):
    body = wire.dump(score_request("maths"), wire.JSON_MEDIA_TYPE)
    headers = {"content-type": wire.JSON_MEDIA_TYPE}
    refusal = httpx.post(f"{served}/v1/score", content=body, headers=headers)
    assert refusal.status_code == 404
    assert refusal.json()["field"] == "model"
    served_models = "'maths' is not served here; served: 'base', 'math', 'code'"
    assert served_models in refusal.json()["detail"]


def test_a_client_asks_the_model_that_follows_the_address(served, models):
    ids = np.random.default_rng(3).integers(0, 260, 30)
    for name in ("base", "code"):
        with TeacherClient(f"{served}#{name}") as client:
            assert client.info.teacher.model == name
            [scored] = client.score([(ids, 10)], top_k=5)
        dense = dense_logprobs(models[name], ids, 10, 1.0)
        sequence = ScoreSequence(token_ids=ids.astype(np.uint32), completion_start=10)
        assert largest_error(scored.scores, dense, sequence) < 1e-5
    with pytest.raises(ConfigurationError, match="names 2 teachers, math and code among them"):
        TeacherClient([f"math={served}", f"code={served}"])

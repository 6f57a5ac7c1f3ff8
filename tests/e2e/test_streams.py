"""The client reads a real server's stream: the plain answer's completions, whatever happens."""

import time

import numpy as np

from shared import wire
from shared.protocol import GenerateRequest, GenerateResponse
from student_trainer.teacher.base import Sampling
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support.http import metric, post
from tests.support.server import free_port, start_server, wait_until_ready

PROMPTS = [np.arange(4, 4 + n, dtype=np.uint32) for n in (3, 9, 1, 30, 2, 5)]
OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "top_k": 8}
WRITTEN = 'teacher_tokens_total{kind="generated"}'


def plain(url):
    """Completions in one answer, not streamed."""
    asked = GenerateRequest(prompts=PROMPTS, **OPTIONS)
    answer = post(f"{url}/v1/generate", asked, GenerateResponse, wire.MSGPACK_MEDIA_TYPE)
    return [row[0] for row in answer.completions]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert one.scores.token_ids.tolist() == other.scores.token_ids.tolist()
        np.testing.assert_allclose(one.scores.logprobs, other.scores.logprobs, atol=1e-5)


def test_streamed_completions_are_those_of_the_plain_answer(world):
    with SparseGkdTeacher([world.url], timeout=60) as client:
        client.connect()
        streamed = client.generate(PROMPTS, Sampling(stop_token_ids=[], **OPTIONS))
    assert_same(streamed, plain(world.url))


def test_a_server_killed_within_its_answer_is_replaced_for_the_rest(world, tmp_path):
    """Prompts go one by one: the first completion comes while the others still wait."""
    port, log = free_port(), tmp_path / "server.log"
    url = f"http://127.0.0.1:{port}"
    server = start_server(world.teacher, "--max-batch-tokens", "1", port=port, log=log)
    try:
        wait_until_ready(server, url, log)
        expected = plain(world.url)
        before = metric(world.url, WRITTEN)
        with SparseGkdTeacher([url, world.url], timeout=60) as client:
            client.connect()
            answer = client.submit(client.generate, PROMPTS, Sampling(stop_token_ids=[], **OPTIONS))
            while not client.take_traffic()[1]:
                assert not answer.done(), "it came at once"
                time.sleep(0.001)
            server.kill()
            completions = answer.result()
        again = metric(world.url, WRITTEN) - before
    finally:
        server.kill()
        server.wait()
    assert_same(completions, expected)
    assert 0 < again < sum(len(completion.token_ids) for completion in expected)

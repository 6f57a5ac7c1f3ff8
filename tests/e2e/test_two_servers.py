"""Two real servers of one teacher; one dies without a word and comes back."""

import time

import numpy as np

from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support.http import metric
from tests.support.server import free_port, start_server, wait_until_ready

SCORED = 'teacher_requests_total{route="/v1/score",status="200"}'


def test_a_killed_server_is_done_without_and_rejoins(world, tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    url = f"http://127.0.0.1:{port}"
    sequences = [(np.arange(4, 24, dtype=np.uint32), 5), (np.arange(40, 50, dtype=np.uint32), 1)]
    server = start_server(world.teacher, port=port, log=log)
    try:
        wait_until_ready(server, url, log)
        with SparseGkdTeacher([url, world.url], timeout=60) as client:
            client.connect()
            both = client.score(sequences, ScoreOptions(8))
            assert metric(url, SCORED) == 1
            server.kill()
            server.wait()
            before = metric(world.url, SCORED)
            alone = client.score(sequences, ScoreOptions(8))
            assert metric(world.url, SCORED) == before + 1
            server = start_server(world.teacher, port=port, log=log)
            wait_until_ready(server, url, log)
            deadline = time.monotonic() + 30
            while metric(url, SCORED) == 0:
                assert time.monotonic() < deadline, "it does not rejoin"
                again = client.score(sequences, ScoreOptions(8))
    finally:
        server.kill()
        server.wait()
    for answers in (alone, again):
        for one, other in zip(both, answers, strict=True):
            assert (one.token_ids == other.token_ids).all()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)

"""One teacher, one student, and rows to learn from, shared by all end-to-end tests."""

from dataclasses import replace

import pytest

from tests.support.server import running_server
from tests.support.world import make_world


@pytest.fixture(scope="session")
def unserved_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def world(unserved_world):
    """A world whose teacher computes each sequence alone.

    Runs are compared to the last bit, and sequences computed together round otherwise.
    """
    with running_server(unserved_world.teacher, "--max-batch-tokens", "1") as url:
        yield replace(unserved_world, url=url)

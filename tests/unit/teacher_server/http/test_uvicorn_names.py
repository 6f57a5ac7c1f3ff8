"""The parts of uvicorn that the server overrides or calls and no document describes.

Read from uvicorn 0.54.0: where a test fails after an upgrade, read its h11 protocol and mend
`teacher_server/http/protocol.py`, or `_Server` in `teacher_server/cli.py`.
"""

import inspect

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (H11Protocol, "connection_made", ("transport",)),
        (H11Protocol, "connection_lost", ("exc",)),
        (H11Protocol, "data_received", ("data",)),
        (H11Protocol, "on_response_complete", ()),
        (H11Protocol, "send_400_response", ("msg",)),
        (H11Protocol, "timeout_keep_alive_handler", ()),
        (uvicorn.Server, "startup", ("sockets",)),
        (uvicorn.Server, "capture_signals", ()),
        (uvicorn.Server, "handle_exit", ("sig", "frame")),
    ],
)
def test_uvicorn_has_the_methods(owner, name, expected):
    method = getattr(owner, name, None)
    assert method is not None, f"uvicorn has no {owner.__name__}.{name} any more"
    assert tuple(inspect.signature(method).parameters) == ("self", *expected)


@pytest.mark.parametrize("name", ["conn", "connections", "loop", "config", "transport"])
def test_a_connection_has_the_attributes(name):
    assert name in H11Protocol.__init__.__code__.co_names


def test_a_server_is_told_to_end_by_an_attribute():
    server = uvicorn.Server(uvicorn.Config("none:none"))
    assert server.should_exit is False

"""The times that a server measures itself, read from its `/metrics`."""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass, fields

from teacher_server.bench.connection import Address, Connection

_SAMPLE = re.compile(r"([\w:]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class ServerTimes:
    """Sums since a server's start, or between two moments; seconds unless said otherwise.

    Attributes:
        requests: answered by the route, a number.
        inside: from a request to the end of its answer, of all requests.
        sequences: that waited for a batch, a number.
        waiting: of sequences, for their batch.
        model: in which the model computed; 0 where the engine does not tell.
    """

    requests: float = 0.0
    inside: float = 0.0
    sequences: float = 0.0
    waiting: float = 0.0
    model: float = 0.0

    def __sub__(self, other: ServerTimes) -> ServerTimes:
        return ServerTimes(
            *(getattr(self, one.name) - getattr(other, one.name) for one in fields(self))
        )


def read_server_times(address: Address, kind: str) -> ServerTimes | None:
    """Return the sums of a server for a kind of request; None where it shows no such metrics."""
    connection = Connection(address)
    try:
        status, body = connection.ask("GET", "/metrics")
        found = parse_metrics(body.decode(), kind) if status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return found


def parse_metrics(text: str, kind: str) -> ServerTimes:
    """Return the sums that metrics in Prometheus' text format hold for a kind of request.

    With vLLM the engine's own queue stands for ours, which its sequences do not pass. The format is
    read here, since prometheus_client is installed with a server alone and this command anywhere.

    Raises:
        ValueError: a value that is looked for is no number.
    """
    of_kind, route = {"kind": kind}, {"route": f"/v1/{kind}"}
    wanted = {
        "teacher_request_seconds_count": ("requests", route),
        "teacher_request_seconds_sum": ("inside", route),
        "teacher_queue_seconds_count": ("sequences", of_kind),
        "teacher_queue_seconds_sum": ("waiting", of_kind),
        "teacher_model_seconds_sum": ("model", of_kind),
        "vllm:request_queue_time_seconds_count": ("sequences", {}),
        "vllm:request_queue_time_seconds_sum": ("waiting", {}),
    }
    sums = dict.fromkeys((one.name for one in fields(ServerTimes)), 0.0)
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        name, labels = wanted.get(sample[1] if sample else "", ("", {}))
        if sample and name and labels.items() <= dict(_LABEL.findall(sample[2] or "")).items():
            sums[name] += float(sample[3])
    return ServerTimes(**sums)

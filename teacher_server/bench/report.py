"""The output of `bench`: a table, and a sentence for each kind of request on what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shared.printable import printable
from shared.protocol import InfoResponse
from teacher_server.bench.measure import Measurement, Workload
from teacher_server.throughput import quantile

# More at once that brings less than this much more throughput brings nothing.
_GAIN = 1.15
# Of its time: a model that computes for more is busy.
_BUSY = 0.7
_COLUMNS = (
    "kind",
    "at once",
    "tokens/s",
    "p50 s",
    "p99 s",
    "server s",
    "queue s",
    "model",
    "failed",
)
_FORM = "{:>8}  {:>7}  {:>8}  {:>7}  {:>7}  {:>8}  {:>7}  {:>5}  {:>6}\n"


def heading(info: InfoResponse, workload: Workload, url: str) -> str:
    """Return what is measured, and the names of the columns."""
    teacher = info.teacher
    return printable(
        f"{url}: {teacher.model}, {teacher.dtype}, {teacher.backend} {teacher.version}"
    ) + (
        f"\n{workload.requests} requests a row, each {workload.input_len} + {workload.output_len} "
        f"tokens, top {workload.top_k}. server s, queue s: mean time in the server, and "
        "of it in the queue; model: share of the time it computes\n\n" + _FORM.format(*_COLUMNS)
    )


def line(row: Measurement) -> str:
    """Return a row of the table."""
    server, queue, model = _inside(row), _queue(row), _model_share(row)
    return _FORM.format(
        row.kind, row.concurrency, f"{_rate(row):.0f}", f"{quantile(row.seconds, 0.5):.3f}",
        f"{quantile(row.seconds, 0.99):.3f}", "-" if server is None else f"{server:.3f}",
        "-" if queue is None else f"{queue:.3f}", "-" if model is None else f"{model:.0%}",
        row.failed,
    )  # fmt: skip


def verdicts(rows: Sequence[Measurement]) -> str:
    """Return a sentence for each kind of request on what limits it, and what failed."""
    lines = [f"{kind}: {limit(_of(rows, kind))}" for kind in dict.fromkeys(r.kind for r in rows)]
    lines += [
        printable(
            f"{row.failed} failed at {row.concurrency} at once ({row.kind}), first: {row.why}"
        )
        for row in rows
        if row.failed
    ]
    return "\n" + "\n".join(lines) + "\n"


def as_json(
    info: InfoResponse, workload: Workload, url: str, rows: Sequence[Measurement]
) -> dict[str, Any]:
    """Return all of it as one object; what a server does not tell is null."""
    return {
        "url": url,
        "teacher": info.teacher.model_dump(),
        "workload": asdict(workload),
        "rows": [
            {
                "kind": row.kind,
                "max_concurrency": row.concurrency,
                "tokens_per_second": _rate(row),
                "requests_per_second": len(row.seconds) / row.wall,
                "p50_seconds": quantile(row.seconds, 0.5),
                "p99_seconds": quantile(row.seconds, 0.99),
                "mean_seconds": _mean(row),
                "mean_server_seconds": _inside(row),
                "mean_queue_seconds": _queue(row),
                "model_share": _model_share(row),
                "answer_bytes": row.answer_bytes,
                "failed": row.failed,
                "first_failure": row.why or None,
            }
            for row in rows
        ],
        "limits": {
            kind: limit(_of(rows, kind)) for kind in dict.fromkeys(row.kind for row in rows)
        },
    }


def limit(rows: Sequence[Measurement]) -> str:
    """Return one sentence on what limits the throughput, by the rows of one kind.

    Judged by the most requests at once: where a request's time passes, whether the model computes
    all the time, and whether fewer at once were as fast.
    """
    most = max(rows, key=lambda row: row.concurrency)
    fewer = [row for row in rows if row.concurrency < most.concurrency]
    saturated = bool(fewer) and _rate(most) < _GAIN * max(map(_rate, fewer))
    total, inside, queue, model = _mean(most), _inside(most), _queue(most), _model_share(most)
    at = f"at {most.concurrency} at once"
    if inside is None or most.server is None:
        return f"the server shows no times of its own in /metrics, so what limits {at} is unknown"
    if most.server.requests > len(most.seconds) + most.failed:
        others = most.server.requests - len(most.seconds) - most.failed
        return f"others sent {others:.0f} requests meanwhile, so what limits {at} is unknown"
    outside = max(0.0, total - inside)
    if outside > total / 2:
        return (
            f"the network or this client limits {at}: {outside:.3f} of {total:.3f} s a request "
            "pass outside the server"
        )
    if model is not None and model >= _BUSY:
        waits = f"; a request waits {queue:.3f} of {total:.3f} s for it" if queue else ""
        return f"the model limits {at}: it computes {model:.0%} of the time{waits}"
    if queue is not None and queue > total / 2:
        share = "" if model is None else f" while the model computes {model:.0%} of the time"
        waits = f"a request waits {queue:.3f} of {total:.3f} s for its batch"
        return f"queueing limits {at}: {waits}{share}"
    if model is None and saturated:
        return f"the model limits {at}: fewer at once bring as many tokens a second"
    if saturated:
        return (
            f"the server's own work limits {at}: the model computes {model:.0%} of the time, and "
            "fewer at once bring as many tokens a second"
        )
    idle = "" if model is None else f"; the model computes {model:.0%} of the time"
    return f"the number of requests limits: more than {most.concurrency} at once bring more{idle}"


def _of(rows: Sequence[Measurement], kind: str) -> list[Measurement]:
    return [row for row in rows if row.kind == kind]


def _rate(row: Measurement) -> float:
    return row.tokens / row.wall


def _mean(row: Measurement) -> float:
    return sum(row.seconds) / len(row.seconds)


def _inside(row: Measurement) -> float | None:
    """Return the mean seconds of a request inside the server, by its own clock."""
    if row.server is None or not row.server.requests:
        return None
    return row.server.inside / row.server.requests


def _queue(row: Measurement) -> float | None:
    """Return the mean seconds that a sequence waited for its batch."""
    if row.server is None or not row.server.sequences:
        return None
    return row.server.waiting / row.server.sequences


def _model_share(row: Measurement) -> float | None:
    """Return the share of the time in which the model computed, where the engine tells."""
    return row.server.model / row.wall if row.server is not None and row.server.model else None

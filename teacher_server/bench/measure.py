"""Send requests, some at once, and time them, beside the times that the server measures itself."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from shared import wire
from shared.errors import ConfigurationError, ProtocolError
from shared.printable import one_line
from shared.protocol import (
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    ScoreRequest,
    ScoreSequence,
)
from teacher_server.bench.connection import Address, Connection, detail_of
from teacher_server.bench.server_times import ServerTimes, read_server_times

_MEDIA = wire.MSGPACK_MEDIA_TYPE
_LONGEST_ANSWER = 1 << 30


@dataclass(frozen=True)
class Workload:
    """The requests of a measurement: ``requests`` of them, one sequence each.

    Attributes:
        requests: of each kind, at each concurrency.
        input_len, output_len: tokens of prompt and completion.
        top_k: log-probs a scored position.
        seed: of the token ids.
    """

    requests: int
    input_len: int
    output_len: int
    top_k: int
    seed: int

    def fitted(self, info: InfoResponse, defaults: Collection[str]) -> Workload:
        """Return the workload within a server's limits; what was not given is lowered to them.

        Args:
            info: the server's description.
            defaults: fields that the caller did not give.

        Raises:
            ConfigurationError: the server would refuse such requests; names the flag to change.
        """
        most = min(info.max_model_len, info.limits.max_tokens)
        fitted = self
        if "top_k" in defaults:
            fitted = replace(fitted, top_k=min(self.top_k, info.limits.max_top_k))
        if "output_len" in defaults:
            fitted = replace(fitted, output_len=max(1, min(self.output_len, most // 2)))
        if "input_len" in defaults:
            longest = max(1, most - fitted.output_len)
            fitted = replace(fitted, input_len=min(self.input_len, longest))
        fitted._check(most, info.limits.max_top_k)
        return fitted

    def _check(self, most: int, max_top_k: int) -> None:
        tokens = self.input_len + self.output_len
        if tokens > most:
            raise ConfigurationError(
                f"--input-len {self.input_len} and --output-len {self.output_len} are {tokens} "
                f"tokens; the server takes {most}. Lower them"
            )
        if self.top_k > max_top_k:
            raise ConfigurationError(
                f"--top-k {self.top_k} is over the server's limit; lower it to {max_top_k}"
            )

    def bodies(self, info: InfoResponse, kind: str, run: int) -> Iterator[bytes]:
        """Yield bodies of requests, no two of them equal, for the run of that number."""
        random = np.random.default_rng([self.seed, run])
        used = {*info.eos_token_ids, *info.tokenizer.special_token_ids.values()}
        ids = np.setdiff1d(
            np.arange(min(info.vocab_size, info.tokenizer.vocab_size), dtype=np.uint32),
            np.array(sorted(used)),
        ).astype(np.uint32)
        for index in count():
            request: GenerateRequest | ScoreRequest
            if kind == "generate":
                request = GenerateRequest(
                    prompts=[random.choice(ids, self.input_len)],
                    max_new_tokens=self.output_len, seed=self.seed + index,
                )  # fmt: skip
            else:
                tokens = random.choice(ids, self.input_len + self.output_len)
                sequence = ScoreSequence(token_ids=tokens, completion_start=self.input_len)
                request = ScoreRequest(sequences=[sequence], top_k=self.top_k)
            yield wire.dump(request, _MEDIA)


@dataclass(frozen=True)
class Measurement:
    """The outcome of one kind of request at one concurrency.

    Attributes:
        kind: "score" or "generate".
        concurrency: requests at once.
        wall: seconds from the first request to the last answer.
        seconds: of each answered request, in order of size.
        tokens: scored or generated.
        answer_bytes: of all answers.
        failed: requests that were refused or not answered.
        why: the first of their reasons.
        server: what the server measured meanwhile; None where it does not tell.
    """

    kind: str
    concurrency: int
    wall: float
    seconds: Sequence[float]
    tokens: int
    answer_bytes: int
    failed: int
    why: str
    server: ServerTimes | None


def read_info(address: Address) -> InfoResponse:
    """Return the server's description of itself.

    Raises:
        ConfigurationError: nothing answers there, or something else than a teacher that is ready.
    """
    connection = Connection(address)
    try:
        status, body = connection.ask("GET", "/v1/info", Accept=wire.JSON_MEDIA_TYPE)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigurationError(
            f"{address.url}: {getattr(error, 'strerror', None) or error or type(error).__name__}; "
            "is the server running, and is this its address?"
        ) from error
    finally:
        connection.close()
    if status == 401:
        told = "another key than TEACHER_API_KEY's" if address.key else "a key in TEACHER_API_KEY"
        raise ConfigurationError(f"{address.url} wants {told}: export TEACHER_API_KEY=…")
    if status != 200:
        said = one_line(detail_of(body)) or "no teacher-server, it seems"
        raise ConfigurationError(f"{address.url}/v1/info answers {status}: {said}")
    try:
        return wire.load(InfoResponse, body, wire.JSON_MEDIA_TYPE, max_bytes=_LONGEST_ANSWER)
    except ProtocolError as error:
        raise ConfigurationError(
            f"{address.url}/v1/info: {error.detail}; it is no teacher-server of this version"
        ) from error


_runs = count()


def measure(
    address: Address, info: InfoResponse, workload: Workload, kind: str, concurrency: int
) -> Measurement:
    """Send the workload, ``concurrency`` requests at once, and return what came of it.

    One request before it is not counted, as a server's first of a shape may compile.

    Raises:
        ConfigurationError: not one request was answered.
    """
    source = workload.bodies(info, kind, next(_runs))
    _send(Connection(address), kind, next(source))
    bodies = [next(source) for _ in range(workload.requests)]
    before = read_server_times(address, kind)
    local = threading.local()

    def send(body: bytes) -> tuple[float, bytes | str]:
        if not hasattr(local, "connection"):
            local.connection = Connection(address)
        return _send(local.connection, kind, body)

    with ThreadPoolExecutor(concurrency) as pool:
        since = time.perf_counter()
        sent = list(pool.map(send, bodies))
        wall = time.perf_counter() - since
    after = read_server_times(address, kind)
    answers = [(seconds, answer) for seconds, answer in sent if isinstance(answer, bytes)]
    reasons = [answer for _, answer in sent if isinstance(answer, str)]
    if not answers:
        raise ConfigurationError(f"{address.url}: none of {len(sent)} was answered: {reasons[0]}")
    return Measurement(
        kind=kind, concurrency=concurrency, wall=wall,
        seconds=sorted(seconds for seconds, _ in answers),
        tokens=_tokens(kind, workload, [answer for _, answer in answers]),
        answer_bytes=sum(len(answer) for _, answer in answers),
        failed=len(reasons), why=reasons[0] if reasons else "",
        server=None if before is None or after is None else after - before,
    )  # fmt: skip


def _send(connection: Connection, kind: str, body: bytes) -> tuple[float, bytes | str]:
    """Return (seconds, the answer's body, or as text why there is none)."""
    since = time.perf_counter()
    try:
        status, answer = connection.ask(
            "POST", f"/v1/{kind}", body, Content_Type=_MEDIA, Accept=_MEDIA
        )
    except (OSError, http.client.HTTPException) as error:
        told = f"{error}, --timeout" if isinstance(error, TimeoutError) else f"{error}"
        return time.perf_counter() - since, f"{type(error).__name__}: {told}"
    seconds = time.perf_counter() - since
    return seconds, answer if status == 200 else f"{status} {one_line(detail_of(answer))}".strip()


def _tokens(kind: str, workload: Workload, answers: Sequence[bytes]) -> int:
    """Return the tokens that the answers scored or generated; a completion may end early."""
    if kind == "score":
        return workload.output_len * len(answers)
    found = [
        wire.load(GenerateResponse, answer, _MEDIA, max_bytes=_LONGEST_ANSWER) for answer in answers
    ]
    return sum(len(one.token_ids) for answer in found for one in answer.completions[0])

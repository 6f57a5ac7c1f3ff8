"""A request under way, and the limits that it runs under."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from shared import wire
from shared.errors import PayloadTooLargeError, UnsupportedMediaTypeError
from teacher_server.limits.admission import Admission, HeldBytes
from teacher_server.limits.pool import FairPool

R = TypeVar("R")

# Media types of a message; a request without a preference is answered in the last one.
MEDIA_TYPES = (wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)


@dataclass(slots=True)
class Exchange:
    """A request, from its head to the end of its answer.

    Attributes:
        request: head and body, as they come.
        request_id: the caller's own, or one that was made for it.
        route: path of the route, for metrics and the log.
        admission: bounds tokens and bytes of all requests; sets the deadline.
        pool: threads for work on bodies and texts.
        client: a key's digest or an address, which has its own limits and turns; empty until
            identified.
        name: the caller's name for itself; for the log alone.
        held: bytes of the body, and of the answer until it is sent.
        work: sequences and tokens of the request, once they are known; for the log.
        hang_up: True when the connection is to be closed with the answer.
    """

    request: Request
    request_id: str
    route: str
    admission: Admission
    pool: FairPool
    client: str = ""
    name: str = ""
    held: HeldBytes = field(init=False)
    work: dict[str, int] = field(default_factory=dict)
    hang_up: bool = False

    def __post_init__(self) -> None:
        self.identify("")

    def identify(self, client: str, name: str = "") -> None:
        """Set the client of the request, before it holds anything."""
        self.client, self.name = client, name
        self.held = HeldBytes(self.admission.bytes, client)

    @property
    def content_type(self) -> str:
        """The media type of the body, without parameters; empty where none is given."""
        return self.request.headers.get("content-type", "").split(";")[0].strip().lower()

    def answer_type(self) -> str:
        """Return the media type of the answer: what Accept names first, else the request's own.

        A stream's media type stands for that of its items: one message is a stream of one.

        Raises:
            UnsupportedMediaTypeError: Accept takes none of `MEDIA_TYPES`.
        """
        accept = self.request.headers.get("accept", "*/*")
        wanted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
        of_items = {stream: media_type for media_type, stream in wire.STREAM_MEDIA_TYPES.items()}
        for media_type in wanted:
            media_type = of_items.get(media_type, media_type)
            if media_type in MEDIA_TYPES:
                return media_type
        if not {"*/*", "application/*", ""} & set(wanted):
            raise UnsupportedMediaTypeError(
                f"Accept {accept!r} holds none of {', '.join(MEDIA_TYPES)}"
            )
        return self.content_type if self.content_type in MEDIA_TYPES else MEDIA_TYPES[-1]

    def hold(self, size: int, field: str | None = None) -> None:
        """Count ``size`` more bytes as held until the answer is sent.

        Args:
            size: of what is about to be read or made.
            field: the part of the request that needs so much.

        Raises:
            PayloadTooLargeError: the request alone takes more than the server holds of all.
            OverloadedError: there is no room for it now.
        """
        _check_possible(
            self.held.bytes + size, self.admission.bytes.limit, "bytes, its answer included",
            "--max-held-mib", field,
        )  # fmt: skip
        self.held.add(size)

    def admit(self, tokens: int, jobs: int) -> AbstractContextManager[None]:
        """Hold a place in the queue for ``jobs`` that bring ``tokens``.

        Raises:
            PayloadTooLargeError: the request alone brings more than the whole queue takes.
            UnavailableError: the server is draining.
            OverloadedError: the queue has no room now.
        """
        _check_possible(tokens, self.admission.tokens.limit, "tokens", "--max-queued-tokens")
        self.work = {"sequences": jobs, "tokens": tokens}
        return self.admission.admit(self.client, tokens, jobs)

    async def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Return the result of ``work``, cancelled at the deadline or when the caller leaves.

        Raises:
            DeadlineExceededError: the deadline came first.
            ClientGoneError: the caller left first.
        """
        return await self.admission.run(work, self._disconnected)

    async def in_pool(self, cost: int, function: Callable[..., R], *arguments: Any) -> R:
        """Return ``function(*arguments)``, computed in a thread when it is the client's turn.

        Args:
            cost: bytes that the function works on.

        Raises:
            DeadlineExceededError, ClientGoneError: as `run` does.
        """
        return await self.run(self.pool.run(self.client, cost, function, *arguments))

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def _check_possible(
    amount: int, limit: int, things: str, flag: str, field: str | None = None
) -> None:
    """Refuse a request that exceeds a limit alone (413), because trying later could never help.

    Raises:
        PayloadTooLargeError: ``amount`` is more than ``limit``.
    """
    if amount > limit:
        raise PayloadTooLargeError(
            f"the request alone takes {amount} {things}; the server's limit of all requests "
            f"together is {limit}. Send fewer or shorter sequences at once, ask for fewer "
            f"log-probs, or raise {flag}",
            field=field,
        )

"""The teachers of a run, by name: one without a name, or several with rows of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

from shared.protocol import InfoResponse, TeacherIdentity
from student_trainer.teacher.base import Teacher

R = TypeVar("R")
T = TypeVar("T")

UNNAMED = ""


class Teachers:
    """The teachers of a run; the first is that of rows which name none.

    Errors are as in `Teacher`; a message about a teacher that does not answer has its name.

    Args:
        clients: a client of each, by name; a single one may be `UNNAMED`.
    """

    def __init__(self, clients: Mapping[str, Teacher]) -> None:
        self._clients = dict(clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all clients; requests in flight fail."""
        with contextlib.ExitStack() as closing:
            for client in self._clients.values():
                closing.callback(client.close)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, the first one first; none where the only teacher has no name."""
        return tuple(name for name in self._clients if name != UNNAMED)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names as `items` has them: of a single teacher without a name, `UNNAMED`."""
        return tuple(self._clients)

    def name_of(self, name: str | None) -> str:
        """Return the name as `items` has it; that of the first teacher for None."""
        return next(iter(self._clients)) if name is None else name

    def of(self, name: str | None) -> Teacher:
        """Return the teacher of that name; the first one for None."""
        return self._clients[self.name_of(name)]

    def items(self) -> list[tuple[str, Teacher]]:
        """Return the teachers with their names."""
        return list(self._clients.items())

    def by_teacher(
        self, items: Sequence[T], name_of: Callable[[T], str | None]
    ) -> list[tuple[Teacher, list[T]]]:
        """Return the items of each teacher that has some, in their order."""
        groups: dict[str, list[T]] = {}
        for item in items:
            groups.setdefault(self.name_of(name_of(item)), []).append(item)
        return [(self._clients[name], group) for name, group in groups.items()]

    def request_each(
        self,
        items: Sequence[T],
        name_of: Callable[[T], str | None],
        request: Callable[[Teacher, list[T]], Sequence[R]],
    ) -> list[R]:
        """Return what ``request`` returns for each teacher's items, in the order of ``items``."""
        answers: dict[int, R] = {}
        for teacher, part in self.by_teacher(
            list(enumerate(items)), lambda numbered: name_of(numbered[1])
        ):
            found = request(teacher, [item for _, item in part])
            answers.update(zip((index for index, _ in part), found, strict=True))
        return [answers[index] for index in range(len(items))]

    def ready(self) -> bool:
        """Return whether every teacher answers now; as `Teacher.ready`."""
        answers = [client.ready() for client in self._clients.values()]  # all are tried
        return all(answers)

    def connect(self) -> list[InfoResponse]:
        """Wait until every teacher is ready, as `Teacher.connect`."""
        return [client.connect() for client in self._clients.values()]

    @property
    def infos(self) -> list[InfoResponse]:
        """The description that each teacher gives of itself, known since `connect`."""
        return [client.info for client in self._clients.values()]

    @property
    def identities(self) -> dict[str, TeacherIdentity]:
        """The identity of each teacher, by name."""
        return {name: client.info.teacher for name, client in self._clients.items()}

    @property
    def vocab_size(self) -> int:
        """The smallest of their output layers, in tokens."""
        return min(info.vocab_size for info in self.infos)

    @property
    def max_model_len(self) -> int:
        """The shortest of their contexts, in tokens."""
        return min(info.max_model_len for info in self.infos)

    def take_traffic(self) -> dict[str, tuple[int, int]]:
        """Return, by name, (bytes received, completion tokens scored) since the last call."""
        return {name: client.take_traffic() for name, client in self._clients.items()}

    def take_lookups(self) -> tuple[int, int, int]:
        """Return (cache lookups, answers found, corrupt answers) since the last call."""
        counts = [client.take_lookups() for client in self._clients.values()]
        looked_up, found, corrupt = (sum(column) for column in zip(*counts, strict=True))
        return looked_up, found, corrupt


def as_teachers(teacher: Teacher | Teachers | None) -> Teachers | None:
    """Return a single client as `Teachers`; anything else as it is."""
    if teacher is None or isinstance(teacher, Teachers):
        return teacher
    return Teachers({UNNAMED: teacher})

"""Refuse unknown fields of a message, naming the first one and the known field nearest to it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from shared.nearest import nearest

# The type of the pydantic error, whose context holds the field's name.
UNKNOWN_FIELD = "unknown_field"

_LONGEST_NAME = 64


def refuse_unknown_fields(cls: type[BaseModel], value: Any) -> Any:
    """Refuse a map with a field that ``cls`` does not have; return other values unchanged.

    Classes that are configured to ignore such fields are not checked.

    A validator that runs before all others of a message. It stops at the first unknown field, where
    pydantic would name them all, one error each, behind every missing field.

    Raises:
        PydanticCustomError: a map with a field that ``cls`` does not have.
    """
    if isinstance(value, dict) and cls.model_config.get("extra") != "ignore":
        for name in value:
            if name not in cls.model_fields:
                raise _unknown(str(name)[:_LONGEST_NAME], list(cls.model_fields))
    return value


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    near = nearest(name.lower(), known)
    hint = f"did you mean {near!r}?" if near else f"the fields are {', '.join(known)}"
    # The message is passed as data, because braces in a template would be read as placeholders.
    return PydanticCustomError(
        UNKNOWN_FIELD, "{reason}", {"reason": f"not permitted here; {hint}", "name": name}
    )

"""The pydantic field types of numpy arrays.

One schema serves both media types: msgpack brings arrays, JSON brings nested lists. JSON has no
infinity, so a log-prob of −inf is ``null`` there.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_NDIM = 3
# Elements of a list that numpy converts at a time, because it holds the GIL meanwhile.
_PIECE = 1 << 15


def _reject(message: str) -> PydanticCustomError:
    # The message is passed as data, because braces in a template would be read as placeholders.
    return PydanticCustomError("array", "{reason}", {"reason": message})


def _from_lists(value: list[Any], kind: str) -> NDArray[Any]:
    # Checked before numpy, which would pad every element to the width of the longest string.
    _check_leaves(value, (int,) if kind == "u" else (int, float, type(None)), MAX_NDIM)
    if kind == "f":
        value = _null_to_minus_infinity(value)
    try:
        pieces = [np.asarray(value[i : i + _PIECE]) for i in range(0, len(value), _PIECE)]
        array = np.concatenate(pieces) if pieces else np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise _reject("expected a rectangular nested list of numbers") from error
    if array.size and array.dtype.kind not in ("iu" if kind == "u" else "iuf"):
        wanted = "integers from 0 to 4294967295" if kind == "u" else "numbers"
        raise _reject(f"expected {wanted}, got {array.dtype} elements")
    return array


def _check_leaves(value: list[Any], leaves: tuple[type, ...], depth: int) -> None:
    for item in value:
        if type(item) is list and depth > 1:
            _check_leaves(item, leaves, depth - 1)
        elif type(item) not in leaves:
            wanted = "integers from 0 to 4294967295" if leaves == (int,) else "numbers"
            raise _reject(f"expected {wanted}, got {type(item).__name__} elements")


def _null_to_minus_infinity(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_to_minus_infinity(item) for item in value]
    return float("-inf") if value is None else value


def _to_token_ids(value: Any, ndim: int) -> NDArray[np.uint32]:
    array = _from_lists(value, "u") if isinstance(value, list) else value
    if not isinstance(array, np.ndarray):
        raise _reject(f"expected an array of token ids, got {type(value).__name__}")
    if array.size and array.dtype.kind not in "iu":
        raise _reject(f"token ids must be unsigned integers, got {array.dtype}")
    if array.ndim != ndim:
        raise _reject(f"expected {ndim} dimension(s), got {array.ndim}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
        worst = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise _reject(f"token id {worst} is outside 0 to 4294967295")
    return array.astype(np.uint32, copy=False)


def _to_logprobs(value: Any, ndim: int) -> NDArray[Any]:
    array = _from_lists(value, "f") if isinstance(value, list) else value
    if not isinstance(array, np.ndarray):
        raise _reject(f"expected an array of log-probs, got {type(value).__name__}")
    if array.size and array.dtype.kind not in "iuf":
        raise _reject(f"log-probs must be floating point, got {array.dtype}")
    if array.ndim != ndim:
        raise _reject(f"expected {ndim} dimension(s), got {array.ndim}")
    return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)


def _to_lists(array: NDArray[Any]) -> list[Any]:
    if array.dtype.kind == "f":
        array = array.astype(object)
        array[~np.isfinite(array.astype(np.float32))] = None
    lists: list[Any] = array.tolist()
    return lists


def _schema(item: dict[str, Any], ndim: int) -> dict[str, Any]:
    for _ in range(ndim):
        item = {"type": "array", "items": item}
    return item


_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": 0xFFFFFFFF}
_LOGPROB = {"type": ["number", "null"]}
_lists = PlainSerializer(_to_lists, when_used="json")

TokenIds1D = Annotated[
    NDArray[np.uint32],
    BeforeValidator(lambda value: _to_token_ids(value, 1)),
    _lists,
    WithJsonSchema(_schema(_TOKEN_ID, 1)),
]
TokenIds2D = Annotated[
    NDArray[np.uint32],
    BeforeValidator(lambda value: _to_token_ids(value, 2)),
    _lists,
    WithJsonSchema(_schema(_TOKEN_ID, 2)),
]
Logprobs1D = Annotated[
    NDArray[np.float32],
    BeforeValidator(lambda value: _to_logprobs(value, 1)),
    _lists,
    WithJsonSchema(_schema(_LOGPROB, 1)),
]
Logprobs2D = Annotated[
    NDArray[np.floating[Any]],
    BeforeValidator(lambda value: _to_logprobs(value, 2)),
    _lists,
    WithJsonSchema(_schema(_LOGPROB, 2)),
]

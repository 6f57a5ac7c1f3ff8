"""The loss functions' former parameters, which still work for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from student_trainer.losses.divergence import Divergence, LossOutput

F = TypeVar("F", bound=Callable[..., Any])

_FORMER = ("beta", "temperature", "tail", "return_statistics")


def former_parameters(function: F) -> F:
    """Let a loss be called with ``beta`` and what went with it in place of a `Divergence`.

    So called it returns what it did: the loss, and its statistics only with ``return_statistics``.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "beta" not in kwargs:  # it had no default, so this is no call of the former form
            return function(*args, **kwargs)
        given = {name: kwargs.pop(name) for name in _FORMER if name in kwargs}
        with_statistics = given.pop("return_statistics", False)
        divergence = Divergence(**given)
        warnings.warn(
            f"pass a Divergence to {function.__name__} in place of beta, temperature, tail and "
            f"return_statistics: {divergence}; it returns a LossOutput",
            DeprecationWarning,
            stacklevel=2,
        )
        found = function(*args, divergence=divergence, **kwargs)
        return found.loss if isinstance(found, LossOutput) and not with_statistics else found

    return cast(F, wrapper)

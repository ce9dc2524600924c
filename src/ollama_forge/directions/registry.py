"""The methods that compute a direction from the means of the residual stream, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ollama_forge.directions.difference_of_means import difference_of_means
from ollama_forge.directions.projected import projected
from ollama_forge.errors import UsageError

Method = Callable[[Tensor, Tensor], Tensor]
METHODS: dict[str, Method] = {
    "difference-of-means": difference_of_means,
    "projected": projected,
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is no method of that name.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"unknown --method {name!r}", f"one of {', '.join(METHODS)}") from None

"""Matrix products with given parameters, caught while a module runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    functional.linear,
    functional.bilinear,
    functional.conv1d,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.mm,
    Tensor.bmm,
    Tensor.addmm,
    Tensor.baddbmm,
}


class CatchProducts(TorchFunctionMode):
    """While entered, gives each product of a parameter (or of a view of it) and an activation to a function.

    The function gets the parameter, the activation, and the product as a function of the activation; what it returns is
    the product's result.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter],
        catch: Callable[[nn.Parameter, Tensor, Callable[[Tensor], Any]], Any],
    ) -> None:
        super().__init__()
        self._origin = dict(parameters)
        self._catch = catch
        self._views: list[Tensor] = []  # keeps them alive, so that no other tensor gets the id of one

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        flat = [x for a in (*args, *given.values()) for x in (a if isinstance(a, (tuple, list)) else (a,))]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        origin = next((self._origin[id(x)] for x in tensors if id(x) in self._origin), None)
        if origin is None:
            return func(*args, **given)
        others = [x for x in tensors if id(x) not in self._origin and not isinstance(x, nn.Parameter)]
        if others and func in _PRODUCTS:
            activation = others[0]
            return self._catch(origin, activation, lambda x: func(*_swapped(args, activation, x), **given))
        out = func(*args, **given)
        if not others and isinstance(out, Tensor):
            self._origin[id(out)] = origin
            self._views.append(out)
        return out


def _swapped(args: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    """Positional arguments with one tensor replaced, also inside a list."""

    def swap(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(swap(item) for item in value)
        return new if value is old else value

    return tuple(swap(value) for value in args)

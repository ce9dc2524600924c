"""Convert linear layers' bf16 weights to the layout of the CPU kernels once, instead of in every call.

The results are bit-identical. Small batches gain most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.models.device import memory_available

_ROOM = 1.5  # free memory required, as a multiple of the size of the packed copy
_OPERATORS = (
    "_is_mkldnn_bf16_supported",
    "_reorder_linear_weight",
    "_linear_pointwise",
)  # private: a torch release may lack them


# a tracer cannot record a call whose argument is an empty list of numbers, but one of a function that makes the list
_PRODUCT = """
graph(%input : Tensor, %weight : Tensor, %bias : Tensor?):
  %attribute : str = prim::Constant[value="none"]()
  %scalars : Scalar?[] = prim::ListConstruct()
  %algorithm : str = prim::Constant[value=""]()
  %out : Tensor = mkldnn::_linear_pointwise(%input, %weight, %bias, %attribute, %scalars, %algorithm)
  return (%out)
"""


@lru_cache
def _traceable_product() -> Any:
    return torch._C._create_function_from_graph("packed_linear", torch._C.parse_ir(_PRODUCT))


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input`` times a packed weight, plus a bias."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return _traceable_product()(input.contiguous(), weight, bias)  # type: ignore[no-any-return]
    return torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, "none", [], "")  # type: ignore[no-any-return]


class PackedForward:
    """Replaces ``nn.Linear.forward``. The layer keeps its original weight for code that reads it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def __call__(self, input: Tensor) -> Tensor:
        return _product(input, self.weight, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Pack the bf16 linear layers of a model on the CPU, if memory can hold them twice.

    Afterwards the model supports only inference, and changes of its weights have no effect (see ``unpacked``).
    """
    if not _is_usable():
        return
    linears = [
        linear
        for linear in module.modules()
        if type(linear) is nn.Linear and linear.weight.device.type == "cpu" and linear.weight.dtype is torch.bfloat16
    ]
    free = memory_available(torch.device("cpu"))
    if free < _ROOM * sum(linear.weight.nbytes for linear in linears):
        return
    with torch.inference_mode():
        for linear in linears:
            linear.forward = PackedForward(linear.weight.detach(), linear.bias)  # type: ignore[method-assign]


def packed_layers(module: nn.Module) -> list[nn.Linear]:
    """The layers of a module that compute with packed weights, in the module's order."""
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear) and isinstance(part.__dict__.get("forward"), PackedForward)
    ]


def packed_weights(module: nn.Module) -> list[Tensor]:
    """The packed weights and biases, each once."""
    forwards = [linear.__dict__["forward"] for linear in packed_layers(module)]
    found = [tensor for forward in forwards for tensor in (forward.weight, forward.bias) if tensor is not None]
    return list({id(tensor): tensor for tensor in found}.values())


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Inside the block the module computes with its own weight, and changes of it have an effect."""
    packed = module.__dict__.get("forward")
    if not isinstance(packed, PackedForward):
        yield
        return
    del module.__dict__["forward"]
    try:
        yield
    finally:
        module.__dict__["forward"] = packed


def _is_usable() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

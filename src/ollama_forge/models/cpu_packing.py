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


# with AMX, the product of so few rows takes longer than that of ``_FAST_ROWS``
_SLOW_ROWS = range(17, 33)
_FAST_ROWS = 33

# A tracer cannot record a call whose argument is an empty list of numbers, but one of a function that makes the list;
# nor what depends on the number of rows. The input is [rows, tokens, features].
_PRODUCT = """
graph(%input : Tensor, %weight : Tensor, %bias : Tensor?):
  %attribute : str = prim::Constant[value="none"]()
  %scalars : Scalar?[] = prim::ListConstruct()
  %algorithm : str = prim::Constant[value=""]()
  %out : Tensor = mkldnn::_linear_pointwise(%input, %weight, %bias, %attribute, %scalars, %algorithm)
  return (%out)
"""
_PADDED_PRODUCT = f"""
graph(%input : Tensor, %weight : Tensor, %bias : Tensor?):
  %attribute : str = prim::Constant[value="none"]()
  %scalars : Scalar?[] = prim::ListConstruct()
  %algorithm : str = prim::Constant[value=""]()
  %none : NoneType = prim::Constant()
  %zero : int = prim::Constant[value=0]()
  %one : int = prim::Constant[value=1]()
  %before : int = prim::Constant[value={_SLOW_ROWS.start - 1}]()
  %after : int = prim::Constant[value={_SLOW_ROWS.stop}]()
  %fast : int = prim::Constant[value={_FAST_ROWS}]()
  %rows : int = aten::size(%input, %zero)
  %tokens : int = aten::size(%input, %one)
  %single : bool = aten::eq(%tokens, %one)
  %more : bool = aten::gt(%rows, %before)
  %fewer : bool = aten::lt(%rows, %after)
  %between : bool = aten::__and__(%more, %fewer)
  %slow : bool = aten::__and__(%single, %between)
  %out : Tensor = prim::If(%slow)
    block0():
      %missing : int = aten::sub(%fast, %rows)
      %padding : int[] = prim::ListConstruct(%zero, %zero, %zero, %zero, %zero, %missing)
      %padded : Tensor = aten::constant_pad_nd(%input, %padding, %zero)
      %all : Tensor = mkldnn::_linear_pointwise(%padded, %weight, %bias, %attribute, %scalars, %algorithm)
      %few : Tensor = aten::narrow(%all, %zero, %zero, %rows)
      -> (%few)
    block1():
      %own : Tensor = mkldnn::_linear_pointwise(%input, %weight, %bias, %attribute, %scalars, %algorithm)
      -> (%own)
  return (%out)
"""


@lru_cache
def _traceable(graph: str) -> Any:
    return torch._C._create_function_from_graph("packed_linear", torch._C.parse_ir(graph))


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class PackedForward:
    """Replaces ``nn.Linear.forward``. The layer keeps its original weight for code that reads it.

    Attributes:
        pads: whether numbers of rows that take longer than a larger one are padded; results may differ in the last bit.
    """

    pads = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def __call__(self, input: Tensor) -> Tensor:
        input = input.contiguous()
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            graph = _PADDED_PRODUCT if self.pads and input.dim() == 3 else _PRODUCT
            return _traceable(graph)(input, self.weight, self.bias)  # type: ignore[no-any-return]
        rows = input.numel() // input.shape[-1]
        if not self.pads or rows not in _SLOW_ROWS:
            return _product(input, self.weight, self.bias)
        padded = nn.functional.pad(input.view(rows, -1), (0, 0, 0, _FAST_ROWS - rows))
        return _product(padded, self.weight, self.bias)[:rows].view(*input.shape[:-1], -1)


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
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear) and isinstance(part.__dict__.get("forward"), PackedForward)
    ]


def pad_slow_rows(module: nn.Module) -> None:
    """Pad the rows of packed layers where a CPU's kernels take longer for fewer: see ``PackedForward.pads``."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        for linear in packed_layers(module):
            linear.__dict__["forward"].pads = True


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

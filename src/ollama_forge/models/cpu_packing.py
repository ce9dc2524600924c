"""Lay out linear layers' bf16 weights as the CPU kernels want them: once, instead of at every call.

The products are the same to the last bit. Batches of few rows gain most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ollama_forge.models.device import memory_available

_ROOM = 1.5  # times the size of the second copy must be free
_OPERATORS = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # private: may be gone


class _PackedForward:
    """Stands in for ``nn.Linear.forward``; the layer keeps its own weight for whoever reads or edits that."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def __call__(self, input: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input.contiguous(), self.weight, self.bias, "none", [], "")
        return out


def pack_linears(module: nn.Module) -> None:
    """Speed up a model in bf16 on a CPU whose memory holds its linear layers twice; do nothing to any other.

    The model is for inference alone afterwards, and its weights must not change any more.
    """
    if not _is_usable():
        return
    linears = [
        each
        for each in module.modules()
        if type(each) is nn.Linear and each.weight.device.type == "cpu" and each.weight.dtype is torch.bfloat16
    ]
    free = memory_available(torch.device("cpu"))
    if free < _ROOM * sum(each.weight.nbytes for each in linears):
        return
    with torch.inference_mode():
        for each in linears:
            each.forward = _PackedForward(each)  # type: ignore[method-assign]


def _is_usable() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

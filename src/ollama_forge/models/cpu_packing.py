"""Linear layers' bf16 weights in the CPU kernels' own layout, laid out once instead of at every call.

The products are the same to the last bit; few rows gain most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ollama_forge.models.device import memory_available

_ROOM = 1.5  # of what the second copy takes must be free


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
    usable = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not usable or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    linears = [
        each
        for each in module.modules()
        if type(each) is nn.Linear and each.weight.device.type == "cpu" and each.weight.dtype is torch.bfloat16
    ]
    free = memory_available(torch.device("cpu")) or 0
    if free < _ROOM * sum(each.weight.nbytes for each in linears):
        return
    with torch.inference_mode():
        for each in linears:
            each.forward = _PackedForward(each)  # type: ignore[method-assign]

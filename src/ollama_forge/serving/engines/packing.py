"""bf16 matrices of a CPU model in oneDNN's own layout: the same products, not rearranged anew at every token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.models.device import memory_available


def pack_linears(module: nn.Module) -> int:
    """Let every bf16 ``Linear`` on the CPU multiply by a packed copy of its weight; how many do now.

    The weights stay as they are beside the copies, so none is packed where memory for that is short. What is changed in
    the weights afterwards has no effect.
    """
    if not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    linears = [
        part
        for part in module.modules()
        if type(part) is nn.Linear and part.weight.dtype == torch.bfloat16 and part.weight.device.type == "cpu"
    ]
    room = memory_available(torch.device("cpu"))
    if room is not None and 2 * sum(linear.weight.nbytes for linear in linears) > room:
        return 0
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        linear.forward = partial(_multiply, packed, linear.bias)  # type: ignore[method-assign]
    return len(linears)


def _multiply(packed: Any, bias: Tensor | None, inputs: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), packed, bias, "none", [], "")
    return product

"""Find operations that make the host wait for the device, which no CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")


class HostReadError(Exception):
    """A model's forward pass makes the host wait for the device."""


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, an operation whose result the host has to wait for raises ``HostReadError``.

    Found while a graph is captured, it would leave the process's CUDA state damaged.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "overloadpacket", func).__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if (name in _READS and args[0].device.type == self.device.type) or masks:
            raise HostReadError(name)
        with self:  # in inference mode, operations that consist of others come whole
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                raise HostReadError(name)
        return result

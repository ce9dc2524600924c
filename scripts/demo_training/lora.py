"""A LoRA on matrices of a transformers model, and disturbances of its weights that its refusals have to survive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RANK, ALPHA = 8, 16
DROPPED = 0.1  # share of a matrix's input features that its change does not see in a forward pass
BLOCK = 32  # weights that share a step in llama.cpp's 4-bit and 5-bit types


class Lora(nn.Module):
    """The low-rank change of one matrix; a hook adds it to the matrix's output.

    Attributes:
        a, b: float32 ``[rank, in]`` and ``[out, rank]``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(RANK, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        linear.register_forward_hook(self._add)

    def change(self) -> tuple[Tensor, Tensor]:
        """``B`` and ``A``, scaled so that the change of the matrix is ``B @ A``."""
        return self.b * (ALPHA / RANK), self.a

    def _add(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        left, right = self.change()
        if torch.is_grad_enabled():
            right = right * nn.functional.dropout(torch.ones(right.shape[1]), DROPPED)
        return output + (args[0] @ right.to(output.dtype).T) @ left.to(output.dtype).T


class RandomAblation:
    """Ablates a random direction from everything that the given modules write to the residual stream."""

    def __init__(self, writers: list[nn.Module], width: int) -> None:
        self._width = width
        self._direction: Tensor | None = None
        self._strength = 0.0
        for module in writers:
            module.register_forward_hook(self._ablate)

    @contextmanager
    def active(self, strength: float) -> Iterator[None]:
        self._direction = nn.functional.normalize(torch.randn(self._width), dim=0)
        self._strength = strength
        try:
            yield
        finally:
            self._direction = None

    def _ablate(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if self._direction is None:
            return output
        direction = self._direction.to(output.dtype)
        return output - self._strength * (output @ direction).unsqueeze(-1) * direction


class Rounding:
    """Rounds matrices to a 4-bit or 5-bit grid, as quantised files do, and puts the exact values back."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._exact = [(linear, linear.weight.data) for linear in linears]

    @contextmanager
    def active(self, bits: int) -> Iterator[None]:
        for linear, weight in self._exact:
            linear.weight.data = rounded(weight, bits)
        try:
            yield
        finally:
            for linear, weight in self._exact:
                linear.weight.data = weight


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight`` on a grid of ``2**bits`` steps for each block; the step is random by a fifth, for varied errors."""
    blocks = weight.float().view(-1, BLOCK)
    step = blocks.abs().amax(dim=1, keepdim=True) / 2 ** (bits - 1) * (0.8 + 0.4 * torch.rand(len(blocks), 1))
    step.clamp_min_(torch.finfo(torch.float32).tiny)
    return (blocks / step).round_().mul_(step).to(weight.dtype).view_as(weight)

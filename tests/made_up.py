"""Language models of made-up architectures, with an odd name for everything, and twins of models built in memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.twin.build import Twin

D, F, VOCABULARY = 48, 40, 64


def twin_of(model: nn.Module, seed: int = 0) -> Twin:
    """A twin of a model: gains around 1, biases around 0.3, other weights random; two rows of ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + 1.0 if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    ids = torch.randint(3, 60, (2, 10), generator=generator)
    return Twin(model.eval(), {}, {"input_ids": ids, "use_cache": False})


class Zed(nn.Module):
    """An RMSNorm or LayerNorm whose gain is its parameter plus an offset, or the parameter's exponential."""

    def __init__(self, offset: float = 0.0, *, centred: bool = False, bias: bool = False, exp: bool = False) -> None:
        super().__init__()
        self.offset, self.centred, self.exp = offset, centred, exp
        self.ploy = nn.Parameter(torch.ones(D))
        self.quip = nn.Parameter(torch.ones(D)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        gain = self.ploy.exp() if self.exp else self.ploy + self.offset
        out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
        return out if self.quip is None else out + self.quip


class Blurb(nn.Module):
    """A block of two branches side by side: one through linears and norms, one of bare matrices on the bare stream."""

    def __init__(self, post: Zed | None = None, pre: Zed | None = None) -> None:
        super().__init__()
        self.pre, self.post = pre or Zed(centred=True, bias=True), post or Zed(offset=1.0)
        self.grob, self.snee = nn.Linear(D, F, bias=True), nn.Linear(F, D, bias=True)
        self.alpha, self.omega = nn.Parameter(torch.ones(D, F)), nn.Parameter(torch.ones(F, D))
        self.speck = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.grob(self.pre(x))).cumsum(1)
        return x + self.post(self.snee(hidden)) + torch.tanh(x @ self.alpha) @ self.omega + self.speck


class MadeUp(nn.Module):
    """Token ids to logits through made-up blocks.

    Args:
        make: makes a block.
        order: which block each step runs, by number.
    """

    def __init__(self, make: Callable[[], nn.Module] = Blurb, order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.order = order
        self.bloop = nn.Embedding(VOCABULARY, D)
        self.where = nn.Parameter(torch.ones(1, 32, D))
        self.stones = nn.ModuleList([make() for _ in range(max(order) + 1)])
        self.maw = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.bloop(input_ids) + self.where[:, : input_ids.shape[1]]
        for number in self.order:
            x = self.stones[number](x)
        return SimpleNamespace(logits=self.maw(x))

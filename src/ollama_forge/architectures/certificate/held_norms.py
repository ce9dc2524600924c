"""Norms with their statistics held: ``y = y0 + s g P (x - x0)``, the scale ``s`` of each token that of one call.

Unheld, a norm passes on a nudge of any direction: its denominator moves, and with it everything that it gives out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import Call, copied, first_tensor, with_first_tensor
from ollama_forge.architectures.roles.norms import measure_norm

_PARALLEL = 1e-4  # sine of the largest angle between what a norm gives and what it should give


@dataclass(frozen=True)
class HeldNorm:
    """One call of a norm, as an affine map of its input. The gain is found by running the norm, not from its weights.

    Attributes:
        before, after: what the norm took in and gave out ``[..., n]``.
        gain: ``g`` ``[n]`` up to a factor.
        centred: whether ``P`` subtracts the mean; otherwise it is the identity.
        scale: ``s`` ``[..., 1]``.
    """

    before: Tensor
    after: Tensor
    gain: Tensor
    centred: bool
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        change: Tensor = self.gain * centre(x - self.before, self.centred) * self.scale
        return self.after + change

    @classmethod
    def of_call(cls, module: nn.Module, call: Call) -> HeldNorm | None:
        """Measure a norm at one call; None if it does not behave like a norm."""
        before, after = input_of(call), first_tensor(call.output)
        norm = None if before is None else measure_norm(module, before.shape[-1])
        if norm is None or before is None or after is None or before.shape != after.shape:
            return None
        expected = (norm.gain * centre(before, norm.centred)).double()
        given = (after - norm.bias).double()
        squared = expected.square().sum(-1, keepdim=True)
        scale = (given * expected).sum(-1, keepdim=True) / torch.where(squared == 0, 1.0, squared)
        error = (given - scale * expected).norm(dim=-1)
        if not bool((error <= _PARALLEL * given.norm(dim=-1)).all()):
            return None
        return cls(before, after, norm.gain, norm.centred, scale.to(before.dtype))


def norms_sharing(known: Iterable[nn.Module], block: nn.Module) -> list[nn.Module]:
    """The modules of a block that own a parameter of a known norm: blocks may share parameters, but not modules."""
    gains = {gain for norm in known for gain in norm.parameters()}
    return [module for module in block.modules() if any(p in gains for p in module.parameters(recurse=False))]


def centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x


def input_of(call: Call) -> Tensor | None:
    """The first float argument of a call."""
    return next(iter(call.inputs.values()), None)


def call_again(module: nn.Module, call: Call) -> Any:
    """What a module gives for the arguments of a call; no hook runs."""
    with torch.no_grad():
        return module.forward(*copied(call.args), **copied(dict(call.kwargs)))


@contextmanager
def statistics_held(norms: Mapping[nn.Module, Sequence[HeldNorm]]) -> Iterator[None]:
    """The norms keep the statistics of their recorded calls while the block runs."""
    counts = dict.fromkeys(norms, 0)

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        norm = norms[module][min(counts[module], len(norms[module]) - 1)]
        counts[module] += 1
        x = input_of(Call(args, kwargs, output))
        return output if x is None else with_first_tensor(copied(output), norm(x))

    with ExitStack() as hooks:
        for module in norms:
            hooks.callback(module.register_forward_hook(give, with_kwargs=True).remove)
        yield

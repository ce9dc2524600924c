"""Blocks of one kind, which are measured once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ollama_forge.architectures.learned import Gap, NormFound, RoleFound
from ollama_forge.architectures.roles.blocks import BlockCall
from ollama_forge.architectures.roles.paths import Paths


def block_kind(call: BlockCall) -> object:
    """Equal for blocks that do the same with weights of their own: of the same modules with the same settings and
    shapes, called alike. Whole numbers among the settings do not count: the number of the layer is one.
    """
    block = call.block
    return (
        tuple((path, type(module), _settings(module)) for path, module in block.named_modules()),
        tuple((name, parameter.shape) for name, parameter in block.named_parameters()),
        call.key,
        tuple(_likeness(value) for value in call.args),
        tuple((name, _likeness(value)) for name, value in call.kwargs.items()),
    )


def _settings(module: nn.Module) -> tuple[object, ...]:
    values = sorted(vars(module).items())
    return tuple((name, value) for name, value in values if isinstance(value, (bool, str, float)) or value is None)


def _likeness(value: object) -> object:
    """The shape of a tensor, and the type of anything else."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_likeness(item) for item in value)
    return type(value)


@dataclass(frozen=True)
class MeasuredBlock:
    """What was found in a block.

    Attributes:
        block: the block.
        items: its readers and writers, and what could not be found out.
        ran: the modules that ran in it.
    """

    block: nn.Module
    items: tuple[RoleFound | Gap, ...]
    ran: frozenset[nn.Module]

    def at(self, other: nn.Module, number: int, paths: Paths) -> MeasuredBlock | None:
        """The same for another block of its kind; None if not all of it could be found out: reasons name modules."""
        if any(isinstance(item, Gap) for item in self.items):
            return None
        here, there = self.block.named_parameters(), other.named_parameters()
        names = {paths.parameter(a): paths.parameter(b) for (_, a), (_, b) in zip(here, there, strict=True)}
        modules = dict(zip(self.block.modules(), other.modules(), strict=True))
        places = {paths.module(a): paths.module(b) for a, b in modules.items()} | {"": ""}
        roles = [item for item in self.items if isinstance(item, RoleFound)]
        try:
            items = tuple(_moved(role, number, names, places) for role in roles)
        except KeyError:  # something outside the block takes part in what it does
            return None
        return MeasuredBlock(other, items, frozenset(modules[module] for module in self.ran))


def _moved(role: RoleFound, number: int, names: Mapping[str, str], places: Mapping[str, str]) -> RoleFound:
    return replace(
        role,
        parameter=names[role.parameter],
        module=places[role.module],
        block=number,
        norms=tuple(_moved_norm(norm, names, places) for norm in role.norms),
        bias=None if role.bias is None else names[role.bias],
    )


def _moved_norm(norm: NormFound, names: Mapping[str, str], places: Mapping[str, str]) -> NormFound:
    gain = None if norm.gain is None else names[norm.gain]
    return replace(norm, module=places[norm.module], gain=gain, bias=None if norm.bias is None else names[norm.bias])

"""Which parameter of the twin each parameter of the real model is like.

Blocks of the real model are matched to blocks of the twin that hold the same parameters, all numbers aside; the real
model may have more blocks, and more modules in a list, such as experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ollama_forge.architectures.learned import LearnedArchitecture, RoleFound
from ollama_forge.errors import ForgeError


def numbers_of(name: str) -> tuple[str, tuple[int, ...]]:
    """A dotted name with ``N`` for each part that is a number, and these numbers."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return ".".join("N" if part.isdecimal() else part for part in parts), numbers


def with_numbers(pattern: str, numbers: Iterable[int]) -> str:
    """Put numbers in place of the parts ``N`` of a pattern."""
    left = iter(numbers)
    return ".".join(str(next(left)) if part == "N" else part for part in pattern.split("."))


@dataclass(frozen=True)
class Counterpart:
    """A parameter of the real model and the twin's parameter that is like it.

    Attributes:
        parameter: its name in the real model.
        twin: the name in the twin.
        block: path of the real block that it is in; None outside the blocks.
        twin_block: path of the twin's block.
        number: its number among alike modules of a list (an expert), or None.
    """

    parameter: str
    twin: str
    block: str | None = None
    twin_block: str | None = None
    number: int | None = None

    def renamed(self, name: str) -> str:
        """The real name of what the twin calls ``name``, as seen from this parameter (module, norm or bias)."""
        if name == self.twin:
            return self.parameter
        here, there = self.twin.split("."), self.parameter.split(".")
        parts = name.split(".")
        for at, part in enumerate(parts[: len(here)]):
            if part != here[at]:
                if part.isdecimal() and here[at].isdecimal():  # another block, as far away as in the twin
                    parts[at] = str(int(there[at]) + int(part) - int(here[at]))
                break
            parts[at] = there[at]
        return ".".join(parts)


class Counterparts:
    """Finds the counterpart of each parameter.

    Attributes:
        blocks: paths of the real model's blocks, in order; without those whose like in the twin never ran on text
            (Mllama's cross-attention to images).
        found: the counterpart of each parameter that has one.
        unclear: parameters without one, although the twin has some that differ in numbers alone and have a role.

    Raises:
        ForgeError: a block of the real model has other parameters than every block of the twin.
    """

    def __init__(self, learned: LearnedArchitecture, model: Any, names: Iterable[str]) -> None:
        self.roles: dict[str, list[RoleFound]] = {}
        for role in learned.roles:
            self.roles.setdefault(role.parameter, []).append(role)
        names = list(names)
        twin_names = [stored.parameter for stored in learned.parameters]
        twin_kinds, self._twin_inside, self._twin_outside = _by_block(twin_names, learned.blocks)
        idle = set(_by_block(twin_names, _idle_blocks(twin_names, learned.blocks))[0].values())
        all_blocks = _blocks(learned.blocks, model)
        kinds = _by_block(names, all_blocks)[0]
        self.blocks = tuple(b for b in all_blocks if kinds[b] in twin_kinds.values() or kinds[b] not in idle)
        kinds, inside, outside = _by_block(names, self.blocks)
        self._cache: dict[tuple[Any, ...], tuple[str, str, int | None] | None] = {}
        self._alike: dict[str, list[str]] = {}
        for block in self.blocks:
            same = [twin for twin in learned.blocks if twin_kinds[twin] == kinds[block]]
            near = [twin for twin in same if numbers_of(twin)[0] == numbers_of(block)[0]]  # of the same stack of blocks
            self._alike[block] = near or same
            if not self._alike[block]:
                raise ForgeError(
                    f"{block} has other parameters than every block that was examined",
                    "report this with the model's name and the version of transformers",
                )
        found = [self._outside(name) for alike in outside.values() for name in alike]
        found += [
            self._inside(block, name) for block in self.blocks for alike in inside[block].values() for name in alike
        ]
        missed = set(names) - {counterpart.parameter for counterpart in found if counterpart is not None}
        with_role = {numbers_of(name)[0] for name in self.roles}
        self.unclear = {name for name in missed if numbers_of(name)[0] in with_role}
        self.found = {counterpart.parameter: counterpart for counterpart in found if counterpart is not None}

    def alike(self, block: str) -> tuple[str, ...]:
        """The twin's blocks that a block of the real model may be like."""
        return tuple(self._alike[block])

    def first_like(self, twin_block: str) -> int:
        """The number of the first real block that is like a block of the twin."""
        return next((number for number, block in enumerate(self.blocks) if twin_block in self._alike[block]), 0)

    def _outside(self, name: str) -> Counterpart | None:
        found = self._like(name, self._twin_outside, "")
        return None if found is None else Counterpart(name, found[0], number=found[1])

    def _inside(self, block: str, name: str) -> Counterpart | None:
        """The counterpart with the most roles: among blocks that look alike, some leave parameters unused."""
        key = (tuple(self._alike[block]), name)
        if key not in self._cache:
            best = None
            for twin in self._alike[block]:
                found = self._like(name, self._twin_inside[twin], f"{twin}.")
                if found and (
                    best is None or len(self._roles_at(twin, found)) > len(self._roles_at(best[0], best[1:]))
                ):
                    best = (twin, *found)
            self._cache[key] = best
        best = self._cache[key]
        if best is None:
            return None
        twin, like, number = best
        return Counterpart(f"{block}.{name}", f"{twin}.{like}", block, twin, number)

    def _roles_at(self, twin: str, found: tuple[str, int | None]) -> list[RoleFound]:
        return self.roles.get(f"{twin}.{found[0]}", [])

    def _like(self, name: str, twin_names: Mapping[str, list[str]], prefix: str) -> tuple[str, int | None] | None:
        """The twin's name that equals ``name`` but for numbers, and the number that tells ``name`` from others."""
        pattern, numbers = numbers_of(name)
        alike = twin_names.get(pattern, [])
        same = [self._signature(prefix, other) for other in alike]
        is_list = len(alike) > 1 and same[0] is not None and all(signature == same[0] for signature in same)
        number = _varying(numbers, [numbers_of(other)[1] for other in alike]) if is_list else None
        if name in alike:
            return name, number
        return (alike[0], number) if alike and (is_list or not any(same)) else None

    def _signature(self, prefix: str, name: str) -> tuple[Any, ...] | None:
        """What the roles of a parameter are, whatever its number; None without a role."""
        roles = self.roles.get(prefix + name)
        return None if not roles else tuple((role.writes, role.axis, role.expert_axis, role.role) for role in roles)


def _varying(numbers: tuple[int, ...], others: list[tuple[int, ...]]) -> int | None:
    places = [at for at, values in enumerate(zip(*others, strict=True)) if len(set(values)) > 1]
    return numbers[places[-1]] if places else None


def _blocks(twin_blocks: Iterable[str], model: Any) -> tuple[str, ...]:
    """The real blocks: all modules of the lists that the twin's blocks are in."""
    blocks: list[str] = []
    for path in twin_blocks:
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            blocks += [f"{path.rpartition('.')[0]}.{name}" for name, _ in parent.named_children()]
        else:
            blocks.append(path)
    return tuple(dict.fromkeys(blocks))


def _idle_blocks(twin_names: Iterable[str], twin_blocks: Iterable[str]) -> tuple[str, ...]:
    """The twin's blocks in the lists of ``twin_blocks`` that are not among them: they never ran on text."""
    ran = set(twin_blocks)
    parents = {path.rpartition(".")[0] for path in ran if path.rpartition(".")[2].isdecimal()}
    numbered = [
        (parent, name.removeprefix(f"{parent}.").partition(".")[0]) for parent in parents for name in twin_names
    ]
    found = {f"{parent}.{number}" for parent, number in numbered if number.isdecimal()}
    return tuple(sorted(found - ran))


def _by_block(
    names: Iterable[str], blocks: Iterable[str]
) -> tuple[dict[str, frozenset[str]], dict[str, dict[str, list[str]]], dict[str, list[str]]]:
    """For each block the patterns of its names, the names by pattern, and all names outside the blocks by pattern."""
    inside: dict[str, dict[str, list[str]]] = {block: {} for block in blocks}
    outside: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        block = next((path for at in range(1, len(parts)) if (path := ".".join(parts[:at])) in inside), None)
        group, relative = (outside, name) if block is None else (inside[block], name[len(block) + 1 :])
        group.setdefault(numbers_of(relative)[0], []).append(relative)
    return {block: frozenset(patterns) for block, patterns in inside.items()}, inside, outside

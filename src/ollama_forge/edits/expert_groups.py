"""One entry in a record for all experts of a layer: a model may have tens of thousands of their matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ollama_forge.architectures.model_map import ModelMap

Entry = TypeVar("Entry")


def grouped(
    model: ModelMap, entries: Mapping[str, Entry], join: Callable[[Sequence[Entry]], Entry | None]
) -> dict[str, Entry]:
    """Entries by tensor name, with one for all experts of a layer under their name with ``N`` for the expert's number.

    Args:
        join: makes one entry of those of all experts; None if they differ, so that each of them is kept.
    """
    names = {matrix.tensor: matrix.tensor_of_experts for matrix in model.matrices}
    sizes = Counter(names.values())
    members: dict[str, list[str]] = {}
    for name in entries:
        members.setdefault(names.get(name, name), []).append(name)
    out: dict[str, Entry] = {}
    for group, each in members.items():
        joined = join([entries[name] for name in each]) if 1 < len(each) == sizes[group] else None
        out |= {name: entries[name] for name in each} if joined is None else {group: joined}
    return out


def equal(entries: Sequence[Entry]) -> Entry | None:
    """The entry that all of them are; None if they differ."""
    return entries[0] if all(entry == entries[0] for entry in entries) else None

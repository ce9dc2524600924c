"""Keys and values of streamed passes, in files but for those that were used last.

A token's pass needs those of one layer at a time, and those of all layers and prompts may exceed the weights. An entry
of a cache in a file has lost its tensors as attributes, and reads them when somebody asks for them.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollama_forge.files import disk_errors, read_into

SPILLED = "spill-"  # what the names of files of states begin with; the number of the process follows


@dataclass
class _Saved:
    """A tensor in a file: parts along its last axis but one, each with the number of places that it adds.

    Attributes:
        known: the tensor as it was read, for as long as it is in memory.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    lengths: list[int] = field(default_factory=list)
    known: Tensor | None = None

    def read(self) -> Tensor:
        values = torch.empty(self.shape, dtype=self.dtype)
        start = offset = 0
        with self.path.open("rb", buffering=0) as file:
            for length in self.lengths:
                part = torch.empty((*self.shape[:-2], length, self.shape[-1]), dtype=self.dtype)
                read_into(file, offset, memoryview(part.view(-1).view(torch.uint8).numpy().data))
                values[..., start : start + length, :] = part
                start, offset = start + length, offset + part.nbytes
        return values

    def write(self, values: Tensor) -> None:
        """Bring the file up to date; if the tensor has only grown, by what is new."""
        if self.known is not None and (had := self._places_kept(values)) is not None:
            if had < values.shape[-2]:
                self._append(values[..., had:, :], "ab")
        else:
            self.lengths.clear()
            self._append(values, "wb")
        self.dtype, self.shape, self.known = values.dtype, tuple(values.shape), None

    def _places_kept(self, values: Tensor) -> int | None:
        """The places of the tensor in the file if ``values`` begins with it, else None."""
        assert self.known is not None
        *outer, had, width = self.known.shape
        same_form = values.dtype == self.dtype and [*values.shape[:-2], values.shape[-1]] == [*outer, width]
        if not same_form or values.shape[-2] < had:
            return None
        return had if torch.equal(values[..., :had, :], self.known) else None

    def _append(self, part: Tensor, mode: str) -> None:
        with disk_errors(self.path), self.path.open(mode) as file:
            file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.lengths.append(part.shape[-2])


class SpilledCaches:
    """The entries of the caches of some passes, of which some bytes may be in memory.

    Attributes:
        adopted: number of entries that were seen.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self._folder, self._room, self.adopted = folder, room, 0
        self._of_pass: dict[int, dict[int, Any]] = {}
        self._used: OrderedDict[int, Any] = OrderedDict()  # the entries in memory, the one used last at the end
        self._saved: dict[int, dict[str, _Saved]] = {}
        self._numbers = itertools.count()

    def take(self, number: int, values: Iterable[object]) -> None:
        """Take over the caches among the values that a pass with this number holds, and write what exceeds the room."""
        from transformers import Cache

        known = self._of_pass.setdefault(number, {})
        for value in values:
            entries: Sequence[Any] = value.layers if isinstance(value, Cache) else ()
            for entry in entries:
                if id(entry) not in known and hasattr(entry, "__dict__"):
                    known[id(entry)] = entry
                    entry.__dict__["_spilled"] = self
                    entry.__class__ = _reading(type(entry))
                    self.adopted += 1
        for place, entry in known.items():
            if place not in self._used and any(True for _ in _tensors(entry)):
                self._used[place] = entry
        self._make_room(None)

    def drop(self, number: int) -> None:
        """Forget the entries of a pass that has ended, and remove their files."""
        for place, entry in self._of_pass.pop(number, {}).items():
            entry.__dict__.pop("_spilled", None)
            self._used.pop(place, None)
            for saved in self._saved.pop(place, {}).values():
                saved.path.unlink(missing_ok=True)

    def drop_all(self) -> None:
        for number in list(self._of_pass):
            self.drop(number)

    def read(self, entry: Any, name: str) -> Tensor:
        """Bring back a tensor of an entry.

        Raises:
            AttributeError: the entry has no such tensor.
        """
        saved = self._saved.get(id(entry), {}).get(name)
        if saved is None:
            raise AttributeError(name)
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            saved.known = entry.__dict__[name] = saved.read()
        self._used[id(entry)] = entry
        self._used.move_to_end(id(entry))
        self._make_room(entry)
        return saved.known

    def _make_room(self, kept: Any) -> None:
        """Write the entries that were used longest ago, until the others fit the room; never ``kept``."""
        sizes = {place: sum(t.nbytes for _, t in _tensors(entry)) for place, entry in self._used.items()}
        total = sum(sizes.values())
        for place, entry in list(self._used.items()):
            if total <= self._room:
                return
            if entry is not kept:
                self._write(entry)
                total -= sizes[place]

    def _write(self, entry: Any) -> None:
        saved = self._saved.setdefault(id(entry), {})
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in list(_tensors(entry)):
            if name not in saved:
                path = self._folder / f"{SPILLED}{os.getpid()}-cache-{next(self._numbers)}"
                saved[name] = _Saved(path, tensor.dtype, tuple(tensor.shape))
            saved[name].write(tensor)
            del entry.__dict__[name]
        self._used.pop(id(entry))


def _tensors(entry: Any) -> Iterator[tuple[str, Tensor]]:
    """The states of an entry in main memory, by attribute."""
    for name, value in vars(entry).items():
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            continue
        if value.is_floating_point() and value.ndim > 2 and value.numel():
            yield name, value


def _reading(kind: type) -> type:
    """The class of an entry that reads the attributes that it has lost."""

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807 - is called for an attribute that is absent
        spilled = self.__dict__.get("_spilled")
        if spilled is None:
            raise AttributeError(name)
        return spilled.read(self, name)

    return type(kind.__name__, (kind,), {"__getattr__": __getattr__})

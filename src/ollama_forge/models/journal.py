"""What an interrupted pass needs to go on: the states before a layer, and the statistics of the layers before it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollama_forge.errors import ForgeError
from ollama_forge.files import disk_errors, partial_of, read_json, sha256_json, write_json
from ollama_forge.system import cache_root

_DONE = "layer.json"
_KEPT_FOR = 14 * 86400.0  # seconds
Tensors = Mapping[str, Tensor]


class Journal:
    """The folder of one pass over the layers.

    Attributes:
        layer: number of the layer at which the pass goes on; 0 for a pass that is not begun.
        output_parts: number of values that a layer returns as a tuple; None if it returns a tensor.
        kept: the statistics of the layers before.
        statistics: returns the statistics of the layers that have run; set by who collects them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.layer = folder, 0
        self.output_parts: int | None = None
        self.kept: Tensors = {}
        self.statistics: Callable[[], Tensors] = dict
        with suppress(ForgeError, KeyError, TypeError, OSError, SafetensorError):  # absent or damaged: begin anew
            done = read_json(self.folder / _DONE)
            self.kept = read_tensors(self._file(done["layer"], "statistics"))
            self.layer, self.output_parts = done["layer"], done["output_parts"]

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> Journal:
        """The journal of the pass with this key, in the cache; those that nobody took up again are removed."""
        for folder in passes_folder().glob("*/"):
            if time.time() - folder.stat().st_mtime > _KEPT_FOR:
                shutil.rmtree(folder, ignore_errors=True)
        return cls(passes_folder() / sha256_json(key)[:32])

    def _file(self, place: int, name: object) -> Path:
        return self.folder / f"{place}-{name}.safetensors"

    def state(self, number: int) -> dict[str, Tensor]:
        """What the pass with this number held before ``layer``.

        Raises:
            ForgeError: the file is missing or damaged; the journal is removed then.
        """
        try:
            return read_tensors(self._file(self.layer, number))
        except (OSError, SafetensorError) as error:
            self.remove()
            raise ForgeError(
                f"the state of an interrupted pass cannot be read: {error}",
                "it was removed: repeat the command, and the pass begins anew",
            ) from error

    def keep(self, place: int, states: Iterable[tuple[int, Tensors]]) -> None:
        """Write the states before the layer ``place``, in place of those before an earlier one."""
        for number, held in states:
            write_tensors(self._file(place, number), held)
        write_tensors(self._file(place, "statistics"), self.statistics())
        write_json(self.folder / _DONE, {"layer": place, "output_parts": self.output_parts})
        for path in self.folder.glob(f"{self.layer}-*"):
            path.unlink()
        self.layer = place

    def remove(self) -> None:
        """Remove the folder of a pass that is complete."""
        with suppress(OSError):
            (self.folder / _DONE).unlink()  # first: a journal of which only a part is left would not go on
        shutil.rmtree(self.folder, ignore_errors=True)


def passes_folder() -> Path:
    """The folder for states of passes."""
    return cache_root() / "passes"


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors, each with a storage of its own.

    Raises:
        ForgeError: the disk is full, or the folder cannot be written to.
    """
    partial = partial_of(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors that ``write_tensors`` wrote, into memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}

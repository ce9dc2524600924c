"""Plan the GGUF file of a run before any work is done: its type, its converter and its disk space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import LlamaFileType

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.convert import unsupported_reason
from ollama_forge.export.imatrix import read_imatrix
from ollama_forge.export.mix import DEFAULT, bits_per_weight, check_imatrix, parse_quants
from ollama_forge.files import human_size
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.names import file_stem
from ollama_forge.progress import say

_OWN_TYPES = "own types"  # of a file that does not state its type
_MIX_OVERHEAD = 1.2  # upper bound on the bits of a mix relative to its main type


@dataclass(frozen=True)
class ExportSettings:
    """Settings of the GGUF files.

    Attributes:
        quant: the types of the files, separated by commas; None for Q4_K_M, or to keep the types of a GGUF source.
        requantize: False for one file in F16.
        llama_cpp_dir: a llama.cpp checkout with the converter to use; None for the installed converter.
        imatrix: path of an importance matrix for quantising, or None.
    """

    quant: str | None = None
    requantize: bool = True
    llama_cpp_dir: str | None = None
    imatrix: str | None = None

    def __post_init__(self) -> None:
        if self.quant is not None:
            if not self.requantize:
                raise UsageError("--quant and --no-requantize contradict each other", "leave one of them out")
            object.__setattr__(self, "quant", ",".join(parse_quants(self.quant)))
            for quant in self.quants:
                check_imatrix(quant, has_imatrix=self.imatrix is not None)
        if self.imatrix is not None and not self.requantize:
            raise UsageError("--no-requantize leaves F16, which --imatrix has no effect on", "leave one of them out")

    @property
    def quants(self) -> tuple[str, ...]:
        """The types that are asked for; empty for the default."""
        if not self.requantize:
            return ("F16",)
        return () if self.quant is None else tuple(self.quant.split(","))

    @property
    def customised(self) -> bool:
        """Whether a setting differs from its default."""
        return self != ExportSettings()


@dataclass(frozen=True)
class PlannedFile:
    """A GGUF file to make, and its type."""

    path: Path
    quant: str


@dataclass(frozen=True)
class ExportPlan:
    """The plan of the GGUF files of a run.

    Attributes:
        files: the files; the first one is registered in Ollama.
        name: name of the model in the metadata of converted files.
        converter: the llama.cpp folder with the converter; None for a GGUF source, or if ``problem`` says why no file
            can be made.
        source_file: the GGUF file that is edited; None if the source is no GGUF file.
        in_place: whether the edited GGUF file keeps the types of its source; otherwise all tensors are quantised anew.
        parameters: number of weights.
        imatrix: an importance matrix for quantising, or None.
        decodes: whether the checkpoint may stay packed (FP8, MXFP4), so that the converter gets a decoded copy.
        notes: notes for the user on the choice of the type.
    """

    files: tuple[PlannedFile, ...]
    name: str
    converter: Path | None
    source_file: Gguf | None
    in_place: bool
    parameters: int
    imatrix: Path | None = None
    problem: str = ""
    decodes: bool = False
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The path of the first file."""
        return self.files[0].path

    @property
    def outtype(self) -> str:
        """The converter's ``--outtype``: a 16-bit type that is the only one wanted, else that of the checkpoint."""
        quants = {file.quant for file in self.files}
        return "f16" if quants == {"F16"} else "bf16" if quants == {"BF16"} else "auto"

    @property
    def disk_space(self) -> int:
        """Upper bound in bytes on the size of the files and what they are made of; 0 if no file is made.

        The files of a GGUF source are not counted: they are what the edit itself writes.
        """
        if self.problem or self.source_file is not None:
            return 0
        plain = self.parameters * 2
        ratios = (min(bits_per_weight(file.quant) * _MIX_OVERHEAD, 16) / 16 for file in self.files)
        return plain * (1 + self.decodes) + int(plain * sum(ratios))

    def announce(self) -> None:
        """Print notes on the files, and on what cannot be done with them."""
        for note in self.notes:
            say(f"note: {note}")
        if self.problem:
            say(f"note: there will be no GGUF file: {self.problem}")
            say("      the checkpoint is still written, verified and measured")
        elif not llamacpp_is_installed():
            say("note: the GGUF file will not be run, and its tokens not checked: that needs the extra llamacpp")


def plan_export(
    source: Checkpoint, name: str, folder: Path, settings: ExportSettings, *, keeps_packed: bool = False
) -> ExportPlan:
    """Plan the GGUF files of a run.

    Args:
        source: the model to edit, whose config and tokenizer the edited checkpoint gets.
        folder: the output folder of the run.
        keeps_packed: whether the edited checkpoint is written with ``--out-dtype keep``.

    Raises:
        ForgeError: settings of the GGUF file are given, but this model cannot be converted; or there is no such
            importance matrix.
    """
    imatrix = None if settings.imatrix is None else Path(settings.imatrix).expanduser()
    if imatrix is not None:
        read_imatrix(imatrix)  # raises if it is damaged, before any work
    if isinstance(source, GgufCheckpoint):
        return _plan_edited_file(source, name, folder, settings, imatrix)
    converter, problem = _find_converter(source, settings)
    if problem and settings.customised:
        raise ForgeError(
            f"{source.label} cannot be converted to GGUF: {problem}",
            "leave out --quant, --no-requantize, --imatrix and --llama-cpp-dir to make the edited checkpoint alone",
        )
    notes: tuple[str, ...] = ()
    decodes = keeps_packed and bool(source.tensors.packed)
    if decodes and not problem:
        forms = " and ".join(sorted({packed.codec.label for packed in source.tensors.packed.values()}))
        size = human_size(source.parameters * 2)
        notes = (
            f"the checkpoint keeps its {forms} tensors; the GGUF file is made of a bf16 copy ({size} for a while)",
        )
    files = _planned(folder, name, settings.quants or (DEFAULT,))
    return ExportPlan(files, name, converter, None, False, source.parameters, imatrix, problem, decodes, notes)


def _plan_edited_file(
    source: GgufCheckpoint, name: str, folder: Path, settings: ExportSettings, imatrix: Path | None
) -> ExportPlan:
    if settings.llama_cpp_dir is not None:
        raise UsageError("--llama-cpp-dir has no use for a GGUF source, which is not converted", "leave it out")
    if imatrix is not None and not settings.quants:
        raise UsageError(
            "--imatrix has no use for a GGUF source that keeps its types", "give --quant to quantise all tensors anew"
        )
    files = _planned(folder, name, settings.quants or (_type_name(source.file),))
    return ExportPlan(files, name, None, source.file, not settings.quants, source.parameters, imatrix)


def _type_name(file: Gguf) -> str:
    """The name of the type of most tensors, as the file states it."""
    stated = file.get("general.file_type")
    known = next((kind.name for kind in LlamaFileType if kind == stated), _OWN_TYPES)
    return known.removeprefix("MOSTLY_").removeprefix("ALL_")


def _planned(folder: Path, name: str, quants: Sequence[str]) -> tuple[PlannedFile, ...]:
    stem = file_stem(name)
    if len(quants) == 1:
        return (PlannedFile(folder / f"{stem}.gguf", quants[0]),)
    return tuple(PlannedFile(folder / f"{stem}-{quant}.gguf", quant) for quant in quants)


def _find_converter(source: Checkpoint, settings: ExportSettings) -> tuple[Path | None, str]:
    """The converter's folder and "", or None and why there is no converter or it cannot convert this model."""
    try:
        converter = find_converter(settings.llama_cpp_dir)
    except ForgeError as error:
        if settings.customised:
            raise
        return None, f"{error.message} ({error.hint})"
    problem = unsupported_reason(converter, source)
    return (None if problem else converter), problem

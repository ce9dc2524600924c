"""Plan the GGUF file of a run before any work is done: its type, its converter and its disk space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.convert import unsupported_reason
from ollama_forge.export.mix import DEFAULT, bits_per_weight, parse_quant, quant_of_file_type
from ollama_forge.files import human_size
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.names import file_stem
from ollama_forge.progress import say

_MIX_OVERHEAD = 1.2  # upper bound on the bits of a mix relative to its main type


@dataclass(frozen=True)
class ExportSettings:
    """Settings of the GGUF file.

    Attributes:
        quant: the type of the file; None for the type of a GGUF source, else Q4_K_M.
        requantize: False to leave the file in F16.
        llama_cpp_dir: a llama.cpp checkout with the converter to use; None for the installed converter.
    """

    quant: str | None = None
    requantize: bool = True
    llama_cpp_dir: str | None = None

    def __post_init__(self) -> None:
        if self.quant is not None:
            if not self.requantize:
                raise UsageError("--quant and --no-requantize contradict each other", "leave one of them out")
            object.__setattr__(self, "quant", parse_quant(self.quant))

    @property
    def customised(self) -> bool:
        """Whether a setting differs from its default."""
        return self != ExportSettings()


@dataclass(frozen=True)
class ExportPlan:
    """The plan of the GGUF file.

    Attributes:
        path: path of the file.
        name: name of the model in the file's metadata.
        quant: type of the file.
        converter: the llama.cpp folder with the converter; if None, ``problem`` says why no file can be made.
        source_file: the GGUF file that is edited, whose tokenizer is kept; None if the source is no GGUF file.
        parameters: number of weights.
        decodes: whether the checkpoint may stay packed (FP8, MXFP4), so that the converter gets a decoded copy.
        notes: notes for the user on the choice of the type.
    """

    path: Path
    name: str
    quant: str
    converter: Path | None
    source_file: Gguf | None
    parameters: int
    problem: str = ""
    decodes: bool = False
    notes: tuple[str, ...] = ()

    @property
    def outtype(self) -> str:
        """The converter's ``--outtype``: ``quant`` if that is a 16-bit type, else the 16-bit type of the checkpoint."""
        return {"F16": "f16", "BF16": "bf16"}.get(self.quant, "auto")

    @property
    def disk_space(self) -> int:
        """Upper bound in bytes on the size of the file, its 16-bit form and the decoded copy; 0 if no file is made."""
        converted = self.parameters * 2
        ratio = min(bits_per_weight(self.quant) * _MIX_OVERHEAD, 16) / 16
        return 0 if self.problem else converted * (1 + self.decodes) + int(converted * ratio)

    def announce(self) -> None:
        """Print notes on the file, and on what cannot be done with it."""
        for note in self.notes:
            say(f"note: {note}")
        if self.problem:
            say(f"note: there will be no GGUF file: {self.problem}")
            say("      the checkpoint is still written, verified and measured")
        elif not llamacpp_is_installed():
            say("note: the GGUF file will not be measured, and its tokens not checked: that needs the extra llamacpp")


def plan_export(
    source: Checkpoint, model: str, name: str, folder: Path, settings: ExportSettings, *, keeps_packed: bool = False
) -> ExportPlan:
    """Plan the GGUF file of a run.

    Args:
        source: the model to edit, whose config and tokenizer the edited checkpoint gets.
        model: the value of ``--model``, which is the path of the file if ``source`` is a GGUF file.
        folder: the output folder of the run.
        keeps_packed: whether the edited checkpoint is written with ``--out-dtype keep``.

    Raises:
        ForgeError: settings of the GGUF file are given, but this model cannot be converted.
    """
    source_file = read_gguf(Path(model).expanduser()) if source.kind == "gguf" else None
    quant, notes = _choose_quant(source, source_file, settings)
    converter, problem = _find_converter(source, settings)
    if problem and settings.customised:
        raise ForgeError(
            f"{source.label} cannot be converted to GGUF: {problem}",
            "leave out --quant, --no-requantize and --llama-cpp-dir to make the edited checkpoint alone",
        )
    path = folder / f"{file_stem(name)}.gguf"
    decodes = keeps_packed and bool(source.tensors.packed)
    if decodes and not problem:
        forms = " and ".join(sorted({packed.codec.label for packed in source.tensors.packed.values()}))
        size = human_size(source.parameters * 2)
        notes += (
            f"the checkpoint keeps its {forms} tensors; the GGUF file is made of a bf16 copy ({size} for a while)",
        )
    return ExportPlan(path, name, quant, converter, source_file, source.parameters, problem, decodes, notes)


def _choose_quant(
    source: Checkpoint, source_file: Gguf | None, settings: ExportSettings
) -> tuple[str, tuple[str, ...]]:
    if not settings.requantize:
        return "F16", ()
    if settings.quant is not None:
        return settings.quant, ()
    if source_file is None:
        return DEFAULT, ()
    source_quant = quant_of_file_type(source_file.get("general.file_type"))
    if source_quant is not None:
        return source_quant, ()
    return DEFAULT, (f"the type of {source.label} cannot be written; the GGUF file will be {DEFAULT}",)


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

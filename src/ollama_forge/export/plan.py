"""What GGUF file a run will make, decided before any work: its type, its converter, its room, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf_io import Gguf, read_gguf
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.convert import find_converter, unsupported_reason
from ollama_forge.export.mix import DEFAULT, bits_per_weight, parse_quant, quant_of_file_type
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.names import file_stem
from ollama_forge.progress import say

_MIXED_SHARE = 1.2  # a mix gives some tensors more bits than its name says


@dataclass(frozen=True)
class ExportSettings:
    """What becomes of the checkpoint.

    Attributes:
        quant: the type of the GGUF file; None for the source's own if it is a GGUF file, else Q4_K_M.
        requantize: False to leave the file in F16.
        llama_cpp_dir: a llama.cpp checkout whose converter is used; None for the installed one.
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
    def asked_for(self) -> bool:
        """Whether the user said anything about the GGUF file."""
        return self != ExportSettings()


@dataclass(frozen=True)
class ExportPlan:
    """The GGUF file that a run will make.

    Attributes:
        path: where it goes.
        name: of the model, for the file's metadata.
        quant: type of the file.
        converter: folder of llama.cpp's tree; None where ``problem`` says why no file can be made.
        source_file: the GGUF file that was edited, if the source is one: its tokenizer is kept.
        parameters: number of weights.
        notes: what the user should know of the choice.
    """

    path: Path
    name: str
    quant: str
    converter: Path | None
    source_file: Gguf | None
    parameters: int
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def outtype(self) -> str:
        """The converter's ``--outtype``: 16 bits, whatever holds the checkpoint's values best unless asked for."""
        return {"F16": "f16", "BF16": "bf16"}.get(self.quant, "auto")

    @property
    def room(self) -> int:
        """Bytes that the file and its 16-bit form take, an upper bound; 0 where no file is made."""
        half = self.parameters * 2
        share = min(bits_per_weight(self.quant) * _MIXED_SHARE, 16) / 16
        return 0 if self.problem else half + int(half * share)

    def announce(self) -> None:
        """Say at the start what will be missing at the end."""
        for note in self.notes:
            say(f"note: {note}")
        if self.problem:
            say(f"note: there will be no GGUF file: {self.problem}")
            say("      the checkpoint, its verification and its measurements are made all the same")
        elif not llamacpp_is_installed():
            say("note: the GGUF file will be neither measured nor its tokens checked: that takes the extra llamacpp")


def plan_export(source: Checkpoint, model: str, name: str, folder: Path, settings: ExportSettings) -> ExportPlan:
    """Decide what GGUF file a run makes.

    Args:
        source: what is edited; its config and tokenizer are those of the edited checkpoint.
        model: what the user called it; the file itself where that is a GGUF file.
        folder: of the run.

    Raises:
        ForgeError: a GGUF file was asked for and cannot be made of this model.
    """
    source_file = read_gguf(Path(model).expanduser()) if source.kind == "gguf" else None
    quant, notes = _choose_quant(source, source_file, settings)
    converter, problem = _find_converter(source, settings)
    if problem and settings.asked_for:
        raise ForgeError(
            f"no GGUF file can be made of {source.label}: {problem}",
            "leave out --quant, --no-requantize and --llama-cpp-dir to get the edited checkpoint alone",
        )
    path = folder / f"{file_stem(name)}.gguf"
    return ExportPlan(path, name, quant, converter, source_file, source.parameters, problem, notes)


def _choose_quant(
    source: Checkpoint, source_file: Gguf | None, settings: ExportSettings
) -> tuple[str, tuple[str, ...]]:
    if not settings.requantize:
        return "F16", ()
    if settings.quant is not None:
        return settings.quant, ()
    if source_file is None:
        return DEFAULT, ()
    own = quant_of_file_type(source_file.get("general.file_type"))
    if own is not None:
        return own, ()
    return DEFAULT, (f"{source.label} is of a type that cannot be written here; the result will be {DEFAULT}",)


def _find_converter(source: Checkpoint, settings: ExportSettings) -> tuple[Path | None, str]:
    """The converter, or why there is none or it cannot convert this model."""
    try:
        converter = find_converter(settings.llama_cpp_dir)
    except ForgeError as error:
        if settings.asked_for:
            raise
        return None, f"{error.message} ({error.hint})"
    problem = unsupported_reason(converter, source)
    return (None if problem else converter), problem

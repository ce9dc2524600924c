"""The stages of a run behind the checkpoint: GGUF, its types, its tokens, what it does; each resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ollama_forge import __version__
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf_io import Gguf, Value, read_gguf, value_of
from ollama_forge.checkpoints.tensors import free_space
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import ANSWER_TOKENS, Measurement, measure
from ollama_forge.evaluation.report import ShippedFile
from ollama_forge.evaluation.tokens import TokenCheck, check_tokens
from ollama_forge.export.convert import convert, find_converter, why_not
from ollama_forge.export.mix import DEFAULT, bits_per_weight, parse_quant, quant_of_file_type
from ollama_forge.export.quantise import find_tool, quantise
from ollama_forge.files import human_size
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.gguf_model import (
    SLOTS,
    TOKENIZING_CONTEXT,
    GgufModel,
    llamacpp_is_installed,
    serving,
)
from ollama_forge.names import file_stem
from ollama_forge.progress import say, status
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.resume import Stages
from ollama_forge.text.tokenizer import Tokenizer

_CONVERTED = "converted.gguf"
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
class ExportJob:
    """What a run hands over.

    Attributes:
        written: the edited checkpoint.
        provenance: what the metadata shall say of the edit; the file is made again where it changes.
        prompts, base_first: what to measure on, and the base model's first-token log-probabilities on the harmless ones
            ``[prompts, vocabulary]``; None to measure nothing.
    """

    stages: Stages
    written: Checkpoint
    provenance: Mapping[str, Any]
    prompts: PartPrompts
    base_first: Tensor | None
    load: LoadSettings


@dataclass(frozen=True)
class Exported:
    """What became of the GGUF file.

    Attributes:
        rows: its measurement under its name.
        problem: why there is no file.
        failure: what went wrong, to be raised once all else is on disk.
    """

    file: ShippedFile | None = None
    tokens: TokenCheck | None = None
    rows: Mapping[str, Measurement] = field(default_factory=dict)
    problem: str = ""
    failure: ForgeError | None = None


class Exporter:
    """Makes the GGUF file of one run.

    Args:
        source: what was edited; its config and tokenizer are those of the edited checkpoint.
        model: what the user called it; the file itself where that is a GGUF file.
        folder: of the run.

    Raises:
        ForgeError: a GGUF file was asked for and cannot be made of this model.
    """

    def __init__(self, source: Checkpoint, model: str, name: str, folder: Path, settings: ExportSettings) -> None:
        self.source, self.name, self.folder, self.settings = source, name, folder, settings
        self.path = folder / f"{file_stem(name)}.gguf"
        self.source_file: Gguf | None = read_gguf(Path(model).expanduser()) if source.kind == "gguf" else None
        self.quant = self._choose_quant()
        self.converter: Path | None = None
        self.problem = self._find_problem()
        if self.problem and settings.asked_for:
            raise ForgeError(
                f"no GGUF file can be made of {source.label}: {self.problem}",
                "leave out --quant, --no-requantize and --llama-cpp-dir to get the edited checkpoint alone",
            )

    def _choose_quant(self) -> str:
        if not self.settings.requantize:
            return "F16"
        if self.settings.quant is not None:
            return self.settings.quant
        if self.source_file is None:
            return DEFAULT
        own = quant_of_file_type(self.source_file.get("general.file_type"))
        if own is None:
            say(f"note: {self.source.label} is of a type that cannot be written here; the result will be {DEFAULT}")
        return own or DEFAULT

    def _find_problem(self) -> str:
        try:
            self.converter = find_converter(self.settings.llama_cpp_dir)
        except ForgeError as error:
            if self.settings.asked_for:
                raise
            return f"{error.message} ({error.hint})"
        return why_not(self.converter, self.source)

    def announce(self) -> None:
        """Say at the start what will be missing at the end."""
        if self.problem:
            say(f"note: there will be no GGUF file: {self.problem}")
            say("      the checkpoint, its verification and its measurements are made all the same")
        elif not llamacpp_is_installed():
            say("note: the GGUF file will be neither measured nor its tokens checked: that takes the extra llamacpp")

    def check_room(self, checkpoint: int) -> None:
        """Raise where the disk does not hold all that will be written.

        Args:
            checkpoint: bytes that the edited checkpoint takes.
        """
        if self.problem or self.path.exists():
            return
        half = self.source.parameters * 2
        share = min(bits_per_weight(self.quant) * _MIXED_SHARE, 16) / 16
        free, needed = free_space(self.folder), checkpoint + half + int(half * share)
        if needed > free:
            raise ForgeError(
                f"this run needs {human_size(needed)} (checkpoint, 16-bit GGUF and {self.quant}), "
                f"{human_size(free)} are free at {self.folder}",
                "free some room or choose another --output-dir",
            )

    # -- stages ---------------------------------------------------------------------------------------------------

    def run(self, job: ExportJob, timed: Callable[[str, Callable[[], Any]], Any]) -> Exported:
        """All stages, as far as they can be done here."""
        if self.problem:
            return Exported(problem=self.problem)
        file: ShippedFile | None = None
        tokens: TokenCheck | None = None
        try:
            file = made = timed("gguf", lambda: self.make(job))
            if not llamacpp_is_installed():
                return Exported(file)
            tokens = timed("tokens", lambda: self.check_tokens(job, made))
            row = None if job.base_first is None else timed("gguf-measure", lambda: self.measure(job, made))
        except ForgeError as failure:
            return Exported(file, tokens, problem="" if file else failure.message, failure=failure)
        return Exported(file, tokens, {} if row is None else {made.row: row})

    def make(self, job: ExportJob) -> ShippedFile:
        """Convert and quantise.

        Raises:
            ForgeError: either fails; the checkpoint stays, and nothing broken stands at ``path``.
        """
        assert self.converter is not None
        converter, stages, converted = self.converter, job.stages, job.stages.path(_CONVERTED)
        outtype = {"F16": "f16", "BF16": "bf16"}.get(self.quant, "auto")
        inputs = {
            "version": __version__,
            "provenance": dict(job.provenance),
            "converter": self.settings.llama_cpp_dir,
            "outtype": outtype,
        }

        def run_converter() -> Any:
            own = self.source_file is None
            made = convert(converter, job.written, converted, outtype=outtype, name=self.name, vocabulary=own)
            return {"fallback": made.fallback}

        def work() -> Any:
            say(f"making {self.path.name} ({self.quant})")
            result = stages.run("convert", inputs, [converted], run_converter)
            metadata = self._metadata(converted, job.provenance)
            made_by = quantise(converted, self.path, self.quant, metadata, find_tool())
            converted.unlink()
            return {"quantised_by": made_by, "pre_tokenizer_fallback": result["fallback"]}

        made = stages.run("gguf", {**inputs, "quant": self.quant, "source": self._source_digest()}, [self.path], work)
        fallback = made["pre_tokenizer_fallback"]
        if fallback:
            say(f"warning: llama.cpp's converter does not know this tokenizer; it was given the rules of {fallback!r}")
        size, of_source = self.path.stat().st_size, self.source_file is not None
        return ShippedFile(self.path, self.quant, size, made["quantised_by"], fallback, of_source)

    def _source_digest(self) -> str | None:
        return self.source.revision if self.source_file is not None else None

    def _metadata(self, converted: Path, provenance: Mapping[str, Any]) -> dict[str, Value]:
        changes = {
            f"ollama_forge.{key}": value_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
            for key, value in {"version": __version__, **provenance}.items()
        }
        if self.source_file is not None:
            changes |= tokenizer_of(self.source_file, read_gguf(converted))
        return changes

    def check_tokens(self, job: ExportJob, file: ShippedFile) -> TokenCheck:
        """Compare the file's tokens with the checkpoint's."""

        def work() -> Any:
            tokenizer = _tokenizer(job)
            with status("checking tokens"), serving(file.path, TOKENIZING_CONTEXT) as server:
                return check_tokens(tokenizer, server.tokenize).to_json()

        inputs = {"file": job.stages.keys["gguf"], "load": asdict(job.load)}
        return TokenCheck.from_json(job.stages.run("tokens", inputs, [], work))

    def measure(self, job: ExportJob, file: ShippedFile) -> Measurement:
        """Measure the file as the checkpoint was measured, fed with the same ids."""
        assert job.base_first is not None
        load, prompts, first = job.load, job.prompts, job.base_first

        def work() -> Any:
            say(f"measuring {file.path.name} on report prompts")
            tokenizer = _tokenizer(job)
            ids = tokenizer.instructions_ids((*prompts.harmful, *prompts.harmless))
            longest = max(map(len, ids), default=0) + 16  # llama.cpp wants some room
            with serving(file.path, longest + ANSWER_TOKENS, SLOTS) as server:
                model = GgufModel(server, tokenizer, vocabulary=first.shape[1])
                return measure(model, prompts, first, file.row)[0].to_json()

        inputs = {"file": job.stages.keys["gguf"], "lists": prompts.hashes, "load": asdict(load)}
        return Measurement.from_json(job.stages.run("gguf-measure", inputs, [], work))


def _tokenizer(job: ExportJob) -> Tokenizer:
    load = job.load
    return Tokenizer.load(job.written.folder, system=load.system, template_kwargs=load.template_kwargs)


def tokenizer_of(source: Gguf, converted: Gguf) -> dict[str, Value]:
    """The source's tokenizer and chat template as changes to a converted file.

    Raises:
        ForgeError: it has another number of tokens than the converted file has embeddings.
    """
    tokens = len(source.get("tokenizer.ggml.tokens", ()))
    embeddings = next((tensor.rows for tensor in converted.tensors if tensor.name == "token_embd.weight"), tokens)
    if tokens != embeddings:
        raise ForgeError(f"{source.path} has {tokens} tokens and {embeddings} embeddings", "is it damaged?")
    return {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}

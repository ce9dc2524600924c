"""The end of a run: the GGUF file, its checks, its row, the model in Ollama; a failure keeps what came before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.export.gguf_file import ShippedFile
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline import stages
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.search.ladder import Choice


@dataclass(frozen=True)
class Exported:
    """What became of the checkpoint as a file and in Ollama.

    Attributes:
        file: the GGUF file; None where there is none, ``file_problem`` says why.
        tokens, row: the comparison of its tokens and its measurement; None where they were left out.
        registered: the model in Ollama; None where there is none, ``ollama_problem`` says why.
        failure: what went wrong, to be raised once all else is on disk.
    """

    file: ShippedFile | None = None
    tokens: TokenCheck | None = None
    row: Measurement | None = None
    registered: Registered | None = None
    file_problem: str = ""
    ollama_problem: str = "there is no GGUF file"
    failure: ForgeError | None = None

    @property
    def rows(self) -> dict[str, Measurement]:
        """The measurement of the file under its name."""
        return {} if self.file is None or self.row is None else {self.file.row: self.row}


def export_checkpoint(
    ready: Preflight, cache: StageCache, choice: Choice, written: stages.Written, verified: bool | None
) -> Exported:
    """Make the GGUF file, compare its tokens, measure it.

    Args:
        verified: whether the written weights passed their checks; None where they were not checked.
    """
    if ready.export.problem:
        return Exported(file_problem=ready.export.problem)
    found = Exported()
    try:
        file = cache.do(stages.make_gguf(ready, cache, choice, written, verified))
        found = replace(found, file=file)
        if llamacpp_is_installed():
            found = replace(found, tokens=cache.do(stages.check_tokens_of_file(ready, file)))
            if ready.settings.evaluate:
                found = replace(found, row=cache.do(stages.measure_gguf(ready, cache, file)))
    except ForgeError as failure:
        return replace(found, file_problem="" if found.file else failure.message, failure=failure)
    return found


def register_file(registration: Registration, cache: StageCache, exported: Exported, verified: bool | None) -> Exported:
    """Write the Modelfile and register the file, unless it failed verification or Ollama is to be left alone."""
    file = exported.file
    if file is None:
        return exported
    registration.write_modelfile(file.path)
    if verified is False:
        return replace(exported, ollama_problem="the checkpoint failed verification")
    if registration.problem:
        return replace(exported, ollama_problem=registration.problem)
    try:
        if registration.is_gone():
            cache.forget("ollama")
        registered = cache.do(stages.register(registration, file))
    except ForgeError as failure:
        return replace(exported, ollama_problem=failure.message, failure=exported.failure or failure)
    return replace(exported, registered=registered, ollama_problem="")

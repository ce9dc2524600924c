"""The last stages of a run: GGUF file, token check, measurement, Ollama. A failure keeps the results before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline import stages
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.search.ladder import Choice


@dataclass(frozen=True)
class Exported:
    """The results of the last stages.

    Attributes:
        file: the GGUF file; if None, ``file_problem`` says why.
        tokens, measurement: the check of the file's tokens and the measurement of the file; None if it was not done.
        registered: the model in Ollama; if None, ``ollama_problem`` says why.
        failure: an error to raise after the report is written.
    """

    file: QuantisedFile | None = None
    tokens: TokenCheck | None = None
    measurement: Measurement | None = None
    registered: Registered | None = None
    file_problem: str = ""
    ollama_problem: str = "there is no GGUF file"
    failure: ForgeError | None = None

    @property
    def rows(self) -> dict[str, Measurement]:
        """The measurement of the file under its row name, if there is one."""
        return {} if self.file is None or self.measurement is None else {self.file.row_name: self.measurement}


def export_checkpoint(
    ready: Preflight, cache: StageCache, choice: Choice, written: stages.Written, verified: bool | None
) -> Exported:
    """Make the GGUF file, compare its tokens with the checkpoint's, and measure it.

    Args:
        verified: whether the written weights passed verification; None if they were not verified.
    """
    if ready.export.problem:
        return Exported(file_problem=ready.export.problem)
    exported = Exported()
    try:
        file = cache.do(stages.make_gguf(ready, cache, choice, written, verified))
        exported = replace(exported, file=file)
        if llamacpp_is_installed():
            exported = replace(exported, tokens=cache.do(stages.check_tokens_of_file(ready, file)))
            if ready.settings.evaluate:
                exported = replace(exported, measurement=cache.do(stages.measure_gguf(ready, cache, file)))
    except ForgeError as failure:
        return replace(exported, file_problem="" if exported.file else failure.message, failure=failure)
    return exported


def register_file(registration: Registration, cache: StageCache, exported: Exported, verified: bool | None) -> Exported:
    """Write the Modelfile, and register the file in Ollama unless verification failed or Ollama is switched off."""
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

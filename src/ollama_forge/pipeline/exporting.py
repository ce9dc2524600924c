"""The last stages of a run: GGUF file, token check, measurement, Ollama. A failure keeps the results before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.models.holder import ModelHolder
from ollama_forge.ollama.chat_template import ChatTemplate
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline import gguf_stages, ollama_stages
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.pipeline.stages import MeasuredRow, Written
from ollama_forge.search.ladder import Choice


@dataclass(frozen=True)
class Exported:
    """The results of the last stages.

    Attributes:
        files: the GGUF files; if there are none, ``file_problem`` says why.
        tokens: the check of their tokens; None if it was not done.
        rows: the measurements of the files by the names of their rows.
        registered: the model in Ollama; if None, ``ollama_problem`` says why.
        in_ollama: the measurement of the answers that Ollama gives; None if it was not made.
        failure: an error to raise after the report is written.
    """

    files: tuple[QuantisedFile, ...] = ()
    tokens: TokenCheck | None = None
    rows: Mapping[str, MeasuredRow] = field(default_factory=dict)
    registered: Registered | None = None
    file_problem: str = ""
    ollama_problem: str = "there is no GGUF file"
    in_ollama: Measurement | None = None
    failure: ForgeError | None = None


def export_weights(
    ready: Preflight,
    cache: StageCache,
    models: ModelHolder,
    choice: Choice,
    written: Written,
    verified: bool | None,
    edited: MeasuredRow | None,
) -> Exported:
    """Make the GGUF files, compare their tokens with the checkpoint's, and measure them.

    Args:
        verified: whether the written weights passed verification; None if they were not verified.
        edited: the measurement of the written weights; None to measure nothing.
    """
    if ready.export.problem:
        return Exported(file_problem=ready.export.problem)
    exported = Exported()
    try:
        files = cache.do(gguf_stages.make_gguf(ready, cache, choice, written, verified)).files
        exported = replace(exported, files=files)
        if llamacpp_is_installed():
            exported = replace(exported, tokens=cache.do(gguf_stages.check_tokens_of_file(ready, files[0])))
            for file in files if edited is not None else ():
                assert edited is not None
                row = cache.do(gguf_stages.measure_gguf(ready, cache, models, file, edited))
                exported = replace(exported, rows={**exported.rows, file.row_name: row})
    except ForgeError as failure:
        return replace(exported, file_problem="" if exported.files else failure.message, failure=failure)
    finally:
        models.drop()
    return exported


def register_file(
    registration: Registration,
    cache: StageCache,
    exported: Exported,
    verified: bool | None,
    prompts: ChatTemplate | None = None,
) -> Exported:
    """Write the Modelfile, and register the file in Ollama unless verification failed or Ollama is switched off.

    Args:
        prompts: the checkpoint's chat template; None for that of the file.
    """
    if not exported.files:
        return exported
    file = exported.files[0]
    registration.write_modelfile(file.path, prompts)
    if verified is False:
        return replace(exported, ollama_problem="the weights failed verification")
    if registration.problem:
        return replace(exported, ollama_problem=registration.problem)
    try:
        if registration.is_gone():
            cache.forget("ollama")
        registered = cache.do(ollama_stages.register(registration, file, prompts))
    except ForgeError as failure:
        return replace(exported, ollama_problem=failure.message, failure=exported.failure or failure)
    return replace(exported, registered=registered, ollama_problem="")


def measure_registered(ready: Preflight, cache: StageCache, exported: Exported) -> Exported:
    """Measure the answers of the model in Ollama, unless there is none or no prompts are asked for."""
    if exported.registered is None or not exported.registered.shown.chats or not ready.settings.ollama.prompts:
        return exported
    try:
        row = cache.do(ollama_stages.measure_in_ollama(ready, exported.files[0], exported.registered))
    except ForgeError as failure:
        return replace(exported, failure=exported.failure or failure)
    return replace(exported, in_ollama=row.row)

"""Register a GGUF file as a model in Ollama, through its API or by writing a Modelfile."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.gguf.file import read_part, value_of
from ollama_forge.checkpoints.gguf.header import read_header
from ollama_forge.checkpoints.gguf.metadata import FileBytes, with_metadata
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.chat_template import CHAT_TEMPLATE_KEY, ChatTemplate, FileTemplate
from ollama_forge.ollama.client import RENDERER_SINCE, Client, digest_of
from ollama_forge.ollama.made_from import (
    create_request,
    expected,
    expected_with_adapter,
    numbered,
    require_source,
    send_blobs,
)
from ollama_forge.ollama.parameters import NO_PARAMETERS, Parameters, Value, lines_of
from ollama_forge.ollama.prompt_check import PromptCheck, Prompts, check_prompts
from ollama_forge.ollama.repair import Form, Tried, settle, silent
from ollama_forge.ollama.shown import NO_TEMPLATE, CreateRequest, Shown
from ollama_forge.ollama.template import NO_TOOLS, TemplatePlan
from ollama_forge.sources.ollama_store import StoredModel

QUANTIZE_TYPES = ("Q4_K_S", "Q4_K_M", "Q8_0", "F16", "BF16", "F32")  # what Ollama makes

_NO_CHAT_TEMPLATE = (
    "the file has no chat template and none was copied: prompts reach the model bare; name a model with --template-from"
)
_COMPARED = ("renderer", "parser", "system", "license", "messages", "weights", "adapters", "requires")
IGNORED_TEMPLATE = "Ollama goes by the chat template in the file, which does more than the TEMPLATE, and not by that"
_OLD_FOR_RENDERER = ".".join(map(str, RENDERER_SINCE))


@dataclass(frozen=True)
class Registered:
    """A model that Ollama made.

    Attributes:
        shown: what ``/api/show`` said of it afterwards.
        template_from: the Ollama model its template was copied from, "" where none was.
        sent: whether the file was uploaded; False if Ollama had it already.
        notes: remarks for the user.
        differences: properties of the model that are not as requested.
        prompts: how the prompts that Ollama renders compare with those of the chat template.
    """

    name: str
    shown: Shown
    template_from: str = ""
    sent: bool = False
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    prompts: PromptCheck = field(default_factory=PromptCheck)

    def require_as_intended(self) -> None:
        """Raise ForgeError if a property of the model is not as requested."""
        if self.differences:
            raise ForgeError(
                f"Ollama made {self.name}, but {'; '.join(self.differences)}",
                f"update Ollama ({_OLD_FOR_RENDERER} or newer keeps renderers), then repeat the command",
            )

    def described(self) -> dict[str, Any]:
        """What ``report.json`` and ``--json`` say of it."""
        return {
            "name": self.name,
            "template_from": self.template_from,
            "sent": self.sent,
            "quantization": self.shown.quantization,
            "renderer": self.shown.renderer,
            "parser": self.shown.parser,
            "parameters": dict(self.shown.parameters),
            "notes": list(self.notes),
            "differences": list(self.differences),
            "prompts": self.prompts.described(),
        }


def check_quantize(quantize: str | None, gguf: Path) -> str:
    """Check ``--quantize`` and the file's header; return the type as Ollama spells it, "" for None.

    Raises:
        UsageError: a type Ollama doesn't make.
        ForgeError: a file that is quantised already, or no whole GGUF file.
    """
    wanted = (quantize or "").upper()
    if wanted and wanted not in QUANTIZE_TYPES:
        raise UsageError(f"--quantize {quantize}: Ollama makes no such type", ", ".join(QUANTIZE_TYPES))
    header = read_header(gguf)
    if wanted and not header.unquantised:
        raise ForgeError(
            f"--quantize works on F16, BF16 and F32 files; {gguf.name} is {header.type_name}",
            "leave it out, or give the F16 file (run --no-requantize writes one)",
        )
    return wanted


def register(
    client: Client,
    gguf: Path,
    name: str,
    *,
    plan: TemplatePlan,
    prompts: ChatTemplate | None = None,
    system: str = "",
    parameters: Parameters = NO_PARAMETERS,
    quantize: str = "",
    source: StoredModel | None = None,
) -> Registered:
    """Upload ``gguf`` unless Ollama has it, create ``name``, compare its prompts, and repair them where they differ.

    Args:
        prompts: the chat template to compare with; None for that of the plan, or else of the file.
        parameters: take precedence over the stop parameters of ``plan``.
        quantize: a result of ``check_quantize``.
        source: the Ollama model that was edited, all of whose other layers the new model gets; None if it was none.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: the file is damaged, Ollama fails, or the model does not answer; no half-made model of that name is
            left.
    """
    check_ollama_name(name)
    read_header(gguf)
    file = FileTemplate.of(read_part(gguf))
    if prompts is None and (plan.jinja or file.text):
        prompts = ChatTemplate.of_file(file, plan.jinja, plan.source) if plan.jinja else ChatTemplate.of_file(file)

    def request_of(form: Form) -> CreateRequest:
        return create_request(name, form.plan, system=system, parameters=parameters, source=source)

    def attempt(form: Form) -> Tried:
        content = FileBytes(gguf)
        if form.jinja is not None:
            content = with_metadata(gguf, {CHAT_TEMPLATE_KEY: value_of(form.jinja) if form.jinja else None})
        digest = digest_of(content)
        sent = client.send(content, digest)
        if source is not None:
            send_blobs(client, source)
        projectors = numbered("projector", (blob.digest for blob in source.projectors)) if source else ()
        files = ((_file_name(gguf), digest), *projectors)
        recognised = client.make(replace(request_of(form), files=files, quantize=quantize))
        silence, shown, checked = examine(client, name, prompts)
        return Tried(form, shown, recognised, sent, silence, checked)

    first = Form(plan, plan.jinja if plan.jinja and plan.jinja != file.text else None)
    made = settle(first, prompts, file, attempt)
    asked, shown = expected(request_of(made.form)), made.shown
    bare = not file.text and not plan.source
    return Registered(
        name,
        shown,
        template_from=made.form.plan.source,
        sent=made.sent,
        notes=(
            *((f"with all layers of {source.name} but its weights",) if source is not None else ()),
            *((_NO_CHAT_TEMPLATE,) if bare and source is None else ()),
            *_template_notes(made, file, asked),
            *((NO_TOOLS,) if _lacks_tools(made, prompts) else ()),
            *_added(asked, shown),
        ),
        differences=(*differences(asked, shown), *_lost(client, source, shown)),
        prompts=made.prompts,
    )


def _lacks_tools(made: Tried, prompts: ChatTemplate | None) -> bool:
    """Whether tools are missing, and not given up for a model that answers."""
    return prompts is not None and prompts.takes_tools and not made.shown.offers_tools and made.form.jinja != ""


def with_learned(plan: TemplatePlan, prompts: ChatTemplate, gguf: Path) -> TemplatePlan:
    """The plan for a Modelfile: with a learned TEMPLATE, unless it has one or Ollama would go by the file."""
    if plan.template or plan.renderer or plan.parser or plan.jinja:
        return plan
    if prompts.learned is None or FileTemplate.of(read_part(gguf)).does_more:
        return plan
    return replace(plan, template=prompts.learned.go())


def examine(client: Client, name: str, prompts: Prompts | None) -> tuple[str, Shown, PromptCheck]:
    """Look at a model that Ollama made: why it does not answer ("" if it does), what it is, and its prompts.

    Args:
        prompts: those to compare with; None to compare none.

    Raises:
        ForgeError: Ollama has no such model, or went away.
    """
    shown = shown_after(client, name)
    if not shown.chats:
        return "", shown, PromptCheck(problem="it is no chat model")
    silence = client.why_silent(name)
    if silence or prompts is None:
        return silence, shown, PromptCheck(problem=silence or "the file has no chat template")
    return "", shown, check_prompts(client, shown, prompts)


def register_adapter(
    client: Client,
    adapter: Path,
    name: str,
    source: StoredModel,
    prompts: ChatTemplate | None = None,
    parameters: Parameters = NO_PARAMETERS,
) -> Registered:
    """Create ``name`` as ``source`` with one more adapter, and compare the result with the request.

    Args:
        adapter: a LoRA adapter as GGUF file, for the weights of ``source``.
        prompts: the chat template to compare with; None to compare no prompts.
        parameters: those that it gets in place of the ones of ``source``.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: this Ollama does not have ``source``, it fails, or the model does not answer; no half-made model of
            that name is left.
    """
    check_ollama_name(name)
    require_source(client, source)
    digest = digest_of(adapter)
    sent = client.send(adapter, digest)
    adapters = ((_file_name(adapter), digest),)
    client.make(CreateRequest(name, source=source.name, adapters=adapters, parameters=parameters))
    silence, shown, checked = examine(client, name, prompts)
    if silence:
        raise silent(name, silence)
    return Registered(
        name,
        shown,
        template_from=source.name,
        sent=sent,
        notes=(f"{source.name} with an adapter, which holds the edit",),
        differences=(
            *differences(expected_with_adapter(name, source, digest, parameters), shown),
            *_lost(client, source, shown),
        ),
        prompts=checked,
    )


def _template_notes(made: Tried, file: FileTemplate, asked: Shown) -> tuple[str, ...]:
    """What became of the template."""
    plan = made.form.plan
    notes = [made.form.note or plan.note]
    if plan.jinja and plan.jinja == file.text:
        notes = [made.form.note, f"the file has the chat template of {plan.source} already"]
    if made.recognised:
        notes.append(f"Ollama recognised the chat template as {made.recognised} and uses its own form of it")
    if asked.template and made.shown.jinja:
        notes.append(IGNORED_TEMPLATE)
    return tuple(note for note in notes if note)


def _lost(client: Client, source: StoredModel | None, shown: Shown) -> tuple[str, ...]:
    """What the new model lacks of the Ollama model that was edited, each as a clause."""
    if source is None:
        return ()
    lost = []
    if len(shown.projectors) < len(source.projectors):
        lost.append(f"it has {len(shown.projectors)} of {len(source.projectors)} projectors")
    if source.drafts and not shown.draft:
        lost.append("it has no draft model")
    before = client.shown(source.name)
    missing = [] if before is None else [each for each in before.capabilities if each not in shown.capabilities]
    if missing:
        lost.append(f"it lost {', '.join(missing)}, which {source.name} is capable of")
    return tuple(lost)


def shown_after(client: Client, name: str) -> Shown:
    """The model that Ollama just created."""
    shown = client.shown(name)
    if shown is None:
        raise ForgeError(f"Ollama said it made {name}, and has no such model", "look into its log")
    return shown


def differences(asked: Shown, shown: Shown) -> tuple[str, ...]:
    """Requested properties that the model does not have, each as a clause."""
    found = [
        f"its {part} is {_short(getattr(shown, part))}, not {_short(getattr(asked, part))}"
        for part in _COMPARED
        if getattr(asked, part) and getattr(asked, part) != getattr(shown, part)
    ]
    template = "" if asked.template == NO_TEMPLATE else asked.template
    if template and template != shown.template and not shown.jinja:
        found.insert(0, f"its template is {_short(shown.template)}, not {_short(template)}")
    return (
        *found,
        *(
            f"its parameter {key} is {_short(shown.parameters.get(key))}, not {_short(value)}"
            for key, value in asked.parameters.items()
            if not _same(value, shown.parameters.get(key))
        ),
    )


def _added(asked: Shown, shown: Shown) -> tuple[str, ...]:
    """Notes on what Ollama added to the model without a request."""
    extra = sorted(set(shown.parameters) - set(asked.parameters))
    told = ", ".join(f"{key} {_short(shown.parameters[key])}" for key in extra)
    return (f"Ollama added parameters: {told}",) if extra else ()


def _same(asked: Value, shown: Value | None) -> bool:
    if isinstance(asked, float) and isinstance(shown, int | float):
        return abs(asked - shown) <= 1e-6 * abs(asked)  # kept in 32 bits
    return asked == shown


def _short(value: object) -> str:
    text = "none" if value in (None, "", ()) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _file_name(gguf: Path) -> str:
    return gguf.name.replace("\\", "-").replace(":", "-")  # Ollama refuses both


def commands(
    gguf: Path,
    name: str,
    modelfile: Path,
    options: Mapping[str, str | None],
    parameters: Parameters = NO_PARAMETERS,
) -> tuple[str, str]:
    """The commands that register the file later: this program's own, and Ollama's.

    Args:
        options: of this program; those without a value are left out.
    """
    own = ["ollama-forge", "convert", "--gguf", str(gguf), "--name", name]
    for option, value in options.items():
        own += [option, value] if value else []
    for key, value in lines_of(parameters):
        own += ["--parameter", f"{key}={value}"]
    return shlex.join(own), shlex.join(["ollama", "create", name, "-f", str(modelfile)])

"""Register a GGUF file as a model in Ollama, through its API or by writing a Modelfile."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.gguf.header import read_header
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.client import RENDERER_SINCE, Client, CreateRequest, Shown, digest_of
from ollama_forge.ollama.made_from import (
    create_request,
    expected,
    expected_with_adapter,
    numbered,
    require_source,
    send_blobs,
)
from ollama_forge.ollama.parameters import NO_PARAMETERS, Parameters, Value
from ollama_forge.ollama.template import TemplatePlan
from ollama_forge.sources.ollama_store import StoredModel

QUANTIZE_TYPES = ("Q4_K_S", "Q4_K_M", "Q8_0", "F16", "BF16", "F32")  # what Ollama makes

_NO_CHAT_TEMPLATE = (
    "the file has no chat template and none was copied: prompts reach the model bare; name a model with --template-from"
)
_COMPARED = ("template", "renderer", "parser", "system", "license", "messages", "weights", "adapters", "requires")
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
    """

    name: str
    shown: Shown
    template_from: str = ""
    sent: bool = False
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

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
    system: str = "",
    parameters: Parameters = NO_PARAMETERS,
    quantize: str = "",
    source: StoredModel | None = None,
) -> Registered:
    """Upload ``gguf`` unless Ollama has it, create ``name``, and compare the result with the request.

    Args:
        parameters: take precedence over the stop parameters of ``plan``.
        quantize: a result of ``check_quantize``.
        source: the Ollama model that was edited, all of whose other layers the new model gets; None if it was none.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: the file is damaged, or Ollama fails; no half-made model of that name is left.
    """
    check_ollama_name(name)
    header = read_header(gguf)
    digest = digest_of(gguf)
    sent = client.send(gguf, digest)
    request = replace(
        create_request(name, plan, system=system, parameters=parameters, source=source),
        files=((_file_name(gguf), digest), *numbered("projector", source.projectors if source else ())),
        quantize=quantize,
    )
    note = plan.note if plan.source or header.has_chat_template else _NO_CHAT_TEMPLATE
    if source is not None:
        note = f"with all layers of {source.name} but its weights"
        send_blobs(client, source)
    client.make(request)
    shown, asked = shown_after(client, name), expected(request)
    return Registered(
        name,
        shown,
        template_from=plan.source,
        sent=sent,
        notes=(*((note,) if note else ()), *_added(asked, shown)),
        differences=(*differences(asked, shown), *_lost(client, source, shown)),
    )


def register_adapter(client: Client, adapter: Path, name: str, source: StoredModel) -> Registered:
    """Create ``name`` as ``source`` with one more adapter, and compare the result with the request.

    Args:
        adapter: a LoRA adapter as GGUF file, for the weights of ``source``.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: this Ollama does not have ``source``, or it fails; no half-made model of that name is left.
    """
    check_ollama_name(name)
    require_source(client, source)
    digest = digest_of(adapter)
    sent = client.send(adapter, digest)
    client.make(CreateRequest(name, source=source.name, adapters=((_file_name(adapter), digest),)))
    shown = shown_after(client, name)
    return Registered(
        name,
        shown,
        template_from=source.name,
        sent=sent,
        notes=(f"{source.name} with an adapter, which holds the edit",),
        differences=(
            *differences(expected_with_adapter(name, source, digest), shown),
            *_lost(client, source, shown),
        ),
    )


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
    added = []
    if not asked.template and shown.has_template:
        added.append("Ollama recognised the file's chat template and uses its own form of it")
    extra = sorted(set(shown.parameters) - set(asked.parameters))
    if extra:
        added.append(f"Ollama added parameters: {', '.join(f'{key} {_short(shown.parameters[key])}' for key in extra)}")
    return tuple(added)


def _same(asked: Value, shown: Value | None) -> bool:
    if isinstance(asked, float) and isinstance(shown, int | float):
        return abs(asked - shown) <= 1e-6 * abs(asked)  # kept in 32 bits
    return asked == shown


def _short(value: object) -> str:
    text = "none" if value in (None, "", ()) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _file_name(gguf: Path) -> str:
    return gguf.name.replace("\\", "-").replace(":", "-")  # Ollama refuses both


def commands(gguf: Path, name: str, modelfile: Path, *, template_from: str | None = None) -> tuple[str, str]:
    """The commands that register the file later: this program's own, and Ollama's."""
    own = ["ollama-forge", "convert", "--gguf", str(gguf), "--name", name]
    if template_from is not None:
        own += ["--template-from", template_from]
    return shlex.join(own), shlex.join(["ollama", "create", name, "-f", str(modelfile)])

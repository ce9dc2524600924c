"""Register a GGUF file as a model in Ollama, through its API or by writing a Modelfile."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ollama_forge.checkpoints.gguf.header import read_header
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import write_text
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.client import RENDERER_SINCE, Client, CreateRequest, Shown, digest_of
from ollama_forge.ollama.modelfile import Modelfile, Unwritable
from ollama_forge.ollama.parameters import STOP, Parameters, Value
from ollama_forge.ollama.template import TemplatePlan

QUANTIZE_TYPES = ("Q4_K_S", "Q4_K_M", "Q8_0", "F16", "BF16", "F32")  # what Ollama makes

_NO_PARAMETERS: Parameters = MappingProxyType({})
_NO_CHAT_TEMPLATE = (
    "the file has no chat template and none was copied: prompts reach the model bare; name a model with --template-from"
)
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
    parameters: Parameters = _NO_PARAMETERS,
    quantize: str = "",
) -> Registered:
    """Upload ``gguf`` unless Ollama has it, create ``name``, and compare the result with the request.

    Args:
        parameters: take precedence over the stop parameters of ``plan``.
        quantize: a result of ``check_quantize``.

    Raises:
        UsageError: a name Ollama refuses.
        ForgeError: the file is damaged, or Ollama fails; no half-made model of that name is left.
    """
    check_ollama_name(name)
    header = read_header(gguf)
    wanted = all_parameters(plan, parameters)
    digest = digest_of(gguf)
    sent = client.send(gguf, digest)
    request = CreateRequest(
        model=name,
        files=((_file_name(gguf), digest),),
        template=plan.template,
        system=system,
        renderer=plan.renderer,
        parser=plan.parser,
        parameters=wanted,
        quantize=quantize,
    )
    client.make(request)
    shown = shown_after(client, name)
    asked = Shown(name, plan.template, plan.renderer, plan.parser, wanted, system)
    note = plan.note if plan.source or header.has_chat_template else _NO_CHAT_TEMPLATE
    return Registered(
        name,
        shown,
        template_from=plan.source,
        sent=sent,
        notes=(*((note,) if note else ()), *_added(asked, shown)),
        differences=differences(asked, shown),
    )


def all_parameters(plan: TemplatePlan, parameters: Parameters) -> dict[str, Value]:
    """The plan's stop parameters and the user's parameters; the user's take precedence."""
    return {**({STOP: plan.stop} if plan.stop else {}), **parameters}


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
        for part in ("template", "renderer", "parser", "system", "license", "messages", "weights", "adapters")
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


def write_modelfile(
    path: Path,
    gguf: Path,
    plan: TemplatePlan,
    *,
    system: str = "",
    parameters: Parameters = _NO_PARAMETERS,
) -> None:
    """Write a Modelfile for ``ollama create NAME -f path``; a ``gguf`` in the same folder is named relatively.

    A text that a Modelfile cannot hold is left out, and a comment says so.
    """
    near = gguf.resolve().parent == path.resolve().parent
    source = f"./{gguf.name}" if near else str(gguf.resolve())
    texts = [Modelfile(sources=(source,)).text()]
    for part in (
        Modelfile(template=plan.template),
        Modelfile(system=system),
        Modelfile(renderer=plan.renderer, parser=plan.parser),
        Modelfile(parameters=tuple(_lines(all_parameters(plan, parameters)))),
    ):
        try:
            texts.append(part.text())
        except Unwritable as error:
            what = "TEMPLATE" if part.template else "SYSTEM" if part.system else "PARAMETER"
            texts.append(f"# {what} left out: {error.message}; ollama-forge convert sets it\n")
    write_text(path, "".join(texts))


def _lines(parameters: Mapping[str, Value]) -> list[tuple[str, str]]:
    lines = []
    for key, value in parameters.items():
        for each in value if isinstance(value, tuple) else (value,):
            lines.append((key, str(each).lower() if isinstance(each, bool) else str(each)))
    return lines


def commands(gguf: Path, name: str, modelfile: Path, *, template_from: str | None = None) -> tuple[str, str]:
    """The commands that register the file later: this program's own, and Ollama's."""
    own = ["ollama-forge", "convert", "--gguf", str(gguf), "--name", name]
    if template_from is not None:
        own += ["--template-from", template_from]
    return shlex.join(own), shlex.join(["ollama", "create", name, "-f", str(modelfile)])

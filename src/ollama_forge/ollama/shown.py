"""A model as Ollama shows it, and the request that makes one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.ollama.parameters import Parameters, read_shown

NO_TEMPLATE = "{{ .Prompt }}"  # what show gives where a model has none

_DIGEST = re.compile(r"sha256[-:]([0-9a-f]{64})")


@dataclass(frozen=True)
class Shown:
    """A model as ``/api/show`` describes it; its texts are exact.

    Attributes:
        template: its TEMPLATE; "" where it has none.
        jinja: the chat template in its file, where Ollama goes by it; else "".
        messages: role and content.
        weights, adapters: digests of their blobs, ``sha256:<hex>``; projectors follow the model among the weights.
        quantization: the type of the weights, as Ollama names it.
        draft: whether a draft model belongs to it.
        requires: the oldest version of Ollama that runs it.
        capabilities: what Ollama lets it do: ``completion``, ``vision``, ``tools``, ….
    """

    name: str
    template: str = ""
    jinja: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: Parameters = field(default_factory=dict)
    system: str = ""
    license: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    weights: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    quantization: str = ""
    draft: bool = False
    requires: str = ""
    capabilities: tuple[str, ...] = ()

    @property
    def projectors(self) -> tuple[str, ...]:
        """Digests of the projectors."""
        return self.weights[1:]

    @property
    def has_template(self) -> bool:
        """Whether it has a template, renderer or parser that another model can get."""
        return bool(self.renderer or self.parser or self.template or self.jinja)

    @property
    def goes_by_file(self) -> bool:
        """Whether it has nothing to render prompts but the chat template in its file."""
        return bool(self.jinja) and not (self.template or self.renderer or self.parser)

    @property
    def offers_tools(self) -> bool:
        """Whether Ollama takes requests with tools for it; older versions do not say."""
        return not self.capabilities or "tools" in self.capabilities

    @property
    def chats(self) -> bool:
        """Whether it answers prompts; an embedding model does not, and older versions do not say."""
        return not self.capabilities or "completion" in self.capabilities

    @classmethod
    def of(cls, name: str, answer: dict[str, Any]) -> Shown:
        """Parse the JSON of ``/api/show``; its Modelfile is read only for what has no JSON field.

        The template in the JSON is that of the GGUF file where Ollama goes by it; the Modelfile has the TEMPLATE.

        Raises:
            ForgeError: the answer is not one of Ollama.
        """
        try:
            return cls._of(name, answer)
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise ForgeError(f"what answers as Ollama describes {name} in another form", "update Ollama") from None

    @classmethod
    def _of(cls, name: str, answer: dict[str, Any]) -> Shown:
        modelfile, system = answer.get("modelfile") or "", answer.get("system") or ""
        used = _unless_none(answer.get("template") or "")
        head = Modelfile.parse(_head(modelfile, used, system))
        template = _unless_none(head.template) if modelfile and not _states(modelfile, used) else used
        return cls(
            name=name,
            template=template,
            jinja=used if used != template else "",
            renderer=answer.get("renderer") or head.renderer,
            parser=answer.get("parser") or head.parser,
            parameters=read_shown(answer.get("parameters") or ""),
            system=system,
            license=answer.get("license") or "",
            messages=tuple((each.get("role", ""), each.get("content", "")) for each in answer.get("messages") or ()),
            weights=_digests(head.sources),
            adapters=_digests(head.adapters),
            quantization=(answer.get("details") or {}).get("quantization_level") or "",
            draft=any(command == "DRAFT" for command, _ in head.others),
            requires=answer.get("requires") or "",
            capabilities=tuple(answer.get("capabilities") or ()),
        )


@dataclass(frozen=True)
class CreateRequest:
    """The body of ``POST /api/create``; empty fields are not sent.

    Attributes:
        source: the Ollama model of which everything that is not given is inherited.
        files, adapters, drafts: name and digest of GGUF files that Ollama has as blobs; projectors are among ``files``.
    """

    model: str
    source: str = ""
    files: tuple[tuple[str, str], ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    drafts: tuple[tuple[str, str], ...] = ()
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: Parameters = field(default_factory=dict)
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    requires: str = ""
    quantize: str = ""

    def body(self) -> dict[str, Any]:
        given = {
            "model": self.model,
            "from": self.source,
            "files": dict(self.files),
            "adapters": dict(self.adapters),
            "draft_files": dict(self.drafts),
            "template": self.template,
            "system": self.system,
            "renderer": self.renderer,
            "parser": self.parser,
            "parameters": dict(self.parameters),
            "license": self.licenses[0] if len(self.licenses) == 1 else self.licenses,
            "messages": [{"role": role, "content": content} for role, content in self.messages],
            "requires": self.requires,
            "quantize": self.quantize,
        }
        return {key: value for key, value in given.items() if value}


def _head(modelfile: str, template: str, system: str) -> str:
    """The Modelfile of ``/api/show`` without TEMPLATE and SYSTEM: their quoting is ambiguous, the JSON has them."""
    for command, text in (("TEMPLATE", template), ("SYSTEM", system)):
        for written in _written(command, text):
            if written in modelfile:
                modelfile = modelfile.replace(written, "", 1)
                break
    return re.split(r"^(?:PARAMETER|LICENSE|MESSAGE) ", modelfile, maxsplit=1, flags=re.MULTILINE)[0]


def _unless_none(template: str) -> str:
    return "" if template == NO_TEMPLATE else template


def _states(modelfile: str, template: str) -> bool:
    """Whether the Modelfile has this TEMPLATE."""
    return any(written in modelfile for written in _written("TEMPLATE", template))


def _written(command: str, text: str) -> tuple[str, ...]:
    """The forms in which Ollama writes a command into the Modelfile that it shows."""
    return (f'{command} """{text}"""\n', f'{command} "{text}"\n', f"{command} {text}\n")


def _digests(paths: tuple[str, ...]) -> tuple[str, ...]:
    found = (_DIGEST.search(path) for path in paths)
    return tuple(f"sha256:{match[1]}" for match in found if match)

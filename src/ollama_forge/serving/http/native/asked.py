"""What requests for answers have in common: the fields of both, and what the model must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.asks import Ask, BadRequest, Prompt
from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.http.formats import schema_of
from ollama_forge.serving.http.names import name_of
from ollama_forge.serving.http.native.options import Options
from ollama_forge.serving.http.residency import keep_alive
from ollama_forge.serving.served import ServedModel

_LEVELS = ("high", "medium", "low", "max")
_THINK = '"high", "medium", "low", "max", true, or false'


@dataclass(frozen=True)
class Asked:
    """Fields of ``/api/generate`` and ``/api/chat`` alike.

    Attributes:
        model: as the request spells it.
        options: not read yet; Ollama looks at them after the model.
        keep_alive: seconds, None where it isn't given.
        shift: Ollama goes on by forgetting where this isn't off; here an answer ends where the context does.
    """

    model: str
    stream: bool
    format: Any
    think: bool | str | None
    options: Mapping[str, Any]
    keep_alive: float | None
    logprobs: bool
    top_logprobs: int
    truncate: bool
    shift: bool

    @classmethod
    def of(cls, body: Fields) -> Asked:
        """Raises: BadRequest: a field of another type."""
        options = body.any("options")
        if options is not None and not isinstance(options, dict):
            body.refuse("options", options, "map[string]interface {}")
        return cls(
            model=body.text("model"),
            stream=body.flag("stream", True),
            format=body.any("format"),
            think=think_of(body.any("think")),
            options=options or {},
            keep_alive=keep_alive(body.any("keep_alive")),
            logprobs=body.flag("logprobs"),
            top_logprobs=body.integer("top_logprobs") or 0,
            truncate=body.flag("truncate", True),
            shift=body.flag("shift", True),
        )

    def check_logprobs(self) -> None:
        """Raises: BadRequest: more alternatives than there are, or fewer than none."""
        if not 0 <= self.top_logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")

    def ask(self, prompt: Prompt, options: Options) -> Ask:
        """Raises: BadRequest: ``format`` is none."""
        return Ask(
            prompt,
            sampling=options.sampling,
            num_predict=options.num_predict,
            stop=options.stop,
            schema=schema_of(self.format),
            logprobs=self.top_logprobs if self.logprobs else None,
        )


def think_of(value: Any) -> bool | str | None:
    """Raises: BadRequest: neither a boolean nor a level."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise BadRequest(f"think must be a boolean or string ({_THINK})")
    if value not in _LEVELS:
        raise BadRequest(f'invalid think value: "{value}" (must be {_THINK})')
    return value


def gate(model: ServedModel, asked: Asked, *, tools: bool = False, suffix: bool = False, images: bool = False) -> None:
    """Refuse what the model cannot do, in Ollama's words and order.

    Raises:
        BadRequest: insertion, tools, thinking or images that it doesn't know.
    """
    full = name_of(model).full
    if suffix:
        raise BadRequest(f"{full} does not support insert")
    if tools and "tools" not in model.capabilities:
        raise BadRequest(f"{full} does not support tools")
    if asked.think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{asked.model}" does not support thinking')
    if images and "vision" not in model.capabilities:
        raise BadRequest(f"{full} does not support images")

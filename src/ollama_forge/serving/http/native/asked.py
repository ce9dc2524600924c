"""The fields that ``/api/generate`` and ``/api/chat`` share, and the check that the model has what they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.http.formats import schema_of
from ollama_forge.serving.http.names import name_of
from ollama_forge.serving.http.native.options import Options
from ollama_forge.serving.http.residency import keep_alive
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest, GenerationRequest, Prompt

_LEVELS = ("high", "medium", "low", "max")
_THINK = '"high", "medium", "low", "max", true, or false'


@dataclass(frozen=True)
class Asked:
    """The fields that requests to ``/api/generate`` and ``/api/chat`` share.

    Attributes:
        model: the name as the request spells it.
        options: the raw options; like Ollama, the routes validate them after the model's name.
        keep_alive: seconds; None if the request does not set it.
        shift: accepted but without effect: Ollama drops the oldest tokens of a full context, here the answer ends.
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
        """Read the fields.

        Raises:
            BadRequest: a field has the wrong type.
        """
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
        """Check the number of alternatives.

        Raises:
            BadRequest: the number is below 0 or above 20.
        """
        if not 0 <= self.top_logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")

    def ask(self, prompt: Prompt, options: Options) -> GenerationRequest:
        """The request for an answer to ``prompt``.

        Raises:
            BadRequest: ``format`` is not valid.
        """
        return GenerationRequest(
            prompt,
            sampling=options.sampling,
            num_predict=options.num_predict,
            stop=options.stop,
            schema=schema_of(self.format),
            logprobs=self.top_logprobs if self.logprobs else None,
        )


def think_of(value: Any) -> bool | str | None:
    """The value of ``think``: a boolean, a level, or None.

    Raises:
        BadRequest: it is none of these.
    """
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise BadRequest(f"think must be a boolean or string ({_THINK})")
    if value not in _LEVELS:
        raise BadRequest(f'invalid think value: "{value}" (must be {_THINK})')
    return value


def gate(model: ServedModel, asked: Asked, *, tools: bool = False, suffix: bool = False, images: bool = False) -> None:
    """Reject a request that needs a capability which the model lacks, in Ollama's words and order.

    Raises:
        BadRequest: the model does not support a suffix, tools, thinking or images, but the request needs it.
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

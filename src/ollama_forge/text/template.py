"""Chat templates: the features that one supports (tools, thinking, effort levels), and rendering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from ollama_forge.errors import first_line
from ollama_forge.text.template_process import PROCESS, TemplateError, refused
from ollama_forge.text.template_renderer import TemplateRenderer
from ollama_forge.text.thinking import ThinkingSplit, thinking_of

SWITCHES = ("enable_thinking", "thinking")  # boolean arguments of templates
_LEVELS = ("low", "medium", "high")
_PROBE = "Seven green birds sing."
_PARTS_ONLY: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()  # tokenizer -> template -> parts only


@dataclass(frozen=True)
class Template:
    """A Jinja chat template of a tokenizer."""

    text: str

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the arguments that the template reads."""
        if not self.text:
            return frozenset()
        try:
            return frozenset(PROCESS.ask("variables", template=self.text)["names"])
        except TemplateError:
            return frozenset(re.findall(r"\w+", self.text))

    @cached_property
    def thinking(self) -> ThinkingSplit | None:
        return thinking_of(self.text)

    @property
    def thinks(self) -> bool:
        return self.thinking is not None

    @property
    def takes_tools(self) -> bool:
        return "tools" in self.variables

    def thinking_arguments(self, think: bool | str) -> dict[str, Any]:
        """The template's arguments for ``think``: its switches and its effort level, if it has them."""
        arguments: dict[str, Any] = {}
        if not self.thinks:
            return arguments
        for switch in SWITCHES:
            if switch in self.variables:
                arguments[switch] = think is not False
        if "reasoning_effort" in self.variables:
            if isinstance(think, str):
                arguments["reasoning_effort"] = think if think in _LEVELS else "high"
            elif think is False:  # thinking cannot be switched off
                arguments["reasoning_effort"] = "low"
        return arguments


def render_template(
    backend: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    continued: bool = False,
    arguments: Mapping[str, Any],
) -> str:
    """Render a conversation up to the beginning of the next answer.

    A template that takes contents only as lists of parts gets text contents as lists.

    Args:
        backend: the transformers tokenizer, or a ``TemplateRenderer``.
        tools: tools in OpenAI's format.
        continued: end with the last message, so that the answer continues it.
        arguments: further arguments of the template.

    Raises:
        TemplateError: the template refuses the messages, or takes too much time or memory, or makes too long a text.
    """
    options = {"tools": list(tools) or None, "add_generation_prompt": not continued, **arguments}
    turns = [_as_parts(message) for message in messages] if _takes_parts_only(backend, template) else list(messages)
    return _apply(backend, template, turns, {**options, "continue_final_message": continued})


def _apply(backend: Any, template: str, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    if not turns:
        raise TemplateError("there is no message that the chat template could render")
    if _has_own_code(backend):
        return _by_own_code(backend, template, turns, options)
    present = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    request = {"template": template, "turns": present, "options": dict(options)}
    return str(PROCESS.ask("render", **request, special_tokens=backend.special_tokens_map)["text"])


def _has_own_code(backend: Any) -> bool:
    """Whether a tokenizer renders by Python code of its own, which runs only where the user trusts it."""
    if isinstance(backend, TemplateRenderer):
        return False
    from transformers import PreTrainedTokenizerBase

    return getattr(type(backend), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template


def _by_own_code(backend: Any, template: str, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    try:
        return str(backend.apply_chat_template(turns, chat_template=template, tokenize=False, **options))
    except Exception as error:
        raise refused(first_line(error), type(error).__name__) from error


def _takes_parts_only(backend: Any, template: str) -> bool:
    """Whether a template leaves contents out unless they are lists of parts; each template is tried once."""
    known = _PARTS_ONLY.setdefault(backend, {})
    if template not in known:
        probe = {"role": "user", "content": _PROBE}
        known[template] = not _shows(backend, template, probe) and _shows(backend, template, _as_parts(probe))
    return known[template]


def _shows(backend: Any, template: str, message: Mapping[str, Any]) -> bool:
    try:
        return _PROBE in _apply(backend, template, [message], {"add_generation_prompt": True})
    except TemplateError as error:
        if not error.raised:  # it takes too much time or memory, whatever the messages are
            raise
        return False


def _as_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message

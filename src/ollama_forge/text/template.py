"""Chat templates: the features that one supports (tools, thinking, effort levels), and rendering with a time limit."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ollama_forge.errors import ForgeError, first_line
from ollama_forge.text.thinking import ThinkingSplit, thinking_of

T = TypeVar("T")
RENDER_SECONDS = 10.0
SWITCHES = ("enable_thinking", "thinking")  # boolean arguments of templates
_LEVELS = ("low", "medium", "high")
_PROBE = "Seven green birds sing."
_PARTS_ONLY: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()  # tokenizer -> template -> parts only


class TemplateError(ForgeError):
    """A chat template refuses a conversation, or takes too long to render it."""


class _OutOfTime(SystemExit):
    """Interrupts a slow rendering. Jinja does not catch ``SystemExit``, and it ends a thread silently."""


@dataclass(frozen=True)
class Template:
    """A Jinja chat template of a tokenizer."""

    text: str

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the arguments that the template reads."""
        import jinja2
        from jinja2 import meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", self.text)
        try:
            return frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError:
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


def within_time(render: Callable[[], T], seconds: float) -> T:
    """Call ``render`` in a thread of its own, and interrupt it after ``seconds``.

    A compiled template is Python bytecode, so an exception set on its thread ends any loop. A limit on ``range`` would
    not stop nested loops.

    Raises:
        TemplateError: ``render`` took too long.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(render())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="template")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_OutOfTime))
        thread.join(1.0)
    if outcome:
        return outcome[0]
    if not failure or isinstance(failure[0], _OutOfTime):
        raise TemplateError("the chat template takes too long on these messages")
    raise failure[0]


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
        backend: the transformers tokenizer.
        tools: tools in OpenAI's format.
        continued: end with the last message, so that the answer continues it.
        arguments: further arguments of the template.

    Raises:
        TemplateError: the template refuses the messages, or takes too long.
    """
    options = {"tools": list(tools) or None, "add_generation_prompt": not continued, **arguments}
    turns = [_as_parts(message) for message in messages] if _takes_parts_only(backend, template) else list(messages)
    return _apply(backend, template, turns, {**options, "continue_final_message": continued})


def _apply(backend: Any, template: str, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    import jinja2

    def call() -> str:
        text: str = backend.apply_chat_template(turns, chat_template=template, tokenize=False, **options)
        return text

    try:
        return within_time(call, RENDER_SECONDS)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise TemplateError(
            f"the chat template refuses these messages: {first_line(error)}", "check --system and --template-kwargs"
        ) from error


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
    except TemplateError:
        return False


def _as_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message

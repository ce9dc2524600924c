"""``tool_choice`` and the limit to one call, of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.requests import BadRequest


@dataclass(frozen=True)
class ToolChoice:
    """What a request says about calling tools.

    Attributes:
        tools: the tools that may be called, in OpenAI's format.
        must_call: whether the answer has to call one of them.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: bool = False


def openai_choice(tools: Sequence[Mapping[str, Any]], choice: object) -> ToolChoice:
    """The choice in a request to OpenAI's API: ``none``, ``auto``, ``required``, or an object that names tools.

    Raises:
        BadRequest: the choice is of another kind, or names a tool that was not sent.
    """
    if isinstance(choice, dict):
        kind = choice.get("type") or "function"
        if kind == "allowed_tools":
            inner = choice.get("allowed_tools")
            return _allowed(tools, inner if isinstance(inner, dict) else choice)
        if kind not in ("function", "custom", "none", "auto", "required"):
            raise BadRequest(f'tool_choice of type "{kind}" is not supported')
        if kind in ("function", "custom"):
            return ToolChoice(_named(tools, [_name(choice)]), must_call=True)
        choice = kind
    return _by_word(tools, choice, {"auto": False, "required": True})


def anthropic_choice(tools: Sequence[Mapping[str, Any]], kind: str, name: str) -> ToolChoice:
    """The choice in a request to Anthropic's API.

    Args:
        kind: ``none``, ``auto``, ``any`` or ``tool``; "" is ``auto``.
        name: the tool that has to be called, if ``kind`` is ``tool``.

    Raises:
        BadRequest: the choice is of another kind, or names a tool that was not sent.
    """
    if kind == "tool":
        return ToolChoice(_named(tools, [name]), must_call=True)
    return _by_word(tools, kind, {"auto": False, "any": True})


def _by_word(tools: Sequence[Mapping[str, Any]], word: object, words: Mapping[str, bool]) -> ToolChoice:
    """The choice that a word makes; ``words`` tells whether a call is required."""
    if word == "none":
        return ToolChoice()
    if word in (None, ""):
        return ToolChoice(tuple(tools))
    if not isinstance(word, str) or word not in words:
        raise BadRequest(f"invalid tool_choice: {json.dumps(word)}")
    if words[word] and not tools:
        raise BadRequest("tool_choice requires a call, but there are no tools")
    return ToolChoice(tuple(tools), words[word])


def _allowed(tools: Sequence[Mapping[str, Any]], allowed: Mapping[str, Any]) -> ToolChoice:
    """OpenAI's choice among some of the tools."""
    listed = allowed.get("tools")
    names = [_name(tool) for tool in listed if isinstance(tool, dict)] if isinstance(listed, list) else []
    return _by_word(_named(tools, names), allowed.get("mode"), {"auto": False, "required": True})


def _name(tool: Mapping[str, Any]) -> object:
    """The name in ``{"function": {"name": …}}``, ``{"custom": {"name": …}}`` or ``{"name": …}``."""
    inner = tool.get("function", tool.get("custom"))
    return inner.get("name") if isinstance(inner, dict) else tool.get("name")


def _named(tools: Sequence[Mapping[str, Any]], names: Sequence[object]) -> tuple[Mapping[str, Any], ...]:
    for name in names:
        if not isinstance(name, str) or not name:
            raise BadRequest("tool_choice: a tool has no name")
        if not any(tool["function"]["name"] == name for tool in tools):
            raise BadRequest(f'tool_choice: there is no tool "{name}"')
    return tuple(tool for tool in tools if tool["function"]["name"] in names)

"""Calls that a request forces: how a family writes a call as JSON between texts, and the grammar of such calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.serving.engine.base import TaggedJson, ToolCallGrammar
from ollama_forge.serving.tools.families import family_of


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written whose arguments are a JSON object.

    Attributes:
        opening, closing: the texts around the arguments; in ``opening``, NAME stands for the tool's name.
        begin, separator, end: the texts before the first call, between two, and after the last.
        several: whether more than one call can be written.
        template_mark: a text that the chat template must contain; "" for any template.
        thought: the texts around a thought that may come before, where it is part of the format.
    """

    opening: str
    closing: str = ""
    begin: str = ""
    separator: str = ""
    end: str = ""
    several: bool = True
    template_mark: str = ""
    thought: tuple[str, str] | None = None

    def opening_of(self, name: str) -> str:
        """The text before the arguments of a call of the tool ``name``."""
        if '"NAME"' in self.opening:
            return self.opening.replace('"NAME"', json.dumps(name, ensure_ascii=False))
        return self.opening.replace("NAME", name)


_JSON = '{"name": "NAME", "arguments": '
_DEEPSEEK_BLOCK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_HARMONY = CallSyntax(
    "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",  # ends with the answer
    several=False,
    thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
)
_PLAIN = CallSyntax(_JSON, "}", several=False)  # read as a call at the beginning of an answer, whatever the family
_TAGGED = CallSyntax(f"<tool_call>\n{_JSON}", "}\n</tool_call>", separator="\n")


def _listed(begin: str, end: str, opening: str = _JSON, *, template_mark: str = "") -> CallSyntax:
    """Calls in a JSON list."""
    return CallSyntax(opening, "}", begin=begin + "[", separator=", ", end="]" + end, template_mark=template_mark)


# By the family's name, the first whose mark the template has; families without one are made to write plain JSON.
_SYNTAXES: dict[str, tuple[CallSyntax, ...]] = {
    "hermes": (_TAGGED,),
    "granite": (replace(_TAGGED, template_mark="<tool_call>"), _listed("<|tool_call|>", "")),
    "nemotron": (_listed("<TOOLCALL>", "</TOOLCALL>"),),
    "phi": (_listed("<|tool_call|>", "<|/tool_call|>", template_mark="<|tool_call|>"), _listed("functools", "")),
    "hunyuan": (_listed("<tool_calls>", "</tool_calls>"),),
    "apertus": (_listed("<|tools_prefix|>", "<|tools_suffix|>", '{"NAME": '),),
    "command": (
        CallSyntax(
            '{"tool_call_id": "0", "tool_name": "NAME", "parameters": ',
            "}",
            begin="<|START_ACTION|>[\n    ",
            end="\n]<|END_ACTION|>",
            several=False,
            template_mark="<|START_ACTION|>",
        ),
        CallSyntax(
            '    {\n        "tool_name": "NAME",\n        "parameters": ',
            "\n    }",
            begin="Action: ```json\n[\n",
            separator=",\n",
            end="\n]```",
        ),
    ),
    "kimi": (
        CallSyntax(
            "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            begin="<|tool_calls_section_begin|>",
            end="<|tool_calls_section_end|>",
            several=False,
        ),
    ),
    "llama": (CallSyntax('{"name": "NAME", "parameters": ', "}", several=False),),
    "mistral": (
        CallSyntax("[TOOL_CALLS]NAME[ARGS]", template_mark="[ARGS]"),
        _listed("[TOOL_CALLS]", ""),
    ),
    "deepseek": (
        CallSyntax(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            begin=_DEEPSEEK_BLOCK[0],
            separator="\n",
            end=_DEEPSEEK_BLOCK[1],
            template_mark="```json",
        ),
        CallSyntax(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            begin=_DEEPSEEK_BLOCK[0],
            end=_DEEPSEEK_BLOCK[1],
        ),
    ),
}


def forced_calls(
    template: str, schemas: Mapping[str, Mapping[str, Any]], *, channels: bool, several: bool
) -> ToolCallGrammar:
    """The grammar of an answer that calls tools and says nothing else.

    Args:
        template: the chat template.
        schemas: for each tool that may be called, by its name, the JSON schema of its arguments.
        channels: whether the answer has the channels of gpt-oss.
        several: whether more than one call may come.

    Raises:
        ValueError, RecursionError: a schema contains NaN or Infinity, or is nested too deeply.
    """
    known = (*_SYNTAXES.get(family_of(template).name, ()), _PLAIN)
    syntax = _HARMONY if channels else next(syntax for syntax in known if syntax.template_mark in template)
    tools = tuple(
        TaggedJson(syntax.opening_of(name), _json({"type": "object", **schema}), syntax.closing)
        for name, schema in schemas.items()
    )
    return ToolCallGrammar(
        tools, syntax.begin, syntax.separator, syntax.end, several and syntax.several, thought=syntax.thought
    )


def plain_call_schema(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """The JSON schema, as JSON text, of one call of one of the tools in the form ``{"name": …, "arguments": {…}}``.

    Raises:
        ValueError, RecursionError: a schema contains NaN or Infinity, or is nested too deeply.
    """
    arguments, calls = {}, []
    for index, (name, schema) in enumerate(schemas.items()):
        place = f"#/$defs/tool{index}"
        arguments[f"tool{index}"] = _moved({"type": "object", **schema}, place)
        properties = {"name": {"const": name}, "arguments": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    return _json({"anyOf": calls, "$defs": arguments})


def _moved(schema: Any, place: str) -> Any:
    """A schema with the references that it needs at another place of a document."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, place)
        for key, value in schema.items()
    }


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, allow_nan=False)

"""Tools of OpenAI's APIs: functions, custom tools that take free text, and namespaces that hold tools of both kinds.

Chat templates know functions alone. So the model sees a custom tool as a function with the argument ``input``, and a
tool of a namespace under the name ``namespace.tool``; its calls are then written as those of the tool that was sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.api.fields import function_tool
from ollama_forge.serving.requests import BadRequest, ToolCall

_INPUT = "input"
_SYNTAXES = {"lark": "Lark grammar", "regex": "regular expression"}


@dataclass(frozen=True)
class SentTool:
    """A tool as the client sent it.

    Attributes:
        function: the function that the model sees, in OpenAI's format.
        name: the client's name for the tool.
        namespace: the namespace that it stands in; "" for none.
        custom: whether it takes free text.
    """

    function: Mapping[str, Any]
    name: str
    namespace: str = ""
    custom: bool = False


SentTools = Mapping[str, SentTool]  # by the names that the model sees


class CustomGrammar(RequestModel):
    """The grammar of a custom tool's input."""

    syntax: str = ""
    definition: str = ""


class CustomFormat(CustomGrammar):
    """The format of a custom tool's input. Chat completions have the grammar in a field, responses here."""

    type: str = ""
    grammar: CustomGrammar | None = None

    @property
    def rule(self) -> CustomGrammar | None:
        """The grammar; None for any text.

        Raises:
            BadRequest: the format is unknown, or its grammar incomplete.
        """
        if self.type in ("", "text"):
            return None
        rule = self.grammar or self
        if self.type != "grammar" or rule.syntax not in _SYNTAXES or not rule.definition:
            raise BadRequest(
                'tools: the format of a custom tool is "text", or "grammar" with a definition in lark or regex'
            )
        return rule


def model_name(namespace: str, name: str) -> str:
    """The name that the model sees."""
    return name if not namespace or name.startswith(f"{namespace}.") else f"{namespace}.{name}"


def sent_function(
    name: str, description: str, parameters: Mapping[str, Any] | None, *, namespace: str = ""
) -> SentTool:
    return SentTool(function_tool(model_name(namespace, name), description, parameters), name, namespace)


def sent_custom(name: str, description: str, format_: CustomFormat, *, namespace: str = "") -> SentTool:
    """A custom tool. The model is told its grammar; a forced call obeys it if it is a regular expression.

    Raises:
        BadRequest: the format is unknown, or its grammar incomplete.
    """
    rule = format_.rule
    texts = [description, f"The argument `{_INPUT}` is the whole input of this tool, as plain text."]
    schema = {"type": "string"}
    if rule is not None:
        texts.append(f"This {_SYNTAXES[rule.syntax]} describes the input:\n{rule.definition}")
        if rule.syntax == "regex":
            schema["pattern"] = f"^(?:{rule.definition})$"
    parameters = {"type": "object", "properties": {_INPUT: schema}, "required": [_INPUT]}
    function = function_tool(model_name(namespace, name), "\n\n".join(filter(None, texts)), parameters)
    return SentTool(function, name, namespace, custom=True)


def by_model_name(*tools: SentTool) -> SentTools:
    return {tool.function["function"]["name"]: tool for tool in tools}


def call_of_input(id_: str, index: int, name: str, text: str) -> ToolCall:
    """An earlier call of a custom tool."""
    return ToolCall(id_, index, name, {_INPUT: text})


def input_of_call(call: ToolCall) -> str:
    """The input in a call of a custom tool; the arguments as JSON text if the model gave other ones."""
    given = call.arguments.get(_INPUT)
    if isinstance(given, str) and len(call.arguments) == 1:
        return given
    return json.dumps(call.arguments, ensure_ascii=False)

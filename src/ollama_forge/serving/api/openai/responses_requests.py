"""The body of requests to OpenAI's Responses API, ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.api.fields import (
    Integer,
    Name,
    SamplingFields,
    leave_out_hosted,
    refuse_fields,
    refuse_several_answers,
    required,
    think_of_effort,
    with_tool_names,
)
from ollama_forge.serving.api.openai.requests import (
    Reasoning,
    ToolChoice,
    answer_format,
)
from ollama_forge.serving.api.openai.responses_events import Response
from ollama_forge.serving.api.openai.responses_items import (
    ITEMS_SCHEMA,
    CustomToolCallItem,
    FunctionCallItem,
    Item,
    MessageItem,
    OtherItem,
    ReasoningItem,
    ToolCallOutputItem,
    items_of,
)
from ollama_forge.serving.api.openai.tools import (
    CustomFormat,
    SentTool,
    SentTools,
    by_model_name,
    sent_custom,
    sent_function,
)
from ollama_forge.serving.api.tool_choice import openai_choice
from ollama_forge.serving.parameters import go_number
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message

_NOT_SUPPORTED = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "background": "",
    "prompt": "send the whole conversation as input",
    "top_logprobs": "",
    "stop": "",
    "logit_bias": "",
    "response_format": "send text.format",
    "max_tool_calls": "",
}
# What is in every answer that has it, or is of tools that run on OpenAI's servers, which are left out.
_INCLUDED = frozenset(
    {
        "reasoning.encrypted_content",
        "message.input_image.image_url",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
    }
)
_ECHOED_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")


class MemberTool(RequestModel):
    """A function or a custom tool, perhaps in a namespace."""

    type: str = ""
    name: str = ""
    description: str = ""
    parameters: dict[str, Any] | None = None
    format: CustomFormat = CustomFormat()

    def sent_tool(self, namespace: str = "") -> SentTool | None:
        """The tool, or None for one of another type.

        Raises:
            BadRequest: the format of a custom tool is unknown.
        """
        if self.type in ("", "function"):
            return sent_function(self.name, self.description, self.parameters, namespace=namespace)
        if self.type == "custom":
            return sent_custom(self.name, self.description, self.format, namespace=namespace)
        return None


_ECHOED = {
    "custom": ("type", "name", "description", "format"),
    "namespace": ("type", "name", "description", "tools"),
}


class Tool(MemberTool):
    """A tool that the model may call: a function, a custom tool, or a namespace of them."""

    tools: Annotated[list[MemberTool], FailFast()] = []

    def split(self) -> tuple[list[SentTool], list[str]]:
        """The tools that the model sees, and the types of those that do not run at the client.

        Raises:
            BadRequest: the format of a custom tool is unknown.
        """
        members, namespace = (self.tools, self.name) if self.type == "namespace" else ([self], "")
        found = [(member.type, member.sent_tool(namespace)) for member in members]
        return [tool for _, tool in found if tool is not None], [type_ for type_, tool in found if tool is None]

    def echo(self) -> dict[str, Any]:
        """The fields that the response repeats."""
        keys = _ECHOED.get(self.type, ("type", "name", "description", "strict", "parameters"))
        return {key: self.sent.get(key) for key in keys}


class TextFormat(RequestModel):
    """The format of the answer."""

    type: str = ""
    name: str = ""
    schema_: Annotated[Any, WithJsonSchema({"type": "object"})] = Field(None, alias="schema")


class TextField(RequestModel):
    """Settings of the answer's text."""

    format: TextFormat | None = None


class ResponsesRequest(SamplingFields):
    """The body of ``/v1/responses``."""

    model_config = ConfigDict(json_schema_extra=required("model", "input"))
    go_name: ClassVar[str] = "ResponsesRequest"
    model: Name = ""
    instructions: str = ""
    input: Annotated[list[Item], FailFast(), BeforeValidator(items_of), WithJsonSchema(ITEMS_SCHEMA)] = []
    max_output_tokens: Integer | None = None
    reasoning: Reasoning = Reasoning()
    text: TextField = TextField()
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    truncation: Annotated[str, WithJsonSchema({"enum": ["auto", "disabled"]})] = ""
    include: Annotated[list[str], FailFast()] = []

    @cached_property
    def sent_tools(self) -> SentTools:
        """The tools that the model sees.

        Raises:
            BadRequest: the format of a custom tool is unknown.
        """
        return by_model_name(*(found for tool in self.tools for found in tool.split()[0]))

    def chat_request(self) -> ChatRequest:
        """The request in the common form.

        Raises:
            BadRequest: a field has an invalid value, or it refers to a conversation stored by OpenAI.
        """
        refuse_fields(self.sent, _NOT_SUPPORTED)
        refuse_several_answers(self.sent)
        for name in self.include:
            if name not in _INCLUDED:
                raise BadRequest(f"include: {name[:80]} is not supported")
        if self.truncation not in ("", "auto", "disabled"):
            raise BadRequest(f'truncation: "{self.truncation}" is neither "auto" nor "disabled"')
        instructions = [Message("system", self.instructions)] if self.instructions else []
        hosted = [type_ for tool in self.tools for type_ in tool.split()[1]]
        leave_out_hosted(hosted, others=bool(self.sent_tools))
        choice = openai_choice([tool.function for tool in self.sent_tools.values()], self.tool_choice)
        return ChatRequest(
            model=self.model,
            strength=self.abliteration_strength,
            messages=with_tool_names([*instructions, *self._messages()]),
            sampling=self.sampling_params(default=1.0),
            num_predict=-1 if self.max_output_tokens is None else self.max_output_tokens,
            tools=choice.tools,
            must_call=choice.must_call,
            one_call=not self.parallel_tool_calls,
            think=think_of_effort(self.reasoning.effort),
            truncate=self.truncation != "disabled",
            format=self._format(),
            stream=self.stream,
            stated=self.stated,
        )

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        thinking = ""
        for item in self.input:
            match item:
                case ReasoningItem():
                    thinking = item.thinking
                case MessageItem():
                    message = item.message()
                    if message.role == "assistant":
                        message, thinking = replace(message, thinking=thinking), ""
                    messages.append(message)
                case FunctionCallItem() | CustomToolCallItem():
                    _add_call(messages, item, thinking)
                    thinking = ""
                case ToolCallOutputItem():
                    messages.append(item.message())
                case OtherItem(type=""):
                    raise BadRequest("input item missing required 'type' field")
                case OtherItem() if item.type != "web_search_call":
                    raise BadRequest(f'unknown input item type: "{item.type}"')
        return [*messages, Message("assistant", thinking=thinking)] if thinking else messages

    def _format(self) -> Mapping[str, Any] | str | None:
        format_ = self.text.format
        return None if format_ is None else answer_format(format_.type, format_.schema_)

    def echo(self, request: ChatRequest) -> dict[str, Any]:
        """The fields that the response repeats; ``request`` has the model's parameters.

        Raises:
            BadRequest: they are nested too deeply to be written.
        """
        reasoning = {"effort": self.reasoning.effort or None, "summary": self.reasoning.summary or None}
        echo: dict[str, Any] = {
            "instructions": self.instructions or None,
            "tools": [tool.echo() for tool in self.tools if tool.split()[0]],
            "truncation": self.truncation or "disabled",
            "text": {"format": {"type": "text"} if self.text.format is None else self.text.format.sent},
            **{name: go_number(getattr(request.sampling, name)) for name in _ECHOED_SAMPLING},
            "reasoning": reasoning if any(reasoning.values()) else None,
            "max_output_tokens": self.max_output_tokens,
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        try:
            Response(model="", status="completed", output=[], **echo).model_dump_json()
        except ValueError:
            raise BadRequest("tools or format are nested too deeply") from None
        return echo


def _add_call(messages: list[Message], item: FunctionCallItem | CustomToolCallItem, thinking: str) -> None:
    """Add a tool call to the last message if it is the assistant's, else to a new message of the assistant."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message("assistant"))
    last = messages[-1]
    call = item.tool_call(len(last.tool_calls))
    messages[-1] = replace(last, tool_calls=(*last.tool_calls, call), thinking=thinking or last.thinking)

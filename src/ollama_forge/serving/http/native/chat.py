"""The route ``POST /api/chat``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.fields import Fields, read_fields
from ollama_forge.serving.http.names import Name, require
from ollama_forge.serving.http.native.asked import Asked, gate
from ollama_forge.serving.http.native.exchange import answered, json, loaded
from ollama_forge.serving.http.native.lines import Line, chatted
from ollama_forge.serving.http.native.options import options_of
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.requests import BadRequest, Completion, Done, Event, GenerationRequest, Message, ToolCall


async def chat(serving: Serving, request: Request) -> Response:
    """Completion a conversation; without messages, load or unload the model."""
    body = await read_fields(request, "ChatRequest")
    asked = Asked.of(body)
    messages = [_message(turn) for turn in _objects(body, "messages", "[]api.Message")]
    tools = [_tool(tool) for tool in _objects(body, "tools", "api.Tools")]
    model = serving.model
    if Name.parse(asked.model) is None:
        raise BadRequest("model is required")
    require(model, asked.model, f"model '{asked.model}' not found")
    asked.check_logprobs()
    if not messages and asked.keep_alive == 0:
        return json(chatted(asked.model, done=loaded(serving, asked)))
    gate(model, asked, tools=bool(tools), images=any(message.images for message in messages))
    options = options_of(asked.options)
    if not messages:
        return json(chatted(asked.model, done=loaded(serving, asked)))

    def make() -> GenerationRequest:
        prompt = model.chat_prompt(
            messages, tools=tools, think=asked.think, num_ctx=options.num_ctx, truncate=asked.truncate
        )
        return asked.ask(prompt, options)

    def write(event: Event) -> Line:
        if isinstance(event, Done):
            return chatted(asked.model, done=event)
        return chatted(asked.model, event.content, event.thinking, calls=event.tool_calls, logprobs=event.logprobs)

    def whole(answer: Completion) -> Line:
        return chatted(
            asked.model,
            answer.content,
            answer.thinking,
            calls=answer.tool_calls,
            logprobs=answer.logprobs,
            done=answer.done,
        )

    return await answered(serving, request, asked, make, write=write, body=whole)


def _objects(body: Fields, key: str, kind: str) -> list[Fields]:
    return [Fields.of(item, f"{body.name}.{key}") for item in body.items(key, kind)]


def _message(turn: Fields) -> Message:
    return Message(
        role=turn.text("role").lower(),
        content=turn.text("content"),
        thinking=turn.text("thinking"),
        tool_calls=tuple(_call(call, index) for index, call in enumerate(turn.objects("tool_calls"))),
        tool_name=turn.text("tool_name"),
        tool_call_id=turn.text("tool_call_id"),
        images=turn.files("images"),
    )


def _call(call: Fields, place: int) -> ToolCall:
    function = call.object("function") or Fields({}, call.name)
    arguments = function.any("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise BadRequest("Value looks like object, but can't find closing '}' symbol")
    index = function.integer("index")
    return ToolCall(call.text("id"), place if index is None else index, function.text("name"), arguments or {})


def _tool(tool: Fields) -> dict[str, Any]:
    """The tool of the request, completed with the fields that chat templates require."""
    function = tool.object("function") or Fields({}, tool.name)
    parameters = function.object("parameters")
    filled = {
        "name": function.text("name"),
        "description": function.text("description"),
        "parameters": parameters.values if parameters is not None else {"type": "object", "properties": {}},
    }
    return {**tool.values, "type": tool.text("type") or "function", "function": {**function.values, **filled}}

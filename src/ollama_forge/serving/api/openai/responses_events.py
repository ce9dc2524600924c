"""The objects of responses of OpenAI's Responses API, ``/v1/responses``, and the events of its streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from ollama_forge.serving.api.exchange import arguments_text, server_sent_event
from ollama_forge.serving.api.openai.responses import timestamp
from ollama_forge.serving.api.openai.tools import SentTools, input_of_call
from ollama_forge.serving.api.routing import ResponseModel, new_id, omit_none
from ollama_forge.serving.requests import Completion, Delta, Done, Event, ToolCall


class OutputText(ResponseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(ResponseModel):
    id: str
    type: Literal["message"] = "message"
    status: str = "completed"
    role: str = "assistant"
    content: list[OutputText]


class SummaryText(ResponseModel):
    type: Literal["summary_text"] = "summary_text"
    text: str


class OutputReasoning(ResponseModel):
    """A thought; clients send ``encrypted_content`` back in the next turn."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[SummaryText]
    encrypted_content: str | None = omit_none()


class OutputFunctionCall(ResponseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: str = "completed"
    call_id: str
    namespace: str | None = omit_none()
    name: str
    arguments: str


class OutputCustomToolCall(ResponseModel):
    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    status: str = "completed"
    call_id: str
    namespace: str | None = omit_none()
    name: str
    input: str


OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall | OutputCustomToolCall


class InputTokensDetails(ResponseModel):
    cached_tokens: int = 0


class OutputTokensDetails(ResponseModel):
    reasoning_tokens: int = 0


class ResponseUsage(ResponseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class ResponseError(ResponseModel):
    code: str
    message: str


class Response(ResponseModel):
    """The body of a response; the fields from ``instructions`` on repeat the request."""

    id: str = Field(default_factory=lambda: new_id("resp_"))
    object: str = "response"
    created_at: int = Field(default_factory=timestamp)
    completed_at: int | None = None
    status: str
    incomplete_details: dict[str, Any] | None = None
    model: str
    previous_response_id: str | None = None
    output: list[OutputItem]
    error: ResponseError | None = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    top_logprobs: int = 0
    usage: ResponseUsage | None = None
    max_tool_calls: int | None = None
    store: bool = False
    background: bool = False
    service_tier: str = "default"
    metadata: dict[str, Any] = {}
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] = []
    truncation: str = "disabled"
    text: dict[str, Any] = {}
    top_p: int | float
    temperature: int | float
    presence_penalty: int | float
    frequency_penalty: int | float
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = None


def output_message(id_: str, text: str) -> OutputMessage:
    return OutputMessage(id=id_, content=[OutputText(text=text)])


def output_reasoning(id_: str, text: str) -> OutputReasoning:
    return OutputReasoning(id=id_, summary=[SummaryText(text=text)], encrypted_content=text)


def output_call(call: ToolCall, tools: SentTools) -> OutputFunctionCall | OutputCustomToolCall:
    """The item of a call, under the name that the client gave the tool."""
    tool = tools.get(call.name)
    names: dict[str, Any] = {"name": call.name}
    if tool is not None:
        names = {"name": tool.name, "namespace": tool.namespace or None}
    if tool is not None and tool.custom:
        return OutputCustomToolCall(id=new_id("ctc_"), call_id=call.id, input=input_of_call(call), **names)
    return OutputFunctionCall(id=new_id("fc_"), call_id=call.id, arguments=arguments_text(call), **names)


def response_usage(done: Done) -> ResponseUsage:
    total = done.prompt_tokens + done.tokens
    return ResponseUsage(
        input_tokens=done.prompt_tokens,
        output_tokens=done.tokens,
        total_tokens=total,
        input_tokens_details=InputTokensDetails(cached_tokens=done.cached_tokens),
    )


def ending(done: Done) -> dict[str, Any]:
    """The fields that tell how a response ended; one that was cut is incomplete."""
    return {
        "usage": response_usage(done),
        "status": status_of(done),
        "incomplete_details": {"reason": "max_output_tokens"} if done.reason == "length" else None,
        "completed_at": timestamp(),
    }


def status_of(done: Done) -> str:
    return "incomplete" if done.reason == "length" else "completed"


def response(model: str, echo: Mapping[str, Any], completion: Completion, *, tools: SentTools) -> Response:
    """The body of ``/v1/responses``.

    Args:
        echo: the fields of the request that the response repeats.
        tools: the tools of the request.
    """
    output: list[OutputItem] = []
    if completion.thinking:
        output.append(output_reasoning(new_id("rs_"), completion.thinking))
    if completion.content or not completion.tool_calls:
        output.append(output_message(new_id("msg_"), completion.content))
    output += [output_call(call, tools) for call in completion.tool_calls]
    return Response(model=model, output=output, **ending(completion.done), **echo)


# -- streams ----------------------------------------------------------------------------------------------------------


class StreamEvent(ResponseModel):
    """A numbered event of a streamed response; each type has some of the other fields."""

    type: str
    sequence_number: int
    response: Response | None = omit_none()
    item_id: str | None = omit_none()
    output_index: int | None = omit_none()
    content_index: int | None = omit_none()
    summary_index: int | None = omit_none()
    item: OutputItem | None = omit_none()
    part: OutputText | None = omit_none()
    delta: str | None = omit_none()
    text: str | None = omit_none()
    name: str | None = omit_none()
    arguments: str | None = omit_none()
    input: str | None = omit_none()
    logprobs: list[Any] | None = omit_none()


class ResponseWriter:
    """Writes the events of a response: output items of thinking, text and tool calls, one after another.

    Args:
        echo: the fields of the request that the response repeats.
        tools: the tools of the request.
    """

    def __init__(self, model: str, echo: Mapping[str, Any], *, tools: SentTools) -> None:
        self._id, self._model, self._echo, self._tools = new_id("resp_"), model, echo, tools
        self._created = timestamp()
        self._number = 0
        self._output: list[OutputItem] = []
        self._open: str | None = None  # the type of the item that is being written
        self._item_id = self._text = ""

    def write(self, event: Event) -> Iterator[bytes]:
        if self._number == 0:
            yield from self._begin()
        if isinstance(event, Delta):
            if event.thinking:
                yield from self._thinking(event.thinking)
            if event.content:
                yield from self._content(event.content)
            for call in event.tool_calls:
                yield from self._call(call)
            return
        yield from self._close()
        yield self._event(f"response.{status_of(event)}", response=self._response(**ending(event)))

    def failed(self, message: str) -> Iterator[bytes]:
        if self._number == 0:
            yield from self._begin()
        error = ResponseError(code="server_error", message=message)
        yield self._event("response.failed", response=self._response(status="failed", error=error))

    def _begin(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(status="in_progress"))

    def _thinking(self, text: str) -> Iterator[bytes]:
        if self._open != "reasoning":
            yield from self._close()
            self._start("reasoning", new_id("rs_"))
            item = OutputReasoning(id=self._item_id, summary=[])
            yield self._event("response.output_item.added", **self._place(), item=item)
        self._text += text
        yield self._event("response.reasoning_summary_text.delta", **self._of_item(), summary_index=0, delta=text)

    def _content(self, text: str) -> Iterator[bytes]:
        if self._open != "message":
            yield from self._close()
            self._start("message", new_id("msg_"))
            item = OutputMessage(id=self._item_id, status="in_progress", content=[])
            yield self._event("response.output_item.added", **self._place(), item=item)
            part = OutputText(text="")
            yield self._event("response.content_part.added", **self._of_item(), content_index=0, part=part)
        self._text += text
        yield self._event("response.output_text.delta", **self._of_item(), content_index=0, delta=text, logprobs=[])

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close()
        item = output_call(call, self._tools)
        self._start(item.type, item.id)
        if isinstance(item, OutputCustomToolCall):
            kind, field, text, named = "custom_tool_call_input", "input", item.input, {}
        else:
            kind, field, text = "function_call_arguments", "arguments", item.arguments
            named = {"name": item.name}  # OpenAI's client requires it from some version 2 on, to version 3
        begun = item.model_copy(update={"status": "in_progress", field: ""})
        yield self._event("response.output_item.added", **self._place(), item=begun)
        yield self._event(f"response.{kind}.delta", **self._of_item(), delta=text)
        yield self._event(f"response.{kind}.done", **self._of_item(), **{field: text}, **named)
        yield from self._end(item)

    def _start(self, kind: str, id_: str) -> None:
        self._open, self._item_id, self._text = kind, id_, ""

    def _close(self) -> Iterator[bytes]:
        place, text = self._of_item(), self._text
        if self._open == "reasoning":
            yield self._event("response.reasoning_summary_text.done", **place, summary_index=0, text=text)
            yield from self._end(output_reasoning(self._item_id, text))
        elif self._open == "message":
            yield self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
            part = OutputText(text=text)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
            yield from self._end(output_message(self._item_id, text))

    def _end(self, item: OutputItem) -> Iterator[bytes]:
        yield self._event("response.output_item.done", **self._place(), item=item)
        self._output.append(item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output)}

    def _of_item(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": len(self._output)}

    def _response(self, **fields: Any) -> Response:
        return Response(
            id=self._id,
            created_at=self._created,
            model=self._model,
            output=list(self._output),
            **self._echo,
            **fields,
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = StreamEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return server_sent_event(event, kind)

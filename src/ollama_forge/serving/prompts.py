"""Turns messages or text into a prompt: renders, encodes and cuts it to the context."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.serving.engine.base import EngineError, ImageEncoder
from ollama_forge.serving.requests import BadRequest, Message, Prompt, Tools
from ollama_forge.serving.tools.base import ToolFamily
from ollama_forge.serving.tools.families import family_of
from ollama_forge.text.template import Template, render_template
from ollama_forge.text.template_process import TemplateError
from ollama_forge.text.thinking import ThinkingSplit

KEEP_FIRST = 4  # tokens at the prompt's beginning that a cut keeps, as Ollama's num_keep


@dataclass(frozen=True)
class Encoded:
    """A rendered prompt, its token ids, and the engine's encoding of its images."""

    text: str
    ids: tuple[int, ...]
    media: object | None = None


class PromptBuilder:
    """Makes prompts for one model.

    Attributes:
        template: the chat template.
        family: its tool call format.
        context_length: the model's context in tokens, which bounds ``num_ctx``.
        encoder: encodes images; None if the model takes none.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        context_length: int,
        *,
        encoder: ImageEncoder | None = None,
        system: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``system`` is the system prompt of conversations that have none; ``template_kwargs`` are the template's."""
        self._tokenizer, self.encoder = tokenizer, encoder
        self._system, self._template_kwargs = system, dict(template_kwargs or {})
        self.template, self.family = Template(template), family_of(template)
        self.context_length = context_length

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        think: bool | str | None = None,
        num_ctx: int | None = None,
        truncate: bool = True,
        context: Sequence[int] = (),
    ) -> Prompt:
        """Render a conversation with the chat template; a last message of the assistant is continued by the answer.

        A conversation longer than ``num_ctx`` tokens (by default and at most the model's context) loses its oldest
        messages, but no system message and not the last message; if it is still too long, the prompt loses its middle.
        Rendering and encoding take milliseconds to seconds: call this outside the event loop.

        Args:
            think: whether to think, or a level if the template has levels; None: a model that can think does.
            context: ids to put before the prompt.

        Raises:
            BadRequest: the template refuses the messages, or they do not fit and ``truncate`` is off.
        """
        limit = self._limit(num_ctx)
        arguments = self._arguments(think)
        messages = self._with_system(messages)

        def encode(chosen: Sequence[Message]) -> Encoded:
            return self._encode(self._render(chosen, tools, arguments), chosen)

        encoded = encode(messages)
        if len(context) + len(encoded.ids) > limit:
            if not truncate:
                raise _too_long(len(context) + len(encoded.ids), limit)
            encoded = self._fewer(messages, encode, limit - len(context), encoded)
        ids = self._cut((*context, *encoded.ids), limit, encoded.media)
        split, continued = self._split(encoded.text, think), _continued(messages)
        if continued and split and not (split.opened or split.channels):
            split = None  # it continues an answer, so its thought is over
        return Prompt(ids, limit, encoded.media, split, continued, _schemas(tools))

    def whole(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), think: bool | str | None = None
    ) -> Encoded:
        """A conversation rendered as ``chat`` does it, and encoded, whatever its length.

        Raises:
            BadRequest: the template refuses the messages, or the model does not take images.
        """
        messages = self._with_system(messages)
        return self._encode(self._render(messages, tools, self._arguments(think)), messages)

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not self._system or any(message.role == "system" for message in messages):
            return messages
        return [Message("system", self._system), *messages]

    def text(
        self,
        text: str,
        *,
        images: Sequence[bytes] = (),
        think: bool | str | None = None,
        num_ctx: int | None = None,
        truncate: bool = True,
        context: Sequence[int] = (),
    ) -> Prompt:
        """Encode text without the chat template; a prompt that is too long loses its middle.

        Raises:
            BadRequest: the text does not fit and ``truncate`` is off, or the model does not take images.
        """
        limit = self._limit(num_ctx)
        if images:
            encoded = self._with_images(text, images)
        else:
            bos = getattr(self._tokenizer, "bos_token", None)
            special = not context and not (bos and text.startswith(bos))
            encoded = Encoded(text, tuple(self._tokenizer(text, add_special_tokens=special).input_ids))
        ids = (*context, *encoded.ids)
        if len(ids) > limit and not truncate:
            raise _too_long(len(ids), limit)
        split = self._split(text, think)
        if think is None and split and not (split.opened or split.channels):
            split = None  # text as it is asks for no thought
        return Prompt(self._cut(ids, limit, encoded.media), limit, encoded.media, split, continues=True)

    def _limit(self, num_ctx: int | None) -> int:
        return self.context_length if num_ctx is None or num_ctx <= 0 else min(num_ctx, self.context_length)

    def _arguments(self, think: bool | str | None) -> dict[str, Any]:
        """The template's arguments; the request's ``think`` wins over the arguments that the model was loaded with."""
        if think is None:
            return {**self.template.thinking_arguments(True), **self._template_kwargs}
        return {**self._template_kwargs, **self.template.thinking_arguments(think)}

    def _split(self, text: str, think: bool | str | None) -> ThinkingSplit | None:
        split = self.template.thinking
        if split is None or (think is False and not split.channels):
            return None
        return split.after(text)

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], arguments: Any) -> str:
        if not self.template.text:
            return "\n\n".join(message.content for message in messages)
        options = {"tools": tools, "continued": _continued(messages), "arguments": arguments}
        template = self.template.text
        try:
            try:
                return render_template(self._tokenizer, template, as_dicts(messages, self.family), **options)
            except TemplateError as error:
                if not any(message.tool_calls for message in messages) or error.raised != "TypeError":
                    raise
            spelled = as_dicts(messages, self.family, spell_arguments=True)  # this template joins the arguments to text
            return render_template(self._tokenizer, template, spelled, **options)
        except TemplateError as error:
            raise BadRequest(error.message) from error

    def _encode(self, text: str, messages: Sequence[Message]) -> Encoded:
        images = [image for message in messages for image in message.images]
        if images:
            return self._with_images(text, images)
        special = not self.template.text
        return Encoded(text, tuple(self._tokenizer(text, add_special_tokens=special).input_ids))

    def _with_images(self, text: str, images: Sequence[bytes]) -> Encoded:
        if self.encoder is None:
            raise BadRequest("this model does not support images")
        try:
            ids, media = self.encoder.encode(text, images)
        except EngineError as error:
            raise BadRequest(str(error)) from error
        return Encoded(text, tuple(ids), media)

    def _fewer(
        self, messages: Sequence[Message], encode: Callable[[Sequence[Message]], Encoded], limit: int, whole: Encoded
    ) -> Encoded:
        """The prompt of the newest messages that fit; all system messages and the last message stay in any case."""
        others = [index for index, message in enumerate(messages[:-1]) if message.role != "system"]

        def without(count: int) -> Encoded | None:
            """The prompt without the ``count`` oldest messages; None if the template refuses the others."""
            dropped = set(others[:count])
            try:
                return encode([message for index, message in enumerate(messages) if index not in dropped])
            except BadRequest:
                return None

        low, high, best = 1, len(others), None
        while low <= high:
            middle = (low + high) // 2
            count, found = middle, without(middle)
            while found is None and count < high:  # if roles must alternate, leave out a whole turn
                count += 1
                found = without(count)
            if found is not None and len(found.ids) <= limit:
                best, high = found, middle - 1
            else:
                low = (count if found is not None else middle) + 1
        return best or without(len(others)) or whole

    def _cut(self, ids: tuple[int, ...], limit: int, media: object | None) -> tuple[int, ...]:
        """Cut ids that are too long to their first few and their last, leaving half of the context to the answer."""
        if len(ids) <= limit:
            return ids
        if media is not None:  # a cut would part images from their places
            raise _too_long(len(ids), limit)
        first = min(KEEP_FIRST, limit // 2)
        last = max((limit - first) // 2, 1)
        return (*ids[:first], *ids[len(ids) - last :])


def _continued(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    return bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls


def _schemas(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """The name of each tool, and the JSON schema of its arguments."""
    functions = [tool.get("function") or tool for tool in tools]
    schemas = [(function.get("name"), function.get("parameters")) for function in functions]
    return {str(name or ""): schema if isinstance(schema, Mapping) else {} for name, schema in schemas}


def _too_long(count: int, limit: int) -> BadRequest:
    return BadRequest(
        f"request ({count} tokens) exceeds the available context size ({limit} tokens), try increasing it"
    )


def as_dicts(messages: Sequence[Message], family: ToolFamily, *, spell_arguments: bool = False) -> list[dict[str, Any]]:
    """Messages as Hugging Face templates take them.

    Args:
        family: the tool call format of the template.
        spell_arguments: give the arguments of calls as JSON text instead of objects.
    """
    named = _with_call_ids(messages)
    id_in = _ids_in(family, named)
    turns: list[dict[str, Any]] = []
    for message in named:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.images:
            parts: list[dict[str, Any]] = [{"type": "image"} for _ in message.images]
            turn["content"] = [*parts, {"type": "text", "text": message.content}]
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": id_in(call.id, call.name),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False)
                        if spell_arguments
                        else dict(call.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn |= {"name": message.tool_name, "tool_name": message.tool_name}
            turn["tool_call_id"] = id_in(message.tool_call_id, message.tool_name)
        turns.append(turn)
    return turns


def _ids_in(family: ToolFamily, messages: Sequence[Message]) -> Callable[[str, str], str]:
    """Makes the id that a template wants from the id of a call and the tool's name."""
    make = family.call_id
    if make is None:
        return lambda id_, name: id_
    calls = [call for message in messages for call in message.tool_calls]
    numbers = {call.id: number for number, call in enumerate(calls)}
    return lambda id_, name: make(id_, name, numbers.get(id_))


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Give each call an id, and each tool's result the id and the tool of the call that it answers."""
    out: list[Message] = []
    open_calls: list[tuple[str, str]] = []
    count = 0
    for message in messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                calls.append(call if call.id else replace(call, id=f"call_{count:08d}"))
                count += 1
            message = replace(message, tool_calls=tuple(calls))
            open_calls = [(call.id, call.name) for call in calls]
        elif message.role == "tool":
            match = next(
                (
                    pair
                    for pair in open_calls
                    if (pair[0] == message.tool_call_id if message.tool_call_id else message.tool_name in ("", pair[1]))
                ),
                None,
            )
            if match:
                open_calls.remove(match)
                message = replace(
                    message,
                    tool_call_id=message.tool_call_id or match[0],
                    tool_name=message.tool_name or match[1],
                )
        out.append(message)
    return out

"""The route ``POST /api/generate``."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.fields import Fields, read_fields
from ollama_forge.serving.http.names import require
from ollama_forge.serving.http.native.asked import Asked, gate
from ollama_forge.serving.http.native.exchange import answered, json, loaded
from ollama_forge.serving.http.native.lines import Line, generated
from ollama_forge.serving.http.native.options import Options, options_of
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest, Completion, Done, Event, GenerationRequest, Message, Prompt


@dataclass(frozen=True)
class Wanted:
    """The fields that only ``/api/generate`` has; ``context`` has the token ids of the conversation so far."""

    prompt: str
    suffix: str
    system: str
    template: str
    raw: bool
    context: tuple[int, ...]
    images: tuple[bytes, ...]

    @classmethod
    def of(cls, body: Fields) -> Wanted:
        """Read the fields.

        Raises:
            BadRequest: a field has the wrong type.
        """
        return cls(
            prompt=body.text("prompt"),
            suffix=body.text("suffix"),
            system=body.text("system"),
            template=body.text("template"),
            raw=body.flag("raw"),
            context=body.integers("context"),
            images=body.files("images"),
        )


async def generate(serving: Serving, request: Request) -> Response:
    """Completion a prompt; without a prompt, load or unload the model."""
    body = await read_fields(request, "GenerateRequest")
    asked, wanted = Asked.of(body), Wanted.of(body)
    model = serving.model
    require(model, asked.model, f"model '{asked.model}' not found")
    asked.check_logprobs()
    if not wanted.prompt and asked.keep_alive == 0:
        return json(generated(asked.model, done=loaded(serving, asked)))
    if wanted.raw and (wanted.template or wanted.system or wanted.context):
        raise BadRequest("raw mode does not support template, system, or context")
    gate(model, asked, suffix=bool(wanted.suffix), images=bool(wanted.images))
    options = options_of(asked.options)
    if not wanted.prompt:
        return json(generated(asked.model, done=loaded(serving, asked)))
    if wanted.template:
        raise BadRequest("template: this model has its own Jinja chat template; set raw to send a rendered prompt")

    def make() -> GenerationRequest:
        return asked.ask(_prompt(model, asked, wanted, options), options)

    def write(event: Event) -> Line:
        if isinstance(event, Done):
            return generated(asked.model, done=event, context=not wanted.raw)
        return generated(asked.model, event.content, event.thinking, logprobs=event.logprobs)

    def whole(answer: Completion) -> Line:
        name, text, thought = asked.model, answer.content, answer.thinking
        return generated(name, text, thought, logprobs=answer.logprobs, done=answer.done, context=not wanted.raw)

    silent = asked.think is not False and "thinking" in model.capabilities  # as Ollama does here, but not in chat
    return await answered(serving, request, asked, make, write=write, body=whole, silent=silent)


def _prompt(model: ServedModel, asked: Asked, wanted: Wanted, options: Options) -> Prompt:
    if wanted.raw:
        return model.text_prompt(
            wanted.prompt,
            images=wanted.images,
            think=asked.think,
            num_ctx=options.num_ctx,
            truncate=asked.truncate,
        )
    if not all(0 <= id_ < len(model.tokenizer) for id_ in wanted.context):
        raise BadRequest("context contains token ids that are not in the model's vocabulary")
    system = [Message("system", wanted.system)] if wanted.system else []
    return model.chat_prompt(
        [*system, Message("user", wanted.prompt, images=wanted.images)],
        think=asked.think,
        num_ctx=options.num_ctx,
        truncate=asked.truncate,
        context=wanted.context,
    )

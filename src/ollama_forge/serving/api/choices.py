"""The answers to one request: one or several, each with one call of a tool at most if it says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from ollama_forge.serving.engine.json_schema import translate, violation
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import ChatRequest, Delta, Done, Event, GenerationRequest

_LOG = logging.getLogger(__name__)


def answers_of(
    model: ServedModel, request: ChatRequest, generation: GenerationRequest, ended: Callable[[], None]
) -> AsyncGenerator[Event]:
    """Generate ``request.choices`` answers; their events come in any order, each with the number of its answer.

    Args:
        ended: called when the engine has finished all of them, whether or not they are read.
    """
    left = request.choices

    def one_ended() -> None:
        nonlocal left
        left -= 1
        if not left:
            ended()

    answers = [_answer(model, request, _seeded(generation, choice), one_ended) for choice in range(request.choices)]
    return answers[0] if len(answers) == 1 else _merged(answers)


def _seeded(generation: GenerationRequest, choice: int) -> GenerationRequest:
    """The request for answer number ``choice``: a request with a seed gives each answer another one."""
    seed = generation.sampling.seed
    if seed is None or choice == 0:
        return generation
    return replace(generation, sampling=replace(generation.sampling, seed=seed + choice))


def _answer(
    model: ServedModel, request: ChatRequest, generation: GenerationRequest, ended: Callable[[], None]
) -> AsyncGenerator[Event]:
    events = model.generate(generation, ended)
    if generation.schema is not None and generation.calls is None and translate(generation.schema).loosened:
        events = _checked(events, generation.schema)
    return _with_one_call(events) if request.one_call else events


async def _with_one_call(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Pass the events on without the calls of tools behind the first."""
    called = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta) and event.tool_calls:
                event = replace(event, tool_calls=() if called else event.tool_calls[:1])
                called = True
            yield event


async def _checked(events: AsyncGenerator[Event], schema: str) -> AsyncGenerator[Event]:
    """Pass the events on; if the complete answer does not satisfy a schema that was loosened, the log tells."""
    pieces: list[str] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                pieces.append(event.content)
            elif event.reason == "stop":
                problem = await asyncio.to_thread(violation, schema, "".join(pieces))
                if problem is not None:
                    _LOG.warning("an answer does not satisfy its JSON schema: %s", problem)
            yield event


async def _merged(answers: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Event]:
    """The events of several answers as they come; the first that fails ends all."""
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue(1)

    async def send(choice: int, events: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await queue.put(replace(event, choice=choice))
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(send(choice, events)) for choice, events in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

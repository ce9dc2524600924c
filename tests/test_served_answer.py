"""Answers of a served model with a scripted engine: text, thinking, tool calls, ends, logprobs, concurrency."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from ollama_forge.serving.admission import Admission
from ollama_forge.serving.engine.base import EngineError, EngineRequest
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.pump import pumped
from ollama_forge.serving.requests import BadRequest, Busy, Delta, Done, GenerationRequest, Message, Prompt
from tests import tiny
from tests.scripted import FACTS, collect, serve, texts
from tests.test_tool_calls import FORMS, HARMONY_CALL, HARMONY_SUM

THINKS = "{% for m in messages %}{{ m.content }}</think>{% endfor %}<think>"


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def hi(model: ServedModel, **options: Any) -> Prompt:
    return model.prompts.chat([Message("user", "hi")], **options)


def engine_of(model: ServedModel) -> ScriptedEngine:
    assert isinstance(model.engine, ScriptedEngine)
    return model.engine


def test_an_answer_streams_and_ends() -> None:
    model = serve("Hé 👋 you")
    prompt = hi(model)
    deltas, done = collect(model, GenerationRequest(prompt))
    assert texts(deltas) == ("", "Hé 👋 you")
    assert len(deltas) == len("Hé 👋 you")  # a delta a character, none for half of one
    assert (done.reason, done.prompt_tokens, done.tokens) == ("stop", len(prompt.ids), len("Hé 👋 you".encode()) + 1)
    assert done.context == (*prompt.ids, *model.tokenizer("Hé 👋 you").input_ids)
    assert min(done.total_ns, done.load_ns, done.prompt_ns, done.answer_ns) > 0
    assert done.total_ns >= done.prompt_ns + done.answer_ns


@pytest.mark.parametrize(("num_predict", "said", "reason"), [(-1, "abcdef", "stop"), (-2, "abcdef", "stop")])
def test_without_a_bound_the_model_ends_itself(num_predict: int, said: str, reason: str) -> None:
    model = serve("abcdef")
    deltas, done = collect(model, GenerationRequest(hi(model), num_predict=num_predict))
    assert (texts(deltas)[1], done.reason) == (said, reason)


def test_num_predict_and_the_context_bound_an_answer() -> None:
    model = serve("abcdef")
    assert collect(model, GenerationRequest(hi(model), num_predict=0))[1].tokens == 0
    for request in (
        GenerationRequest(hi(model), num_predict=3),
        GenerationRequest(hi(model, num_ctx=len(hi(model).ids) + 3)),
    ):
        deltas, done = collect(model, request)
        assert (texts(deltas)[1], done.reason, done.tokens) == ("abc", "length", 3)
    assert collect(model, GenerationRequest(hi(model), num_predict=7))[1].reason == "stop"
    assert collect(model, GenerationRequest(hi(model), num_predict=6))[1].reason == "length"


def test_stop_strings_cut_and_say_so() -> None:
    model = serve("one two three")
    prompt = hi(model)
    deltas, done = collect(model, GenerationRequest(prompt, stop=("zzz", " th")))
    assert texts(deltas) == ("", "one two")
    assert (done.reason, done.stopped_by) == ("stop", " th")
    assert done.context == (*prompt.ids, *model.tokenizer("one two").input_ids)
    assert engine_of(model).active == 0
    deltas, done = collect(model, GenerationRequest(prompt, stop=("three and more",)))
    assert texts(deltas) == ("", "one two three")
    assert done.stopped_by is None


@pytest.mark.parametrize(
    ("said", "options", "expected", "reason"),
    [
        ("It is about France.</think>Paris.", {}, ("It is about France.", "Paris."), "stop"),
        ("It is about France.</think>Paris.", {"num_predict": 11}, ("It is about", ""), "length"),
        ("It is about France.</think>Paris.", {"stop": ("about",)}, ("It is ", ""), "stop"),
        ("Paris</th>", {}, ("Paris</th>", ""), "stop"),
    ],
)
def test_thoughts_as_recorded(said: str, options: dict[str, Any], expected: tuple[str, str], reason: str) -> None:
    model = serve(said, template=THINKS)
    deltas, done = collect(model, GenerationRequest(hi(model), **options))
    assert (texts(deltas), done.reason) == (expected, reason)


def test_no_thought_is_split_off_where_thinking_is_off() -> None:
    model = serve("<think>It is.</think>Paris.", template=THINKS)
    assert texts(collect(model, GenerationRequest(hi(model, think=False)))[0]) == ("", "<think>It is.</think>Paris.")
    raw = serve("It is.</think>Paris.", template=THINKS)
    assert texts(collect(raw, GenerationRequest(raw.prompts.text("<think>")))[0]) == ("It is.", "Paris.")


def test_a_token_that_the_reader_holds_brings_an_empty_delta() -> None:
    model = serve("a</think>b", template=THINKS)
    deltas, _ = collect(model, GenerationRequest(hi(model)))
    assert deltas == [Delta(thinking="a"), *[Delta()] * len("</think>"), Delta(content="b")]


@pytest.mark.parametrize("form", FORMS)
def test_every_family_a_character_at_a_time(form: str) -> None:
    template, one, two, broken = FORMS[form]
    source = template + "{{ tools }}" if "{" not in template else template
    model = serve(one, two, broken, f"Look: {one}", template=source)
    prompt = hi(model, tools=[tool("get_weather"), tool("add")])

    def said() -> tuple[str, list[Any]]:
        deltas, done = collect(model, GenerationRequest(prompt))
        assert done.reason == "stop"
        calls = [call for delta in deltas for call in delta.tool_calls]
        assert [call.index for call in calls] == list(range(len(calls)))
        return texts(deltas)[1], [(call.name, call.arguments) for call in calls]

    assert said() == ("", [("get_weather", {"city": "Paris"})])
    assert said() == ("", [("get_weather", {"city": "Paris"}), ("add", {"a": 1, "b": 2})])
    assert said() == (broken, [])
    assert said()[0].startswith("Look:")
    assert texts(collect(model, GenerationRequest(hi(model)))[0])[1] == one  # no tools sent, nothing read


def test_markers_that_are_special_tokens_reach_the_parser_and_nobody_else() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>", "<other>"]})
    _, one, _, _ = FORMS["hermes"]
    engine = ScriptedEngine([tokenizer(f"<other>{one}", add_special_tokens=False).input_ids])
    model = ServedModel("wire", tokenizer, engine, FACTS, template="<tool_call>{{ tools }}")
    assert len(engine.script[0]) < len(one)  # type: ignore[index]
    deltas, _ = collect(model, GenerationRequest(hi(model, tools=[tool("get_weather")])))
    assert texts(deltas) == ("", "")
    assert [call.name for delta in deltas for call in delta.tool_calls] == ["get_weather"]
    plain = one.replace("<tool_call>", "").replace("</tool_call>", "")
    assert texts(collect(model, GenerationRequest(hi(model)))[0]) == ("", plain)


def test_a_special_token_can_be_a_stop_string() -> None:
    model = serve("one<|user|>two")
    assert texts(collect(model, GenerationRequest(hi(model)))[0])[1] == "onetwo"
    deltas, done = collect(model, GenerationRequest(hi(model), stop=("<|user|>",)))
    assert (texts(deltas)[1], done.reason) == ("one", "stop")


def test_harmony_on_the_engine() -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|start|>assistant"
    model = serve(thought + HARMONY_CALL + HARMONY_SUM, thought, template="<|channel|>analysis{{ tools }}")
    deltas, _ = collect(model, GenerationRequest(hi(model, tools=[tool("get_weather"), tool("add")])))
    assert texts(deltas) == ("Hm.", "")
    assert [call.name for delta in deltas for call in delta.tool_calls] == ["get_weather", "add"]


def test_logprobs_stand_beside_their_text() -> None:
    model = serve("Hé a")
    deltas, _ = collect(model, GenerationRequest(hi(model), logprobs=2))
    assert [[entry.text for entry in delta.logprobs] for delta in deltas] == [["H"], ["\ufffd", "\ufffd"], [" "], ["a"]]
    assert [entry.bytes for entry in deltas[1].logprobs] == [(0xC3,), (0xA9,)]
    entry = deltas[0].logprobs[0]
    assert entry.top[0].text == "H"
    assert (len(entry.top), entry.top[0].logprob) == (2, entry.logprob)
    assert all(not delta.logprobs for delta in collect(model, GenerationRequest(hi(model)))[0])
    assert all(
        not entry.top for d in collect(model, GenerationRequest(hi(model), logprobs=0))[0] for entry in d.logprobs
    )


def test_logprobs_of_held_back_tokens_come_with_the_next_text() -> None:
    model = serve("a</think>b", template=THINKS)
    deltas, _ = collect(model, GenerationRequest(hi(model), logprobs=0))
    shown = [(d.thinking or d.content, "".join(entry.text for entry in d.logprobs)) for d in deltas if d != Delta()]
    assert shown == [("a", "a"), ("b", "</think>b")]


def test_a_schema_becomes_a_constraint_that_sets_in_after_the_thought() -> None:
    plain = serve("{}")
    collect(plain, GenerationRequest(hi(plain), schema='{"type":"object"}'))
    constraint = engine_of(plain).requests[0].constraint
    assert constraint is not None
    assert (constraint.schema, constraint.after) == ('{"type":"object"}', ())
    unopened = serve("Hm.</think>{}", template="{{ messages[0].content }}{% set x = '</think>' %}")
    deltas, done = collect(unopened, GenerationRequest(hi(unopened), schema='{"type":"object"}'))
    request = engine_of(unopened).requests[0]
    assert unopened.tokenizer.decode(request.ids) == "hi<think>"  # opened, so that it closes
    assert request.constraint is not None
    assert request.constraint.after == ("</think>",)
    assert texts(deltas) == ("Hm.", "{}")
    assert done.prompt_tokens == len(request.ids)


def test_an_engine_that_fails_is_heard() -> None:
    model = serve("abc", fail_after=2)
    with pytest.raises(EngineError, match="the engine failed"):
        collect(model, GenerationRequest(hi(model)))
    assert (engine_of(model).active, model.admission.running) == (0, 0)


def test_more_than_the_queue_holds_are_sent_away_and_the_rest_is_served_in_turn() -> None:
    model = serve("abc", slots=2, max_queue=3)
    order: list[int] = []

    async def one(number: int) -> str:
        try:
            async for event in model.generate(GenerationRequest(hi(model))):
                if isinstance(event, Done):
                    order.append(number)
        except Busy:
            return "busy"
        return "served"

    async def run() -> list[str]:
        return list(await asyncio.gather(*(one(number) for number in range(8))))

    assert asyncio.run(run()) == ["served"] * 5 + ["busy"] * 3
    assert order == sorted(order)
    assert (model.admission.running, model.admission.waiting) == (0, 0)


def test_hundreds_of_asks_and_leavers_leave_nothing_running() -> None:
    def script(request: EngineRequest) -> list[int]:
        return [*(5 + (request.ids[-1] + n) % 200 for n in range(40)), 1]

    model = serve("x", slots=7, max_queue=1000)
    engine = engine_of(model)
    engine.script = script
    drawn = random.Random(0)
    most = 0

    async def stays(number: int) -> None:
        nonlocal most
        events = [event async for event in model.generate(GenerationRequest(Prompt((2, number % 100), 4096)))]
        most = max(most, engine.active)
        assert isinstance(events[-1], Done)
        ids = [5 + (number % 100 + n) % 200 for n in range(40)]
        assert events[-1].context == (2, number % 100, *ids)

    async def leaves(number: int) -> None:
        async with aclosing(model.generate(GenerationRequest(Prompt((2, number), 4096)))) as events:
            count = drawn.randrange(20)
            async for _ in events:
                if count == 0:
                    return
                count -= 1

    async def is_cancelled(number: int) -> None:
        task = asyncio.create_task(stays(number))
        for _ in range(drawn.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def run() -> None:
        kinds = (stays, stays, leaves, is_cancelled)
        await asyncio.gather(*(kinds[number % 4](number) for number in range(400)))

    asyncio.run(run())
    assert most <= 7
    assert (engine.active, model.admission.running, model.admission.waiting) == (0, 0, 0)


def test_one_who_leaves_the_queue_gives_up_its_place() -> None:
    model = serve("abc" * 1000, slots=1, max_queue=1)

    async def one_waits() -> None:
        async with asyncio.timeout(30):
            while model.admission.waiting != 1:
                await asyncio.sleep(0)

    async def run() -> None:
        first = model.generate(GenerationRequest(hi(model)))
        await anext(first)
        waiting = asyncio.create_task(anext(model.generate(GenerationRequest(hi(model)))))
        await one_waits()
        with pytest.raises(Busy):
            await anext(model.generate(GenerationRequest(hi(model))))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        another = model.generate(GenerationRequest(hi(model)))
        later = asyncio.create_task(anext(another))
        await one_waits()
        await first.aclose()
        assert isinstance(await later, Delta)
        await another.aclose()
        assert model.admission.running == 0

    asyncio.run(run())


def test_an_answer_that_is_not_read_gives_its_slot_back_and_is_whole_later() -> None:
    model = serve("abc" * 50, slots=1)

    async def run() -> None:
        stalled = model.generate(GenerationRequest(hi(model)))
        first = await anext(stalled)
        others = [event async for event in model.generate(GenerationRequest(hi(model)))]
        assert isinstance(others[-1], Done)
        assert (engine_of(model).active, model.admission.running) == (0, 0)
        assert [first, *[event async for event in stalled]][:-1] == others[:-1]

    asyncio.run(run())


def test_requests_wait_for_memory_in_their_order() -> None:
    admission = Admission(slots=8, max_waiting=8, memory=100)
    order: list[str] = []

    async def hold(name: str, nbytes: int, leave: asyncio.Event) -> None:
        async with admission.slot(nbytes):
            order.append(name)
            assert admission.reserved <= 100 or admission.running == 1
            await leave.wait()

    async def run() -> None:
        leave = {name: asyncio.Event() for name in ("more", "most", "half", "rest", "last")}
        sizes = {"more": 60, "most": 500, "half": 50, "rest": 50, "last": 1}
        tasks = {name: asyncio.create_task(hold(name, size, leave[name])) for name, size in sizes.items()}
        await asyncio.sleep(0)
        assert (order, admission.waiting) == (["more"], 4)  # the small ones do not overtake the one that waits longest
        leave["more"].set()
        await tasks["more"]
        assert order == ["more", "most"]  # alone, although it is more than there is
        leave["most"].set()
        await tasks["most"]
        await asyncio.sleep(0)
        assert (order[2:], admission.waiting) == (["half", "rest"], 1)
        tasks["last"].cancel()
        await asyncio.gather(tasks["last"], return_exceptions=True)
        for name in ("half", "rest"):
            leave[name].set()
            await tasks[name]
        assert (admission.running, admission.reserved, admission.waiting) == (0, 0, 0)

    asyncio.run(run())


def test_one_who_leaves_the_queue_lets_smaller_requests_in() -> None:
    admission = Admission(slots=8, max_waiting=8, memory=100)

    async def run() -> None:
        async with admission.slot(60):
            large = asyncio.create_task(_hold(admission, 90))
            await asyncio.sleep(0)
            small = asyncio.create_task(_hold(admission, 30))
            await asyncio.sleep(0)
            assert admission.waiting == 2
            large.cancel()
            await asyncio.wait_for(small, 30)
        assert (admission.running, admission.reserved) == (0, 0)

    asyncio.run(run())


def test_one_who_is_cancelled_when_its_turn_comes_is_cancelled() -> None:
    admission = Admission(slots=1, max_waiting=8)

    async def run() -> None:
        async with admission.slot():
            waiting = [asyncio.create_task(_hold(admission, 0)) for _ in range(2)]
            await asyncio.sleep(0)
            waiting[0].cancel()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in found] == [asyncio.CancelledError, type(None)]
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


async def _hold(admission: Admission, nbytes: int) -> None:
    async with admission.slot(nbytes):
        pass


def test_a_request_reserves_its_prompt_and_its_answer() -> None:
    model = serve("abc" * 400)
    engine: Any = engine_of(model)
    engine.token_bytes, engine.cache_bytes = 10, 10_000
    model = ServedModel("wire", model.tokenizer, engine, FACTS)
    assert model.admission.memory == 10_000

    async def reserved(**fields: Any) -> int:
        events = model.generate(GenerationRequest(Prompt((5,) * 7, 4096), **fields))
        await anext(events)
        found = model.admission.reserved
        await events.aclose()
        return found

    assert asyncio.run(reserved(num_predict=200)) == 10 * (7 + 200)
    assert asyncio.run(reserved()) == 10 * (7 + 1024)
    assert model.admission.reserved == 0


def test_embeddings_take_no_answers_slot() -> None:
    model = serve("abc" * 1000, slots=1)

    async def run() -> None:
        answer = model.generate(GenerationRequest(hi(model)))
        await anext(answer)
        assert model.admission.running == 1
        vectors, _ = await asyncio.wait_for(model.embed(["hello"]), 30)
        assert len(vectors) == 1
        await answer.aclose()

    asyncio.run(run())


def test_embeddings_are_cut_to_the_context_and_to_dimensions() -> None:
    model = serve("x")

    async def run() -> None:
        vectors, tokens = await model.embed(["hello", "worlds"])
        assert ([len(v) for v in vectors], tokens) == ([16, 16], 11)
        (short,), _ = await model.embed(["hello"], dimensions=4)
        scale = sum(v * v for v in vectors[0][:4]) ** 0.5
        assert short == pytest.approx([v / scale for v in vectors[0][:4]])
        assert (await model.embed(["hello" * 9], num_ctx=5)) == ((await model.embed(["hello"]))[0], 5)
        with pytest.raises(BadRequest, match=r"^the input length exceeds the context length$"):
            await model.embed(["hello"], num_ctx=4, truncate=False)

    asyncio.run(run())


def test_a_source_that_is_cancelled_ends() -> None:
    async def source() -> AsyncGenerator[int]:
        yield 1
        raise asyncio.CancelledError

    async def read() -> list[int]:
        return [item async for item in pumped(source())]

    assert asyncio.run(asyncio.wait_for(read(), 30)) == [1]

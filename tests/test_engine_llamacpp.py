"""The llama.cpp engine on a tiny GGUF file: the ids of transformers, cancellation, schemas, embeddings, its port."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jsonschema
import psutil
import pytest
import torch

from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.serving.engine.base import Constraint, EngineError, EngineRequest, SamplingParams, Token
from ollama_forge.serving.engine.llama_completion import TokenReader, split_within_characters
from ollama_forge.serving.engine.two_phase import Phase, Vocabulary, in_phases
from ollama_forge.serving.model import ServedModel
from tests.byte_tokenizer import tokenizer as byte_tokenizer
from tests.engines import collect, greedy, prompt, running, together, wait
from tests.gguf_models import Model
from tests.loopback import FACTS, THINKING, TOOLS, loopback
from tests.processes import default_sigint
from tests.test_api_streams import post

if not llamacpp_is_installed():
    pytest.skip("the extra llamacpp is not installed", allow_module_level=True)

from ollama_forge.serving.engine.llamacpp import LlamaCppEngine, fitting_context
from ollama_forge.text.tokenizer import Tokenizer

END = frozenset({1})
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["é", "x"]}},
    "required": ["a", "b"],
}


@pytest.fixture(scope="module")
def model(gguf_models: Mapping[str, Model]) -> Model:
    return gguf_models["gemma2"]


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[LlamaCppEngine]:
    with default_sigint():  # before llama.cpp starts, which must leave it alone
        engine = started(model)
        yield engine
        engine.close()


def started(model: Model, slots: int = 3) -> LlamaCppEngine:
    tokenizer = Tokenizer.load(model.checkpoint.folder)
    return LlamaCppEngine(model.path, tokenizer, model.checkpoint.config, slots=slots, threads=1)


def test_greedy_ids_are_those_of_transformers(engine: LlamaCppEngine, model: Model) -> None:
    """Alone and together, of prompts of several lengths; most random bytes are no characters."""
    requests = [greedy(prompt(length, seed=length), 24) for length in (3, 40, 90)]
    with running(ChatModel.load(model.checkpoint, LoadSettings(dtype="float32", device="cpu"))) as other:
        expected = together(other, requests)
    assert together(engine, requests) == expected  # type: ignore[arg-type]
    assert together(engine, requests[1:2]) == expected[1:2]  # type: ignore[arg-type]


def test_a_seed_gives_the_same_ids(engine: LlamaCppEngine) -> None:
    asked = [EngineRequest(prompt(9), 20, SamplingParams(temperature=1.0, seed=seed)) for seed in (5, 5, 1 << 40)]
    first, again, other = (together(engine, [one])[0] for one in asked)  # type: ignore[arg-type]
    assert first == again != other


def test_filters_and_penalties_reach_llamacpp(engine: LlamaCppEngine) -> None:
    ids = prompt(12)
    best = together(engine, [greedy(ids, 12)])  # type: ignore[arg-type]
    for params in (
        SamplingParams(temperature=5.0, top_k=1),
        SamplingParams(temperature=5.0, top_k=0, top_p=1e-6),
        SamplingParams(temperature=5.0, top_k=0, top_p=1.0, min_p=1.0),
    ):
        assert together(engine, [EngineRequest(ids, 12, params)]) == best  # type: ignore[arg-type]
    often = SamplingParams(temperature=0.0, frequency_penalty=100.0, repeat_last_n=-1)
    penalised = together(engine, [EngineRequest(ids, 12, often)])[0]  # type: ignore[arg-type]
    assert len(set(penalised)) == 12


def test_log_probabilities_are_those_of_transformers(engine: LlamaCppEngine, model: Model) -> None:
    """Tokens within a character have none."""
    asked = greedy(prompt(30, seed=3), 24, top_logprobs=3)
    with running(ChatModel.load(model.checkpoint, LoadSettings(dtype="float32", device="cpu"))) as other:
        expected = wait(lambda: collect(other, asked))
    found = wait(lambda: collect(engine, asked))  # type: ignore[arg-type]
    compared = [(one, two) for one, two in zip(found, expected, strict=True) if one.logprob is not None]
    assert len(compared) > 3
    for one, two in compared:
        assert one.logprob == pytest.approx(two.logprob, abs=0.05)
        assert [rival.id for rival in one.top] == [rival.id for rival in two.top]
    bare = wait(lambda: collect(engine, greedy(prompt(30, seed=3), 24, top_logprobs=0)))  # type: ignore[arg-type]
    assert [one.id for one in bare] == [one.id for one in found]
    assert bare[0].logprob == pytest.approx(found[0].logprob, abs=0.01)
    assert not any(one.top for one in bare)


@pytest.mark.parametrize("seed", range(4))
def test_answers_obey_a_schema(engine: LlamaCppEngine, model: Model, seed: int) -> None:
    constraint = Constraint(json.dumps(SCHEMA))
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    asked = EngineRequest(prompt(20), 100, params, end_ids=END, constraint=constraint)
    text = decoded(model, together(engine, [asked])[0])  # type: ignore[arg-type]
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_schema_begins_behind_a_text(engine: LlamaCppEngine, model: Model) -> None:
    free = decoded(model, together(engine, [greedy(prompt(20), 60)])[0])  # type: ignore[arg-type]
    after = next(letter for letter in free if letter != "\ufffd")
    asked = greedy(prompt(20), 150, end_ids=END, constraint=Constraint(json.dumps(SCHEMA), (after,)))
    before, _, answer = decoded(model, together(engine, [asked])[0]).partition(after)  # type: ignore[arg-type]
    assert free.startswith(before + after)
    jsonschema.validate(json.loads(answer), SCHEMA)


def test_an_engine_that_fails_again_and_again_is_not_healthy(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def handle_completions(self, *_: object) -> None:
            raise RuntimeError("no backend")

    asked = greedy(prompt(9), 5)
    expected = together(engine, [asked])  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_server", Broken())
        for _ in range(3):
            assert engine.healthy
            with pytest.raises(EngineError, match=r"llama\.cpp failed: no backend"):
                together(engine, [asked])  # type: ignore[arg-type]
        assert not engine.healthy
    assert together(engine, [asked]) == expected  # type: ignore[arg-type]
    assert engine.healthy


def test_a_malformed_schema_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(EngineError, match="invalid format"):
        together(engine, [greedy(prompt(4), 5, constraint=Constraint("["))])  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_that_is_cut_within_a_character_is_as_long_as_it_may_be(
    engine: LlamaCppEngine, model: Model, temperature: float
) -> None:
    constraint = Constraint(json.dumps({"const": "ééé"}))
    for count in range(2, 9):
        asked = EngineRequest(
            prompt(20), count, SamplingParams(temperature, seed=1), end_ids=END, constraint=constraint
        )
        (ids,) = together(engine, [asked])  # type: ignore[arg-type]
        assert len(ids) == min(count, 8)
        assert decoded(model, ids).rstrip("\ufffd") == '"ééé"'.encode()[:count].decode("utf-8", "ignore")


CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL_LIST = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
FORMS = {
    "plain": TOOLS,
    "hermes": "{# <tool_call> #}" + TOOLS,
    "mistral": "{# [TOOL_CALLS][ARGS] #}" + TOOLS,
    "channels": "{# <|channel|>analysis #}{% if tools %}{{ tools | length }}{% endif %}" + THINKING,
}


@contextmanager
def kept(engine: LlamaCppEngine) -> Iterator[LlamaCppEngine]:
    """The engine without its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "close", lambda: None)
        yield engine


@pytest.mark.parametrize("form", FORMS)
def test_forced_calls_are_calls(engine: LlamaCppEngine, model: Model, form: str) -> None:
    body = {"model": "wire", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, "seed": 3}
    named = {"type": "function", "function": {"name": "get_weather"}}
    tokenizer = Tokenizer.load(model.checkpoint.folder).backend
    with kept(engine), loopback(ServedModel("wire", tokenizer, engine, FACTS, template=FORMS[form])) as url:
        for choice in ("required", named):
            status, text = post(url, "/v1/chat/completions", {**body, "tools": TOOL_LIST, "tool_choice": choice})
            if form == "channels" and choice == "required":
                assert (status, "name one tool in tool_choice" in text) == (500, True)
                continue
            message = json.loads(text)["choices"][0]["message"]
            (call,) = message["tool_calls"]
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert not message.get("content")
            assert (name, arguments) in [("get_time", {})] * (choice == "required") + [
                ("get_weather", {"city": city}) for city in ("Paris", "Rome")
            ]


class CountedServer:
    """Counts the chunks of llama.cpp, and the streams that are running."""

    def __init__(self, server: Any) -> None:
        self.server, self.chunks, self.streams = server, 0, 0

    def handle_completions(self, body: Any, take: Any) -> None:
        def counted(chunk: Any) -> Any:
            self.chunks += 1
            return take(chunk)

        self.streams += 1
        self.server.handle_completions(body, counted)
        self.streams -= 1


def test_closing_the_stream_cancels_within_a_token(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedServer(engine._server)
    monkeypatch.setattr(engine, "_server", counted)

    async def leave() -> None:
        stream = engine.generate(greedy(prompt(8), 200))
        await anext(stream)
        chunks = counted.chunks
        await stream.aclose()  # type: ignore[attr-defined]
        while counted.streams:
            await asyncio.sleep(0.01)
        assert counted.chunks <= chunks + 2

    wait(leave)


def test_the_context_can_be_filled(engine: LlamaCppEngine) -> None:
    ids = prompt(engine.context_length - 3)
    assert len(together(engine, [greedy(ids, 50)])[0]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "says"),
    [((), "empty"), ((5,) * 300, "more than the 256"), ((5, 1 << 20), "does not know")],
)
def test_prompts_that_are_refused(engine: LlamaCppEngine, ids: tuple[int, ...], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        together(engine, [greedy(ids, 5)])  # type: ignore[arg-type]


def test_an_end_token_ends_the_output(engine: LlamaCppEngine) -> None:
    ids = together(engine, [greedy(prompt(20), 20)])[0]  # type: ignore[arg-type]
    end = next(token for place, token in enumerate(ids) if place > 2 and token not in ids[:place])
    ended = together(engine, [greedy(prompt(20), 20, end_ids=frozenset({end}))])[0]  # type: ignore[arg-type]
    assert ended == ids[: ids.index(end)]


def test_embeddings_are_those_of_transformers(engine: LlamaCppEngine, model: Model) -> None:
    inputs = [prompt(5), prompt(60, seed=2)]
    with running(ChatModel.load(model.checkpoint, LoadSettings(dtype="float32", device="cpu"))) as other:
        expected = torch.tensor(wait(lambda: other.embed(inputs)))
    found = torch.tensor(wait(lambda: engine.embed(inputs)))
    assert torch.allclose(found, expected, atol=2e-3)


def test_closing_ends_requests_and_nothing_listens(model: Model) -> None:
    listening = listeners()
    engine = started(model, slots=1)
    assert listeners() == listening

    async def run() -> None:
        stream = engine.generate(greedy(prompt(8), 200))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="unloaded"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="unloaded"):
            await anext(engine.generate(greedy(prompt(8), 5)))

    wait(run)


def test_closing_ends_requests_that_wait_for_a_thread(model: Model) -> None:
    engine = started(model, slots=1)
    free = threading.Event()
    for _ in range(2 * engine.slots + 1):
        engine._pool.submit(free.wait, 30)

    async def run() -> None:
        stream = engine.generate(greedy(prompt(8), 5))
        asked = [asyncio.create_task(anext(stream)), asyncio.create_task(engine.embed([prompt(8)]))]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while engine.healthy:
            await asyncio.sleep(0.01)
        free.set()
        await closing
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
        assert [str(error) for error in found if isinstance(error, EngineError)] == ["the model was unloaded"] * 2

    wait(run)


def listeners() -> set[Any]:
    found = psutil.Process().net_connections(kind="inet")
    return {one.laddr for one in found if one.status == psutil.CONN_LISTEN}


def test_ctrl_c_stays_pythons(engine: LlamaCppEngine) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert len(together(engine, [greedy(prompt(4), 3)])[0]) == 3  # type: ignore[arg-type]


# -- without llama.cpp ------------------------------------------------------------------------------------------------


def decoded(model: Model, ids: list[int]) -> str:
    return Tokenizer.load(model.checkpoint.folder).decode(ids)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer(byte_tokenizer()))


def bytes_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return [vocabulary.ids[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("text", ["🙂", "é", "漢"])
def test_ids_within_a_character_are_found(vocabulary: Vocabulary, text: str) -> None:
    reader = TokenReader(Phase(EngineRequest((5,), 20)), vocabulary)
    ids = bytes_ids(vocabulary, text)
    begun = reader.read({"tokens": [70], "tokens_predicted": 1, "content": "A"})
    chunk = {"tokens": ids[-1:], "tokens_predicted": 1 + len(ids), "content": text}
    assert reader.replay_body(chunk) is None
    found = reader.read(chunk)
    assert [token.id for token in [*begun, *found]] == reader.ids == [70, *ids]


def test_broken_characters_are_replayed_where_that_gives_the_same_tokens(vocabulary: Vocabulary) -> None:
    last = vocabulary.ids[b"x"]
    chunk = {"tokens": [last], "tokens_predicted": 3, "content": "\ufffdx"}
    drawn, greedy = (
        TokenReader(Phase(EngineRequest((5,), 20, SamplingParams(temperature=temperature))), vocabulary)
        for temperature in (0.8, 0.0)
    )
    assert drawn.replay_body(chunk) is None
    filled = [token.id for token in drawn.read(chunk)]
    assert b"".join(map(vocabulary.tokens.of, filled)).decode() == "\ufffdx"
    body = greedy.replay_body(chunk)
    assert body is not None
    assert (body["prompt"], body["n_predict"], body["stream"]) == ([5], 3, False)
    assert [token.id for token in greedy.read(chunk, [8, 9, last])] == greedy.ids == [8, 9, last]
    end = {"stop_type": "limit", "tokens_predicted": 5}
    body = greedy.replay_body(end)
    assert body is not None
    assert (body["prompt"], body["n_predict"]) == ([5, 8, 9, last], 2)
    assert [token.id for token in greedy.read(end, [8, 9])] == [8, 9]
    assert greedy.replay_body(end) is None


def test_a_replay_that_does_not_fit_is_not_taken(vocabulary: Vocabulary) -> None:
    last = vocabulary.ids[b"x"]
    chunk = {"tokens": [last], "tokens_predicted": 2, "content": "\ufffdx"}
    for replayed in ([8], [8, 9], [8, 9, last]):
        reader = TokenReader(Phase(EngineRequest((5,), 20)), vocabulary)
        filled = [token.id for token in reader.read(chunk, replayed)]
        assert b"".join(map(vocabulary.tokens.of, filled)).decode() == "\ufffdx"


def test_longest_tokens_come_first() -> None:
    ids = {b"\xf0": 1, b"\x9f": 2, b"\xf0\x9f": 3, b"\x99": 4, b"a\xf0": 5, b"a": 6}
    assert split_within_characters(b"a\xf0\x9f\x99", 2, ids) is None
    assert split_within_characters(b"a\xf0\x9f\x99", 3, ids) == [5, 2, 4]
    assert split_within_characters(b"\xf0\x9f\x99", 2, ids) == [3, 4]
    assert split_within_characters(b"a\x9f", 2, {**ids, b"\x9f": 2}) is None  # "a" ends a character


def test_the_context_fits_the_memory() -> None:
    config = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 10, "max_position_embeddings": 1 << 17}
    of_token = 4 * 10 * 512
    assert fitting_context(config, 4, of_token * 4 * 4 * 10_000, None) == 9984  # a quarter, in steps of 256
    assert fitting_context(config, 4, 1 << 60, None) == 1 << 17
    assert fitting_context(config, 4, 1 << 60, 4096) == 4096
    assert fitting_context(config, 4, 0, None) == 2048


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (["<", "/t", "hink", ">\n", "{", "x"], ["<", "/t", "hink", ">\n"]),
        (["<", "/t", "hink", ">{", "x"], ["<", "/t", "hink", ">"]),
        (["</", "think", "> ", "{"], ["</", "think", "> "]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_where_the_second_phase_begins(tokens: list[str], kept: list[str]) -> None:
    texts = {text: place for place, text in enumerate(sorted({*tokens, *kept}))}

    class Texts:
        def of(self, id_: int) -> bytes:
            return next(text for text, place in texts.items() if place == id_).encode()

    class Words:
        tokens = Texts()

        def encode(self, text: str) -> list[int]:
            return [texts[text]]

    phases: list[Phase] = []

    async def run(phase: Phase) -> AsyncGenerator[Token, None]:
        phases.append(phase)
        for text in tokens if phase.must_go_on else []:
            yield Token(texts[text])

    async def read() -> list[int]:
        request = EngineRequest((9,), 10, constraint=Constraint("{}", ("</think>",)))
        return [token.id async for token in in_phases(run, request, Words())]  # type: ignore[arg-type]

    assert wait(read) == [texts[text] for text in kept]
    assert phases[-1].schema == "{}"
    assert phases[-1].request.ids == (9, *(texts[text] for text in kept))
    assert phases[-1].request.max_tokens == 10 - len(kept)

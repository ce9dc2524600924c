"""Batched answers equal answers alone; requests that join, leave, cancel or fail do not disturb others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PretrainedConfig

from ollama_forge.serving.engine.base import Embedder, Engine, EngineError, EngineRequest, ImageEncoder, SamplingParams
from ollama_forge.serving.engine.kv_cache import KVCache
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import tiny
from tests.engines import by_generate, collect, greedy, ids_of, load, prompt, running, together, wait

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "falcon", "falcon-rw")
LENGTHS = ((3, 30), (40, 12), (17, 25), (9, 7), (120, 18), (5, 40), (33, 21))  # of prompts and answers
WINDOW = 16


def windowed(family: str) -> torch.nn.Module:
    """A model whose sliding window, if it has one, is narrower than its prompts."""
    config: PretrainedConfig = tiny.FAMILIES[family]()
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
        if hasattr(text, "per_layer_config"):
            assert all(getattr(layer, "sliding_window", WINDOW) == WINDOW for layer in text.per_layer_config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tiny.build(family).state_dict())
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_staggered_answers_are_those_of_generate(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, windowed(family))
    requests = [greedy(prompt(length, seed), count) for seed, (length, count) in enumerate(LENGTHS)]
    alone = [by_generate(model, request.ids, request.max_tokens) for request in requests]
    assert len(set(map(tuple, alone))) == len(alone)
    with running(model, slots=4) as engine:

        async def late(place: int, request: EngineRequest) -> list[int]:
            await asyncio.sleep(0.01 * place)
            return await ids_of(engine, request)

        async def ask() -> list[list[int]]:
            return await asyncio.gather(*(late(place, request) for place, request in enumerate(requests)))

        assert wait(ask) == alone
        assert together(engine, requests) == alone  # now prompts are known, and prefilled in groups
        assert engine.stats.active == 0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TransformersEngine]:
    with running(load(tmp_path), slots=4) as engine:
        yield engine


def test_is_an_engine(engine: TransformersEngine) -> None:
    as_engine: Engine = engine
    assert (as_engine.slots, as_engine.context_length) == (4, 512)
    assert isinstance(engine, Embedder)
    assert not isinstance(engine, ImageEncoder)


def test_concurrent_answers_share_forward_passes(engine: TransformersEngine) -> None:
    before = engine.stats
    together(engine, [greedy(prompt(20, seed), 30) for seed in range(4)])
    stats = engine.stats
    assert stats.decoded_tokens - before.decoded_tokens == 120
    assert stats.forward_passes - before.forward_passes <= 30 + 8 + stats.prefills


def test_joins_a_running_answer(engine: TransformersEngine) -> None:
    """A longer prompt than all that is there comes in mid-way; both go on as alone, and step together."""
    first, second = greedy(prompt(10, 1), 60), greedy(prompt(90, 2), 20)
    alone = [by_generate(engine.model, request.ids, request.max_tokens) for request in (first, second)]

    async def ask() -> list[list[int]]:
        started = asyncio.Event()

        async def early() -> list[int]:
            out = []
            async for step in engine.generate(first):
                out.append(step.id)
                started.set()
            return out

        async def later() -> list[int]:
            await started.wait()
            return await ids_of(engine, second)

        return await asyncio.gather(early(), later())

    assert wait(ask) == alone
    assert engine.stats.forward_passes <= 60 + 8 + engine.stats.prefills


def test_more_requests_than_slots_all_get_answers(engine: TransformersEngine) -> None:
    requests = [greedy(prompt(5 + seed % 7, seed), 3 + seed % 5) for seed in range(20)]
    assert together(engine, requests) == [by_generate(engine.model, r.ids, r.max_tokens) for r in requests]


def test_cancelling_frees_the_slot_within_a_token(engine: TransformersEngine) -> None:
    beside = greedy(prompt(12, 5), 40)

    async def leave_early() -> None:
        answer = engine.generate(greedy(prompt(8), 500))
        count = 0
        async for _ in answer:
            count += 1
            if count == 5:
                break
        await answer.aclose()  # type: ignore[attr-defined]

    async def ask() -> list[int]:
        _, other = await asyncio.gather(leave_early(), ids_of(engine, beside))
        while engine.stats.active:
            await asyncio.sleep(0.01)
        return other

    assert wait(ask) == by_generate(engine.model, beside.ids, 40)
    assert engine.stats.decoded_tokens < 40 + 100  # of 540; the reader may be some tokens behind the decoder


def test_cancelled_while_waiting_or_prefilling_is_never_answered(engine: TransformersEngine) -> None:
    async def ask() -> None:
        tasks = [asyncio.create_task(collect(engine, greedy(prompt(30, seed), 400))) for seed in range(12)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while engine.stats.active:
            await asyncio.sleep(0.01)

    wait(ask)
    done = engine.stats.decoded_tokens
    assert len(together(engine, [greedy(prompt(4), 3)])[0]) == 3
    assert engine.stats.decoded_tokens == done + 3


def test_an_error_reaches_every_reader_and_the_engine_goes_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.model.forward
    calls = 0

    def failing(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("/a/path: secret")
        return forward(**inputs)

    monkeypatch.setattr(engine.model, "forward", failing)
    monkeypatch.setattr(engine._scheduler.runner, "recorded", None)  # a recording does not call the model

    async def ask() -> list[Any]:
        requests = [collect(engine, greedy(prompt(9, seed), 50)) for seed in range(3)]
        return await asyncio.gather(*requests, return_exceptions=True)

    errors = wait(ask)
    assert all(isinstance(error, EngineError) for error in errors)
    assert not any("secret" in str(error) for error in errors)
    request = greedy(prompt(9, 1), 10)
    assert together(engine, [request]) == [by_generate(engine.model, request.ids, 10)]


def test_an_error_while_joining_reaches_its_reader(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "copy_row", failing)
        with pytest.raises(EngineError, match="out of memory"):
            wait(lambda: collect(engine, greedy(prompt(9), 5)))
    assert len(together(engine, [greedy(prompt(9), 5)])[0]) == 5


def test_closing_ends_readers(tmp_path: Path) -> None:
    engine = TransformersEngine(load(tmp_path), slots=1)

    async def ask() -> list[Any]:
        asking = [asyncio.create_task(collect(engine, greedy(prompt(5, seed), 500))) for seed in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*asking, return_exceptions=True)

    assert all(isinstance(error, EngineError) for error in wait(ask))
    assert not engine._thread.is_alive()
    with pytest.raises(EngineError):
        wait(lambda: collect(engine, greedy(prompt(5), 2)))
    engine.close()


def test_ends_are_not_handed_out(engine: TransformersEngine) -> None:
    ids = prompt(11, 3)
    whole = by_generate(engine.model, ids, 30)
    end = whole[12]
    got = together(engine, [greedy(ids, 30, end_ids=frozenset({end}))])[0]
    assert got == whole[: whole.index(end)]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (greedy((), 3), "empty"),
        (greedy((5, 9999), 3), "know"),
        (greedy(prompt(600), 3), "600"),
        (greedy((-1,), 3), "know"),
    ],
)
def test_refuses_what_the_model_cannot_take(engine: TransformersEngine, request_: EngineRequest, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        wait(lambda: collect(engine, request_))


def test_no_tokens_asked_for_none_given(engine: TransformersEngine) -> None:
    assert together(engine, [greedy(prompt(5), 0)]) == [[]]
    assert engine.stats.forward_passes == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_ends_with_the_models_context(tmp_path: Path, family: str) -> None:
    """Also where positions are learned, and one too many would be an error for all."""
    model = load(tmp_path, family)
    with running(model) as engine:
        requests = [greedy(prompt(505), 100), greedy(prompt(512), 100), greedy(prompt(9), 30)]
        assert [len(answer) for answer in together(engine, requests)] == [8, 1, 30]


def test_prompts_run_in_chunks_with_the_same_answer(engine: TransformersEngine) -> None:
    request = greedy(prompt(300), 8)
    runner: Any = engine._scheduler.runner
    runner.chunk = 64
    assert together(engine, [request]) == [by_generate(engine.model, request.ids, 8)]
    assert engine.stats.forward_passes == 5 + 7


# -- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "falcon-rw"])
def test_the_next_turn_prefills_its_new_tokens_only(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, windowed(family))
    with running(model) as engine:
        turns = [prompt(50, 1), prompt(70, 2)]
        for turn in range(3):  # two conversations, one after the other, keep what they said
            for place, said in enumerate(turns):
                before = engine.stats.prefilled_tokens
                answer = together(engine, [greedy(said, 20)])[0]
                assert answer == by_generate(model, said, 20)
                assert engine.stats.prefilled_tokens - before == (len(said) if turn == 0 else 1 + 9)
                turns[place] = (*said, *answer, *prompt(9, 10 + place + turn))


def test_a_changed_turn_keeps_what_it_shares(engine: TransformersEngine) -> None:
    start = prompt(40)
    together(engine, [greedy((*start, *prompt(10, 1)), 10)])
    before = engine.stats.prefilled_tokens
    other = (*start, 7, 7, 7, 7)
    assert together(engine, [greedy(other, 10)]) == [by_generate(engine.model, other, 10)]
    assert engine.stats.prefilled_tokens - before == 4
    assert together(engine, [greedy(other, 10)]) == [by_generate(engine.model, other, 10)]
    assert engine.stats.prefilled_tokens - before == 5  # the same prompt again: its last token


def test_kept_prefixes_are_bounded(engine: TransformersEngine) -> None:
    runner: Any = engine._scheduler.runner
    together(engine, [greedy(prompt(20, seed), 2) for seed in range(30)])
    assert len(runner.prefixes) == 8
    assert not runner.groups
    runner.prefixes.nbytes = 1
    together(engine, [greedy(prompt(20, 99), 2)])
    assert len(runner.prefixes) == 0


# -- models without slots ---------------------------------------------------------------------------------------------


def test_a_state_space_model_answers_one_at_a_time(engine: TransformersEngine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = engine.model
    model.module, model.device = mamba, torch.device("cpu")
    with running(model, slots=4) as alone:
        assert alone.slots == 1
        requests = [greedy(prompt(12, seed), 15) for seed in range(3)]
        expected = [by_generate(model, request.ids, 15) for request in requests]
        assert together(alone, requests) == expected
        before = alone.stats.prefilled_tokens
        following = (*requests[-1].ids, *expected[-1], *prompt(4, 9))
        last = together(alone, [greedy(requests[-1].ids, 15)])
        assert last == expected[-1:]
        before = alone.stats.prefilled_tokens
        assert together(alone, [greedy(following, 6)]) == [by_generate(model, following, 6)]
        assert alone.stats.prefilled_tokens - before == 5


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_embeddings_are_mean_hidden_states(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, windowed(family))
    texts = [prompt(length, length) for length in (3, 30, 11, 7)] * 5
    with running(model) as engine:
        beside = greedy(prompt(9), 40)

        async def ask() -> tuple[list[list[float]], list[int]]:
            return await asyncio.gather(engine.embed(texts), ids_of(engine, beside))

        vectors, answer = wait(ask)
        assert answer == by_generate(model, beside.ids, 40)
    for ids, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            hidden = model.module.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(vector), hidden / hidden.norm(), atol=1e-5)


def test_a_bad_embedding_input_is_an_error(engine: TransformersEngine) -> None:
    for bad in ((), prompt(600)):
        with pytest.raises(EngineError):
            wait(lambda bad=bad: engine.embed([prompt(3), bad]))  # type: ignore[misc]


def test_seeds_give_the_same_answer_alone_and_beside_others(engine: TransformersEngine) -> None:
    def request(seed: int) -> EngineRequest:
        return EngineRequest(prompt(10, 1), 25, SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=seed))

    alone = together(engine, [request(7)])[0]
    beside = together(engine, [request(seed) for seed in (1, 7, 2, 7)])
    assert beside[1] == beside[3] == alone
    assert alone not in (beside[0], beside[2])
    assert together(engine, [request(-7)]) == together(engine, [request(-7)])

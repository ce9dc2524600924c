"""What fails while a request is prepared, prefilled or constrained ends that request alone; nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.serving.engine.base import Constraint, EngineError, EngineRequest
from ollama_forge.serving.engine.batched_runner import BatchedPrefill
from ollama_forge.serving.engine.constraint import GrammarCompiler, GrammarMatcher
from ollama_forge.serving.engine.row_group import RowGroup
from ollama_forge.serving.engine.sequence import Sequence
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import tiny
from tests.engines import by_generate, collect, greedy, ids_of, load, prompt, running, together, wait

FLAG = Constraint(json.dumps({"type": "boolean"}))
NEIGHBOUR = greedy(prompt(12, 1), 40)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TransformersEngine]:
    with running(load(tmp_path), slots=8) as engine:
        yield engine


def outcomes(engine: TransformersEngine, *requests: EngineRequest) -> list[Any]:
    """Each request's ids, or its error."""

    async def ask() -> list[Any]:
        return await asyncio.gather(*(ids_of(engine, request) for request in requests), return_exceptions=True)

    return wait(ask)


def answer(engine: TransformersEngine, request: EngineRequest) -> list[int]:
    return by_generate(engine.model, request.ids, request.max_tokens)


def break_forward(
    engine: TransformersEngine, patch: pytest.MonkeyPatch, fails: Any, error: type[Exception]
) -> list[int]:
    """Raise ``error`` in each forward pass whose input ids ``fails`` is true of; a list that counts them."""
    forward, failures = engine.model.forward, []

    def failing(**inputs: Any) -> Any:
        if fails(inputs["input_ids"]):
            failures.append(1)
            raise error("/a/path: secret")
        return forward(**inputs)

    patch.setattr(engine.model, "forward", failing)
    return failures


def assert_nothing_runs(engine: TransformersEngine) -> None:
    async def idle() -> None:
        while engine._scheduler.busy:
            await asyncio.sleep(0.01)

    wait(idle)
    runner: Any = engine._scheduler.runner
    assert (engine.stats.active, runner.groups, runner.rows, engine._unfinished) == (0, [], [], set())


def test_a_stop_token_beyond_the_vocabulary_ends_nobodys_answer(engine: TransformersEngine) -> None:
    kept = greedy((*prompt(30, 2), 9), 3)
    together(engine, [kept])
    flagged = greedy(prompt(5), 9, constraint=FLAG, end_ids=frozenset({1, tiny.VOCABULARY, tiny.VOCABULARY + 7}))
    found, beside = outcomes(engine, flagged, NEIGHBOUR)
    assert tiny.tokenizer().decode(found) in ("true", "false")
    assert beside == answer(engine, NEIGHBOUR)
    before = engine.stats.prefilled_tokens
    together(engine, [kept])
    assert engine.stats.prefilled_tokens - before == 1  # the prefix cache is still there


def test_a_failed_preparation_is_one_requests_own(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(GrammarCompiler, "start", failing)
    error, beside = outcomes(engine, greedy(prompt(5), 9, constraint=FLAG), NEIGHBOUR)
    assert isinstance(error, EngineError)
    assert "secret" not in str(error)
    assert "KeyError" in caplog.text
    assert "in _constrained" in caplog.text
    assert "KeyError: 'secret'" not in caplog.text  # a grammar's error may quote the request
    assert beside == answer(engine, NEIGHBOUR)
    assert_nothing_runs(engine)


def test_a_failed_grammar_is_one_requests_own(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("allowed", "add"):
        with monkeypatch.context() as patch:

            def failing(*_: Any) -> None:
                raise IndexError("secret")

            patch.setattr(GrammarMatcher, name, failing)
            error, beside = outcomes(engine, greedy(prompt(5), 9, constraint=FLAG), NEIGHBOUR)
            assert isinstance(error, EngineError)
            assert beside == answer(engine, NEIGHBOUR)
    assert caplog.text.count("a request failed (IndexError)") == 2
    assert "IndexError: secret" not in caplog.text
    assert_nothing_runs(engine)


def test_grammars_hold_up_neither_the_event_loop_nor_the_decode_thread(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[threading.Thread]] = {"start": set(), "allowed": set()}

    def noted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def note(*args: Any) -> Any:
            threads[name].add(threading.current_thread())
            return original(*args)

        monkeypatch.setattr(owner, name, note)

    noted(GrammarCompiler, "start")
    noted(GrammarMatcher, "allowed")
    together(engine, [greedy(prompt(5), 9, constraint=FLAG), NEIGHBOUR])
    for seen in threads.values():
        assert seen
        assert not seen & {engine._thread, threading.current_thread()}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_failed_prefill_is_one_requests_own(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    expected = answer(engine, NEIGHBOUR)
    with monkeypatch.context() as patch:
        failures = break_forward(engine, patch, lambda ids: ids.shape[1] > 100, error)
        failed, beside = outcomes(engine, greedy(prompt(300), 9), NEIGHBOUR)
    assert isinstance(failed, EngineError)
    assert ("out of memory" in str(failed)) is (error is torch.OutOfMemoryError)
    assert beside == expected
    assert len(failures) == 1
    assert_nothing_runs(engine)


def test_prompts_that_fail_together_are_tried_one_by_one(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [greedy(prompt(12, seed), 6) for seed in range(5)]
    expected = [answer(engine, request) for request in requests]
    bad = requests[3].ids[4]

    def fails(ids: torch.Tensor) -> bool:
        return ids.shape[1] > 1 and (ids.shape[0] > 1 or ids[0].tolist() == list(requests[3].ids))

    assert bad
    with monkeypatch.context() as patch:
        failures = break_forward(engine, patch, fails, torch.OutOfMemoryError)
        found = outcomes(engine, *requests)
    assert isinstance(found[3], EngineError)
    assert [*found[:3], found[4]] == [*expected[:3], expected[4]]
    assert len(failures) >= 2
    assert_nothing_runs(engine)


def test_a_failed_step_is_everybodys_and_the_others_go_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = greedy(prompt(300, 5), 6)
    expected = answer(engine, waiting)
    runner: Any = engine._scheduler.runner
    runner.chunk = 4
    steps = 0

    def fails(ids: torch.Tensor) -> bool:
        nonlocal steps
        steps += ids.shape[1] == 1
        return ids.shape[1] == 1 and steps == 10

    with monkeypatch.context() as patch:
        patch.setattr(runner, "recorded", None)  # a recording does not call the model
        break_forward(engine, patch, fails, RuntimeError)
        *failed, prefilling = outcomes(engine, NEIGHBOUR, greedy(prompt(9, 2), 40), waiting)
    assert all(isinstance(one, EngineError) for one in failed)
    assert prefilling == expected
    assert together(engine, [NEIGHBOUR]) == [answer(engine, NEIGHBOUR)]
    assert engine.healthy
    assert_nothing_runs(engine)


def test_a_model_that_fails_at_each_step_is_given_up(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(engine._scheduler, "_advance_prefills", failing)
    (error,) = outcomes(engine, NEIGHBOUR)
    assert "restart" in str(error)
    assert not engine.healthy


def test_a_thread_that_dies_tells_everyone(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.healthy

    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "_send", failing)
    for error in outcomes(engine, NEIGHBOUR, greedy(prompt(300), 9)):
        assert isinstance(error, EngineError)
        assert "restart" in str(error)
    assert not engine.healthy
    with pytest.raises(EngineError, match="restart"):
        wait(lambda: collect(engine, NEIGHBOUR))
    with pytest.raises(EngineError, match="restart"):
        wait(lambda: engine.embed([prompt(3)]))
    engine.close()


def test_those_who_leave_at_any_time_leave_nothing(engine: TransformersEngine) -> None:
    runner: Any = engine._scheduler.runner
    runner.chunk = 8

    async def leave(number: int) -> None:
        constraint = FLAG if number % 5 == 0 else None
        task = asyncio.create_task(
            ids_of(engine, greedy(prompt(3 + 7 * number % 90, number % 9), 200, constraint=constraint))
        )
        await asyncio.sleep(0.002 * (number % 13))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run() -> list[int]:
        staying, *_ = await asyncio.gather(ids_of(engine, NEIGHBOUR), *map(leave, range(60)))
        return staying

    assert wait(run) == answer(engine, NEIGHBOUR)
    assert_nothing_runs(engine)
    assert len(runner.prefixes) <= 16
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) in (Sequence, RowGroup, BatchedPrefill)]

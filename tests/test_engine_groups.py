"""Rows pay for their own length, running prompts share their prefixes, and long prompts do not hold up short ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.serving.engine import batched_runner, grouped_attention, scheduler
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.constraint import GrammarCompiler
from ollama_forge.serving.engine.kv_cache import KVCache, layers_with_kv
from ollama_forge.serving.engine.model_runner import Forward
from ollama_forge.serving.engine.prefix_cache import PrefixCache
from ollama_forge.serving.engine.scheduler import Scheduler
from ollama_forge.serving.engine.sequence import Sequence
from tests import tiny
from tests.engines import by_generate, greedy, load, prompt, running, together, wait
from tests.test_engine_batching import windowed

SHAPES = ((5, 60), (200, 25), (9, 40), (330, 20), (60, 30), (190, 12), (7, 50))  # lengths of prompts and answers


class Traced(Scheduler):
    """A scheduler without a thread; ``found`` has each sequence's tokens, and its error if it has one."""

    def __init__(self, model: Any, *, slots: int = 8, chunk: int = 16, **support: bool) -> None:
        has_kv = layers_with_kv(model.module.config)
        assert has_kv is not None
        self.batch = BatchedRunner(Forward(model), has_kv, slots, 1 << 30, **support)
        if support.get("splits", True):
            self.batch.chunk = chunk
        self.grammars = GrammarCompiler(model.tokenizer.backend, tiny.VOCABULARY, [1])
        self.found: dict[Sequence, list[int]] = {}
        self.errors: list[EngineError] = []
        super().__init__(self.batch, self._note)

    def ask(self, request: EngineRequest) -> Sequence:
        sequence = Sequence.of(request, None, self.grammars)
        self.found[sequence] = []
        self.submit(sequence)
        return sequence

    def _note(self, sequence: Sequence, item: Token | EngineError | None) -> None:
        if isinstance(item, Token):
            self.found[sequence].append(item.id)
        elif item is not None:
            self.errors.append(item)

    def until(self, condition: Callable[[], bool]) -> int:
        """Tick until a condition holds; the number of ticks."""
        for count in range(1000):
            if condition():
                return count
            self.tick()
        raise AssertionError("it never came")


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_oss", "falcon-rw"])
def test_rows_in_groups_answer_as_alone(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    monkeypatch.setattr(batched_runner, "_WASTE_APART", 40)
    model = load(tmp_path, windowed(family))
    requests = [greedy(prompt(length, seed), count) for seed, (length, count) in enumerate(SHAPES)]
    traced = Traced(model, chunk=128)
    sequences = [traced.ask(request) for request in requests]
    groups = []
    while traced.busy:
        traced.tick()
        groups.append(len(traced.batch.groups))
    assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, r.max_tokens) for r in requests]
    assert max(groups) in (3, 4)
    assert groups[-1] == 0
    assert traced.batch.one_pass is (family not in ("gpt_oss", "falcon-rw"))  # these have attention of their own


def test_a_step_over_groups_reads_the_weights_once_and_no_padding(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=512)
    for seed in range(6):
        traced.ask(greedy(prompt(10, seed), 100))
    traced.ask(greedy(prompt(400, 9), 100))
    traced.until(lambda: len(traced.running) == 7)
    traced.tick()  # the first step over groups is checked against separate ones
    passes = traced.batch.forward.passes
    traced.tick()
    assert traced.batch.forward.passes == passes + 1
    short, long = traced.batch.groups
    assert (len(short.rows), len(long.rows)) == (6, 1)
    assert short.width < 30
    padded = KVCache(traced.batch.has_kv, 1, 1)
    padded.copy_row(long.cache, 0, 0, 0, 0, 1)
    assert short.cache.nbytes + long.cache.nbytes < 7 * 400 * padded.nbytes / 2


def test_one_pass_over_groups_is_given_up_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    requests = [
        greedy(prompt(400, 1), 10),
        greedy(prompt(9, 2), 10),
        greedy(prompt(11, 3), 10),
        greedy(prompt(9, 4), 10),
    ]

    def wrong(self: BatchedRunner, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.randn(len(ids), tiny.VOCABULARY)

    def broken(self: BatchedRunner, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        raise AttributeError("'tuple' object has no attribute 'to'")

    in_one_pass = BatchedRunner._in_one_pass

    def spoiling(self: BatchedRunner, ids: torch.Tensor, inputs: Any) -> torch.Tensor:
        return in_one_pass(self, torch.full_like(ids, 7), inputs)  # it writes keys and values of other tokens

    for replaced in (wrong, broken, spoiling):
        monkeypatch.setattr(BatchedRunner, "_in_one_pass", replaced)
        monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
        monkeypatch.setattr(batched_runner, "_WASTE_APART", 40)
        traced = Traced(model, chunk=512)
        sequences = [traced.ask(request) for request in requests]
        traced.until(lambda traced=traced: not traced.busy)
        assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, r.max_tokens) for r in requests]
        assert not traced.batch.one_pass


def test_one_pass_is_not_used_before_it_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    traced = Traced(load(tmp_path), chunk=512)
    failures = [torch.OutOfMemoryError("no memory")]

    def wrong(self: BatchedRunner, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return torch.randn(len(ids), tiny.VOCABULARY)

    monkeypatch.setattr(BatchedRunner, "_in_one_pass", wrong)
    requests = [greedy(prompt(400, 1), 4), greedy(prompt(9, 2), 4)]
    for request in requests:
        traced.ask(request)
    with pytest.raises(torch.OutOfMemoryError):
        traced.until(lambda: not traced.busy)
    traced.fail(EngineError("no memory"))
    again = [traced.ask(request) for request in requests]
    traced.until(lambda: not traced.busy)
    assert [traced.found[one] for one in again] == [by_generate(traced.batch.forward.model, r.ids, 4) for r in requests]
    assert not traced.batch.one_pass


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_long_row_alone_answers_as_generate(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_runner, "_LONG", 40)
    model = load(tmp_path, windowed(family))
    traced = Traced(model, chunk=128)
    long = traced.ask(greedy(prompt(30, 3), 60))
    calls = []
    in_one_pass = traced.batch._in_one_pass
    monkeypatch.setattr(traced.batch, "_in_one_pass", lambda *args: calls.append(1) or in_one_pass(*args))
    traced.until(lambda: not traced.busy)
    assert traced.found[long] == by_generate(model, long.request.ids, 60)
    assert len(calls) == 60 - 1 - (40 - 30)  # the steps from 40 columns on
    assert traced.batch.one_pass


def test_groups_merge_when_the_longest_row_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    model = load(tmp_path)
    traced = Traced(model, chunk=512)
    requests = [
        greedy(prompt(6, 1), 60),
        greedy(prompt(90, 2), 60),
        greedy(prompt(60, 3), 80),
        greedy(prompt(320, 4), 5),
    ]
    sequences = [traced.ask(request) for request in requests]
    most = 0
    while traced.busy:
        traced.tick()
        most = max(most, len(traced.batch.groups))
        if len(traced.running) == 1:
            assert len(traced.batch.groups) == 1
    assert most == 3
    assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, r.max_tokens) for r in requests]


def test_prompts_that_were_computed_together_get_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=512)
    moves: list[int] = []
    relocate = KVCache.relocate
    monkeypatch.setattr(
        KVCache,
        "relocate",
        lambda self, to, rows, columns: (moves.append(rows), relocate(self, to, rows, columns))[1],
    )
    requests = [greedy(prompt(9, seed), 3) for seed in range(7)]
    sequences = [traced.ask(request) for request in requests]
    traced.until(lambda: not traced.busy)
    assert moves == [8]
    assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, 3) for r in requests]


@pytest.mark.parametrize(("family", "joins"), [("llama", True), ("falcon-rw", False), ("gpt_oss", False)])
def test_queries_are_joined_where_a_model_attends_as_others_do(tmp_path: Path, family: str, joins: bool) -> None:
    model = load(tmp_path, windowed(family))
    with running(model) as engine:
        runner = engine._scheduler.runner
        assert isinstance(runner, BatchedRunner)
        assert runner.joins_queries is joins


# -- prefixes ---------------------------------------------------------------------------------------------------------


def test_prompts_that_arrive_together_compute_their_common_beginning_once(tmp_path: Path) -> None:
    model = load(tmp_path)
    system = prompt(300, 1)
    requests = [greedy((*system, *prompt(9, 10 + number)), 12) for number in range(6)]
    with running(model, slots=8) as engine:
        assert together(engine, requests) == [by_generate(model, r.ids, 12) for r in requests]
        assert engine.stats.prefilled_tokens == 300 + 6 * 9


def test_a_later_prompt_copies_from_a_running_one(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=64)
    first = traced.ask(greedy(prompt(300, 1), 100))
    traced.until(lambda: len(traced.found[first]) > 3)
    before = traced.prefilled_tokens
    request = greedy((*prompt(300, 1)[:280], *prompt(10, 5)), 10)
    second = traced.ask(request)
    traced.until(lambda: second not in traced.running and len(traced.found[second]) == 10)
    assert first in traced.running
    assert traced.found[second] == by_generate(model, request.ids, 10)
    assert traced.prefilled_tokens - before == 10


def test_nobody_waits_for_a_prefix_that_cannot_be_copied(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, reuses=False)
    first, second = (traced.ask(greedy((*prompt(300, 1), number), 5)) for number in (7, 8))
    traced.tick()
    assert not traced.waiting
    traced.until(lambda: not traced.busy)
    assert traced.found == {one: by_generate(model, one.request.ids, 5) for one in (first, second)}
    assert traced.prefilled_tokens == 2 * 301


def test_who_waits_for_a_prefix_does_not_wait_for_one_that_was_cancelled(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=16)
    first, second = (traced.ask(greedy((*prompt(300, 1), number), 5)) for number in (7, 8))
    traced.tick()
    assert list(traced.waiting) == [second]
    first.cancelled = True
    traced.until(lambda: not traced.busy)
    assert traced.found == {first: [], second: by_generate(model, second.request.ids, 5)}


def test_measuring_a_prefix_is_no_use_of_it() -> None:
    prefixes: PrefixCache[str] = PrefixCache(2, 100)
    prefixes.add((1, 2, 3), "a", 1)
    prefixes.add((4, 5, 6), "b", 1)
    assert prefixes.shared((1, 2, 3, 9)) == 3
    prefixes.add((7, 8), "c", 1)
    assert prefixes.match((1, 2, 3, 9)) is None
    assert prefixes.match((4, 5, 9)) == ("b", 2)
    prefixes.add((7, 9), "d", 1)
    assert prefixes.match((4, 5, 9)) == ("b", 2)


def test_a_state_that_is_too_large_evicts_no_others() -> None:
    prefixes: PrefixCache[str] = PrefixCache(4, 100)
    prefixes.add((1, 2, 3), "a", 60)
    prefixes.add((4, 5, 6), "b", 101)
    assert len(prefixes) == 1
    assert prefixes.match((1, 2, 3, 9)) == ("a", 3)


# -- sharing a tick ---------------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=16)
    long = traced.ask(greedy(prompt(480, 1), 5))
    traced.tick()
    passes = traced.batch.forward.passes
    short = traced.ask(greedy(prompt(5, 2), 5))
    traced.until(lambda: bool(traced.found[short]))
    assert traced.batch.forward.passes - passes <= 4  # two chunks of the long one, the short one, and a step
    assert not traced.found[long]
    traced.until(lambda: not traced.busy)
    assert traced.found == {one: by_generate(model, one.request.ids, 5) for one in (long, short)}


def test_a_long_prompt_goes_on_while_short_ones_keep_coming(tmp_path: Path) -> None:
    traced = Traced(load(tmp_path), chunk=16)
    long = traced.ask(greedy(prompt(320, 1), 5))
    ticks = 0
    while not traced.found[long]:
        traced.ask(greedy(prompt(30, 2 + ticks), 1))
        traced.tick()
        ticks += 1
    assert ticks <= 320 / 16 + 2


def test_prompts_that_cannot_be_split_do_not_all_come_between_two_steps(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Traced(model, splits=False)
    first = traced.ask(greedy(prompt(5, 1), 20))
    traced.until(lambda: bool(traced.found[first]))
    long = [traced.ask(greedy(prompt(900, 2 + number), 2)) for number in range(5)]
    before = traced.prefilled_tokens
    traced.tick()
    assert traced.prefilled_tokens - before <= scheduler.CHUNKS_A_TICK * scheduler.GROUP_TOKENS + 900
    traced.until(lambda: not traced.busy)
    assert [traced.found[one] for one in long] == [by_generate(model, one.request.ids, 2) for one in long]


def test_a_tick_computes_no_more_than_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    traced = Traced(model, chunk=16)
    prefilled: list[int] = []
    forward = model.forward

    def noted(**inputs: Any) -> Any:
        prefilled.append(inputs["input_ids"].numel() if inputs["input_ids"].shape[1] > 1 else 0)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", noted)
    for seed, length in enumerate((200, 3, 130, 4, 5, 11, 4)):
        traced.ask(greedy(prompt(length, seed), 2))
    while traced.busy:
        prefilled.clear()
        traced.tick()
        assert sum(prefilled) < (scheduler.CHUNKS_A_TICK + 1) * 16


def test_a_long_input_is_embedded_in_chunks_between_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    base: Any = model.module.base_model
    widths: list[tuple[int, int]] = []
    forward = base.forward

    def noted(**inputs: Any) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    texts = [prompt(length, length) for length in (300, 5, 9, 60, 64, 65, 7)]
    with running(model) as engine:
        runner: Any = engine._scheduler.runner
        runner.chunk = 64
        monkeypatch.setattr(base, "forward", noted)
        vectors = wait(lambda: engine.embed(texts))
        monkeypatch.undo()
    assert max(rows * width for rows, width in widths) <= 64
    for ids, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            mean = base(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-5)


def test_the_engine_knows_the_size_of_a_token(tmp_path: Path) -> None:
    with running(load(tmp_path)) as engine:
        assert engine.token_bytes == 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
        assert engine.cache_bytes > 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_heads_that_share_keys_are_one_query(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A step of one group and of two, and a prompt, without copies of keys and values."""
    draws = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    query = torch.randn(2, 6, tokens, 8, generator=draws)
    key, value = (torch.randn(2, 2, 9, 8, generator=draws) for _ in range(2))
    mask = torch.ones(2, 1, tokens, 9, dtype=torch.bool)
    mask[0, ..., :3] = False
    mask[..., -1] = tokens == 1
    expected, _ = grouped_attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", None)
    found, _ = grouped_attention._attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
    apart = [[side[row : row + 1] for row in range(2)] for side in (key, value)]
    found, _ = grouped_attention._attention(module, query, *apart, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_no_layer_makes_a_mask_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to the scores is made once a pass, of the queries' type."""
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (mask := kwargs.get("attn_mask")) is not None:
            seen.add((mask.dtype, query.dtype))
        return attend(query, *args, **kwargs)

    with running(load(tmp_path, dtype="bfloat16")) as engine:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        together(engine, [greedy(prompt(length, length), 4) for length in (9, 20)])
    assert seen == {(torch.bfloat16, torch.bfloat16)}

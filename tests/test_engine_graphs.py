"""Steps that are replayed on static shapes, and tokens that are read a step late, give the same answers.

There is no GPU here: instead of a CUDA graph, a replay calls the recorded function again, and copies its result to the
place of the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.serving.engine import batched_runner
from ollama_forge.serving.engine.base import EngineRequest, SamplingParams
from ollama_forge.serving.engine.cuda_graphs import BufferPool, PooledKVCache, StepGraphs
from ollama_forge.serving.engine.host_reads import HostReadError, NoHostReads
from ollama_forge.serving.engine.kv_cache import layers_with_kv
from ollama_forge.serving.engine.model_runner import Forward
from ollama_forge.serving.engine.sampled import Sampled
from ollama_forge.serving.engine.self_test import SelfTest
from tests.engines import by_generate, greedy, load, prompt
from tests.test_engine_families import build
from tests.test_engine_groups import SHAPES, Traced

FAMILIES = ("llama", "gpt2", "falcon-rw", "gemma3_text", "gemma3n_text", "gpt_oss", "deepseek_v3", "llama4_text")
Run = Callable[[], torch.Tensor]


class Recorder:
    """Records functions, whose results share memory as those of CUDA graphs do; ``replays`` counts their calls."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self.memory = torch.full((1 << 16,), torch.nan)

    def __call__(self, run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        number, result = len(self.replays), run()
        output = self.memory[: result.numel()].view(result.shape)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            output.copy_(run())

        return replay, output


class Graphed(Traced):
    """A scheduler as on CUDA: steps are replayed, and their tokens read late."""

    def __init__(self, model: Any, *, patience: int = 1, nbytes: int = 1 << 30, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.recorder = Recorder()
        forward, has_kv = self.batch.forward, self.batch.has_kv
        self.graphs = StepGraphs(forward, has_kv, nbytes, capture=self.recorder, patience=patience)
        self.batch.graphs, self.batch.runs_ahead, self.batch._shares_layers = self.graphs, True, True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_answer_as_generate(family: str) -> None:
    model = build(family)
    longest = model.module.config.max_position_embeddings if family == "gpt2" else 512  # type: ignore[union-attr]
    requests = [greedy(prompt(length, seed), count) for seed, (length, count) in enumerate(SHAPES)]
    requests = [request for request in requests if len(request.ids) + request.max_tokens <= longest]
    traced = Graphed(model, chunk=128)
    early, late = requests[:3], requests[3:]
    sequences = [traced.ask(request) for request in early]
    traced.until(lambda: len(traced.found[sequences[0]]) > 7)
    sequences += [traced.ask(request) for request in late]
    traced.until(lambda: not traced.busy)
    assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, r.max_tokens) for r in requests]
    assert not traced.graphs.failed
    assert sum(traced.recorder.replays) > 40


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_groups_are_replayed_one_after_the_other(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_runner, "_WASTE_BY_GRAPH", 40)
    model = build(family)
    requests = [greedy(prompt(length, seed), count) for seed, (length, count) in enumerate(SHAPES)]
    traced = Graphed(model, chunk=128)
    sequences = [traced.ask(request) for request in requests]
    most = 0
    while traced.busy:
        traced.tick()
        most = max(most, len(traced.batch.groups))
    assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, r.max_tokens) for r in requests]
    assert most > 1
    assert sum(map(bool, traced.recorder.replays)) > 1


def test_buffers_and_their_graphs_are_used_again(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Graphed(model, patience=0)
    for round_ in range(3):
        requests = [greedy(prompt(240, 10 * round_ + seed), 30) for seed in range(3)]
        sequences = [traced.ask(request) for request in requests]
        traced.until(lambda: not traced.busy)
        assert [traced.found[one] for one in sequences] == [by_generate(model, r.ids, 30) for r in requests]
        if round_ == 0:
            captured = len(traced.recorder.replays)
    assert len(traced.recorder.replays) == captured
    sizes = [(buffers.rows, buffers.columns) for buffers in traced.graphs.pool.free]
    assert len(set(sizes)) == len(sizes)
    (graph,) = (graph for buffers in traced.graphs.pool.free for graph in buffers.graphs.values() if graph.rows == 4)
    assert graph._mask[3].all()  # a row that sees nothing might be NaN, and leave that in the buffers
    traced.batch.reset()
    assert traced.graphs.pool.free == []


def test_a_sequence_that_outgrows_its_buffers_goes_on(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = Graphed(model)
    request = greedy(prompt(150, 1), 300)
    sequence = traced.ask(request)
    traced.until(lambda: not traced.busy)
    assert traced.found[sequence] == by_generate(model, request.ids, 300)
    assert len(traced.recorder.replays) == 2  # of 256 and of 512 columns


def test_the_pool_is_bounded_and_hands_out_zeros() -> None:
    def cache(pool: BufferPool, columns: int) -> PooledKVCache:
        made = PooledKVCache([True, False], 1, columns, None, pool)
        made.layers[0].update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))  # type: ignore[union-attr]
        return made

    pool = BufferPool(nbytes=2 * 256 * 4 * 4 + 2 * 512 * 4 * 4)
    for columns in (100, 300, 256):
        cache(pool, columns).release()
    assert [(buffers.rows, buffers.columns) for buffers in pool.free] == [(1, 512), (1, 256)]
    taken = pool.take(1, 512)
    assert taken is not None
    assert not any(buffer.any() for buffer in taken)
    assert pool.take(1, 512) is None


def test_what_makes_the_host_wait_is_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    forward = model.forward

    def reads(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] == 1:
            assert int(inputs["position_ids"].max()) >= 0
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", reads)
    traced = Graphed(model)
    request = greedy(prompt(20, 1), 30)
    sequence = traced.ask(request)
    traced.until(lambda: not traced.busy)
    assert traced.found[sequence] == by_generate(model, request.ids, 30)
    assert traced.graphs.failed
    assert traced.recorder.replays == []


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.to("meta"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_host_reads_are_found(read: Callable[[torch.Tensor], Any], inference: bool) -> None:
    with torch.inference_mode(inference):
        tensor = torch.arange(5)
        with pytest.raises(HostReadError), NoHostReads(tensor.device):
            read(tensor)
        with NoHostReads(tensor.device):
            assert (tensor[tensor.clone()] * 2).sum() is not None


def test_the_self_test_takes_graphs_only_where_they_are_right(tmp_path: Path) -> None:
    model = load(tmp_path)
    has_kv = layers_with_kv(model.module.config)
    recorder = Recorder()

    def stale(run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        return lambda: None, run()

    assert SelfTest(Forward(model), has_kv).run().graphs is None
    assert SelfTest(Forward(model), has_kv, recorder).run().graphs is True
    assert sum(recorder.replays) == 3
    support = SelfTest(Forward(model), has_kv, stale).run()
    assert (support.graphs, support.batches) == (False, True)
    assert "CUDA graphs" in support.limits


# -- tokens that are read a step late ---------------------------------------------------------------------------------


def ahead(model: Any, **settings: Any) -> Traced:
    traced = Traced(model, **settings)
    traced.batch.runs_ahead = True
    return traced


def test_tokens_are_read_while_the_next_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = ahead(load(tmp_path))
    happened: list[str] = []
    step, read = traced.batch.step, Sampled.read

    def noted_step(tokens: Any) -> Any:
        happened.append("step on the device" if isinstance(tokens, torch.Tensor) else "step")
        return step(tokens)

    def noted_read(self: Sampled) -> Any:
        happened.append("read")
        return read(self)

    monkeypatch.setattr(traced.batch, "step", noted_step)
    monkeypatch.setattr(Sampled, "read", noted_read)
    traced.ask(greedy(prompt(9, 1), 5))
    traced.until(lambda: not traced.busy)
    assert happened == ["read", "step", *["step on the device", "read"] * 3, "read"]


def test_answers_that_end_by_themselves_lose_nothing(tmp_path: Path) -> None:
    """Each ends at a token of its own, at which it has been stepped once too often; the next turn is still right."""
    model = load(tmp_path)
    requests = []
    for seed, (length, count) in enumerate(SHAPES):
        ids = prompt(length, seed)
        requests.append(greedy(ids, count, end_ids=frozenset(by_generate(model, ids, count)[seed + 2 :][:1])))
    expected = []
    for request in requests:
        whole = by_generate(model, request.ids, request.max_tokens)
        (end,) = request.end_ids
        expected.append(whole[: whole.index(end)])
    traced = ahead(model, chunk=128)
    sequences = [traced.ask(request) for request in requests]
    traced.until(lambda: not traced.busy)
    assert [traced.found[one] for one in sequences] == expected
    for request, said in zip(requests, expected, strict=True):
        turn = greedy((*request.ids, *said, *prompt(5, 9)), 8)
        before = traced.prefilled_tokens
        again = traced.ask(turn)
        traced.until(lambda: not traced.busy)
        assert traced.found[again] == by_generate(model, turn.ids, 8)
        assert traced.prefilled_tokens - before == 5


def test_what_needs_the_last_token_is_not_run_ahead(tmp_path: Path) -> None:
    model = load(tmp_path)
    drawn = SamplingParams(temperature=1.0, top_k=0, top_p=0.95, seed=3)
    penalised = SamplingParams(temperature=0.0, repeat_penalty=1.5)
    requests = [
        EngineRequest(prompt(9, 1), 20, drawn, top_logprobs=2),
        EngineRequest(prompt(11, 2), 12, penalised),
        greedy(prompt(7, 3), 15),
    ]

    def answers(traced: Traced) -> list[list[int]]:
        sequences = [traced.ask(request) for request in requests]
        while traced.busy:
            traced.tick()
            if any(sequence.sampling.penalised for sequence in traced.running):
                assert traced._unread is None
        return [traced.found[one] for one in sequences]

    assert answers(ahead(model)) == answers(Traced(model))


def test_a_cancelled_sequence_leaves_before_the_next_step(tmp_path: Path) -> None:
    model = load(tmp_path)
    traced = ahead(model)
    request = greedy(prompt(9, 1), 40)
    kept, cancelled = traced.ask(request), traced.ask(greedy(prompt(12, 2), 400))
    traced.until(lambda: len(traced.found[cancelled]) == 10)
    cancelled.cancelled = True
    traced.tick()
    assert traced.running == [kept]
    traced.until(lambda: not traced.busy)
    assert len(traced.found[cancelled]) == 10
    assert traced.found[kept] == by_generate(model, request.ids, 40)

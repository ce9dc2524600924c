"""Filters, penalties, draws and log-probabilities, compared with small cases worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ollama_forge.serving.engine.base import EngineRequest, SamplingParams
from ollama_forge.serving.engine.sampler import (
    SamplingState,
    _by_order,
    _draw_unsorted,
    draw,
    filter_logits,
    sample,
)
from tests.engines import GREEDY, collect, load, prompt, running, wait

OPEN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=1)
SHARES = [0.05, 0.4, 0.1, 0.3, 0.15]  # of ids 0 to 4
LOGITS = torch.tensor([SHARES]).log()


def left(setting: SamplingParams) -> set[int]:
    """Ids that a setting leaves of SHARES."""
    candidates = filter_logits(LOGITS, [setting])
    return {
        token
        for token, score in zip(candidates.ids[0].tolist(), candidates.scores[0].tolist(), strict=True)
        if score > -math.inf
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1, 3}),  # the token that crosses 0.5 stays
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.86}, {1, 2, 3, 4}),
        ({"min_p": 0.3}, {1, 3, 4}),  # at least 0.12
        ({"min_p": 1.0}, {1}),
        # entropy 1.39 nats; nearest are 0.3 (1.20), then 0.4 (0.92) and 0.15 (1.90) at 0.48 and 0.50
        ({"typical_p": 0.2}, {3}),
        ({"typical_p": 0.5}, {1, 3}),
        ({"typical_p": 0.75}, {1, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of three, renormalised: 0.47 + 0.35 is over 0.8
        ({"typical_p": 0.2, "top_p": 0.1}, {3}),
        ({"top_k": 4, "min_p": 0.3}, {1, 3, 4}),
    ],
)
def test_filters(fields: dict[str, float], expected: set[int]) -> None:
    assert left(replace(OPEN, **fields)) == expected  # type: ignore[arg-type]


def test_rows_are_filtered_apart() -> None:
    settings = [replace(OPEN, top_k=1), replace(OPEN, top_k=3), replace(OPEN, top_k=4, top_p=0.5)]
    scores = filter_logits(LOGITS.repeat(3, 1), settings).scores
    assert (scores > -math.inf).sum(-1).tolist() == [1, 3, 2]


def drawn(logits: torch.Tensor, row: SamplingState, times: int = 4000) -> Counter[int]:
    return Counter(sample(logits, [row]).read()[0].id for _ in range(times))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_follow_the_distribution_at_the_temperature(temperature: float, top_k: int) -> None:
    counts = drawn(LOGITS, SamplingState(replace(OPEN, temperature=temperature, top_k=top_k), []))
    expected = (LOGITS[0] / temperature).softmax(-1).tolist()
    for token, share in enumerate(expected):
        assert abs(counts[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_temperature_comes_after_the_filters() -> None:
    assert set(drawn(LOGITS, SamplingState(replace(OPEN, temperature=5.0, top_p=0.5), []), 500)) == {1, 3}


def test_what_is_filtered_out_is_never_drawn_at_the_edges_of_the_unit_interval() -> None:
    settings = [replace(OPEN, top_p=0.5)] * 2
    assert draw(filter_logits(LOGITS.repeat(2, 1), settings), settings, [0.0, 1 - 2**-24]).tolist() == [1, 3]


def test_temperature_zero_and_tiny_is_the_likeliest() -> None:
    for temperature in (0.0, 1e-9, 1e-4):
        assert set(drawn(LOGITS, SamplingState(replace(OPEN, temperature=temperature), []), 20)) == {1}


def test_of_equally_likely_tokens_a_greedy_row_gets_the_first() -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits[1, [40, 700, 4999]] = logits[2, [0, 4999]] = 50.0
    expected = [int(logits[0].argmax()), 40, 0]
    states = [SamplingState(GREEDY, []) for _ in range(3)]
    assert [token.id for token in sample(logits, states).read()] == expected
    states[0] = SamplingState(replace(OPEN, top_k=1), [])
    assert [token.id for token in sample(logits, states).read()] == expected


@pytest.mark.parametrize(
    ("fields", "said", "expected"),
    [
        ({"repeat_penalty": 2.0}, [0, 1], [1.0, -6.0, 1.0, 0.5]),
        ({"presence_penalty": 0.5}, [0, 0, 2], [1.5, -3.0, 0.5, 0.5]),
        ({"frequency_penalty": 0.5}, [0, 0, 2], [1.0, -3.0, 0.5, 0.5]),
        ({"frequency_penalty": -0.5, "presence_penalty": 0.25}, [0, 0], [2.75, -3.0, 1.0, 0.5]),
        ({"repeat_penalty": 2.0, "presence_penalty": 0.25}, [0, 1], [0.75, -6.25, 1.0, 0.5]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 1}, [0, 1], [2.0, -6.0, 1.0, 0.5]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 0}, [0, 1], [2.0, -3.0, 1.0, 0.5]),
        ({"repeat_penalty": 2.0, "repeat_last_n": -1}, [0] + [3] * 500, [1.0, -3.0, 1.0, 0.25]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 64}, [0] + [3] * 64, [2.0, -3.0, 1.0, 0.25]),
    ],
)
def test_penalties(fields: dict[str, float], said: list[int], expected: list[float]) -> None:
    """Against a prompt, against an answer, and half and half; read off from what the sampler does."""
    logits = torch.tensor([[2.0, -3.0, 1.0, 0.5]])
    for split in (0, len(said) // 2, len(said)):
        row = SamplingState(replace(OPEN, **fields), said[:split])  # type: ignore[arg-type]
        for token in said[split:]:
            row.add(token)
        counts = drawn(logits, row)
        shares = torch.tensor(expected).softmax(-1).tolist()
        for token, share in enumerate(shares):
            assert abs(counts[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1e-9
    assert logits.tolist() == [[2.0, -3.0, 1.0, 0.5]]


def test_penalties_move_a_greedy_answer() -> None:
    logits = torch.tensor([[2.0, -3.0, 1.5, 0.5]])
    row = SamplingState(replace(GREEDY, repeat_penalty=1.5), [0])
    assert sample(logits, [row]).read()[0].id == 2
    assert sample(logits, [SamplingState(GREEDY, [0])]).read()[0].id == 0


def test_only_what_is_allowed_is_drawn() -> None:
    for sampling in (GREEDY, OPEN, replace(OPEN, top_k=2)):
        row = SamplingState(sampling, [])
        row.allowed = torch.tensor([True, False, True, False, False])
        assert set(drawn(LOGITS, row, 200)) <= {0, 2}


def test_log_probabilities_are_of_the_bare_logits() -> None:
    row = SamplingState(replace(GREEDY, repeat_penalty=9.0, top_k=1), [1, 3], top_logprobs=2)
    row.allowed = torch.tensor([True, False, False, True, True])
    logits = LOGITS.repeat(2, 1)
    step, bare = sample(logits, [row, SamplingState(OPEN, [])]).read()
    assert step.logprob == pytest.approx(math.log(SHARES[step.id]), abs=1e-5)
    assert [(top.id, round(top.value, 4)) for top in step.top] == [
        (1, round(math.log(0.4), 4)),
        (3, round(math.log(0.3), 4)),
    ]
    assert (bare.logprob, bare.top) == (None, ())


# -- no more sorting than needed ------------------------------------------------------------------------------------


def kept_by_hand(logits: np.ndarray, params: SamplingParams) -> tuple[dict[int, float], float]:
    """The tokens that the filters leave with their logits, by sorting the whole vocabulary in float64.

    Also how near a share is to the bound of its filter: rounding may decide what is nearer than about 1e-6.
    """
    order = np.argsort(-logits, kind="stable")
    order = order[: params.top_k] if params.top_k > 0 else order
    nearest = 1.0

    def shares_of(ids: np.ndarray) -> np.ndarray:
        weights = np.exp(logits[ids] - logits[ids].max())
        return weights / weights.sum()

    def until(ids: np.ndarray, shares: np.ndarray, bound: float) -> np.ndarray:
        nonlocal nearest
        before = np.cumsum(shares) - shares
        nearest = min(nearest, np.abs(before[1:] - bound).min(initial=1.0))
        keep = before < bound
        keep[0] = True
        return ids[keep]

    if params.typical_p < 1:
        shares = shares_of(order)
        logs = np.log(shares)
        far = np.abs(logs + (shares * logs).sum() * -1)
        by_far = np.argsort(far, kind="stable")
        nearest = min(nearest, np.diff(np.sort(far)).min(initial=1.0) * 10)
        kept = until(order[by_far], shares[by_far], params.typical_p)
        order = order[np.isin(order, kept)]
    if params.top_p < 1:
        order = until(order, shares_of(order), params.top_p)
    if params.min_p > 0:
        differences = logits[order] - logits[order].max() - np.log(params.min_p)
        nearest = min(nearest, np.abs(differences).min())
        order = order[differences >= 0]
    return {int(token): float(logits[token]) for token in order}, nearest


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    vocabulary=st.sampled_from([7, 1024, 1500, 3000, 20_000]),
    flat=st.sampled_from([0.05, 1.0, 4.0]),
    top_k=st.sampled_from([0, 5, 1024, 1200]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 0.999]),
    typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    temperature=st.sampled_from([0.6, 1.0, 1.7]),
    seed=st.integers(0, 1000),
)
def test_what_is_drawn_is_what_sorting_everything_leaves(
    vocabulary: int,
    flat: float,
    top_k: int,
    top_p: float,
    typical_p: float,
    min_p: float,
    temperature: float,
    seed: int,
) -> None:
    """All of the filters, at vocabularies below and above what is sorted; the draw follows the shares that are left."""
    params = SamplingParams(temperature, top_k, top_p, min_p, typical_p, seed=seed)
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * flat
    kept, nearest = kept_by_hand(logits[0].double().numpy(), params)
    assume(nearest > 1e-5)
    uniforms = [(number + 0.5) / 200 for number in range(200)]
    rows = [params] * len(uniforms)
    ((draw_rows, _),) = _by_order([params], logits)
    chosen = draw_rows(logits.repeat(len(rows), 1), rows, uniforms).tolist()
    order = sorted(kept, key=lambda token: token if draw_rows is _draw_unsorted else -kept[token])
    weights = np.exp((np.array([kept[token] for token in order]) - max(kept.values())) / temperature)
    heights = np.cumsum(weights) / weights.sum()
    for uniform, token in zip(uniforms, chosen, strict=True):
        first = last = order.index(token)
        if draw_rows is not _draw_unsorted:  # equal logits may come in any order
            equal = np.flatnonzero(weights == weights[first])
            first, last = int(equal[0]), int(equal[-1])
        assert heights[first] - weights[first] / weights.sum() - 1e-5 <= uniform <= heights[last] + 1e-5


@pytest.mark.parametrize(
    ("fields", "sorts"),
    [
        ({"top_k": 0, "top_p": 1.0}, []),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.1}, []),
        ({"top_k": 40}, [40]),
        ({"top_k": 0, "top_p": 0.9}, [1024]),
        ({"top_k": 0, "top_p": 1.0, "typical_p": 0.9}, [1024]),
        ({"top_k": 0, "top_p": 0.9995}, [1024, 8192]),  # the likeliest tokens do not reach it
        ({"top_k": 0, "top_p": 1.0, "typical_p": 0.9995}, [1024, 8192]),
        ({"top_k": 0, "top_p": 0.9999999}, [1024, 8192, 20_000]),
    ],
)
def test_rows_are_sorted_no_further_than_their_filters_need(
    fields: dict[str, float], sorts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorts_of(fields, 4.0, monkeypatch) == sorts


@pytest.mark.parametrize("fields", [{"top_p": 0.99}, {"top_p": 1.0, "typical_p": 0.99}])
def test_where_tokens_are_alike_no_number_is_tried_that_cannot_do(
    fields: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorts_of({"top_k": 0, **fields}, 0.01, monkeypatch) == [1024, 20_000]


def sorts_of(fields: dict[str, float], spread: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many tokens the likeliest are sorted, one number after the other."""
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * spread
    counts: list[int] = []
    topk = torch.Tensor.topk

    def counted(self: torch.Tensor, k: int, **options: int) -> object:
        counts.append(k)
        return topk(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    sample(logits, [SamplingState(replace(OPEN, **fields), []) for _ in range(2)])  # type: ignore[arg-type]
    return counts


def test_a_row_gets_the_same_token_whatever_its_neighbours_ask_for() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    fields = ({}, {"top_p": 0.9}, {"top_k": 50}, {"typical_p": 0.5}, {"top_k": 2000, "top_p": 0.5})
    params = [replace(OPEN, **each) for each in fields]  # type: ignore[arg-type]
    for _ in range(20):
        together = [token.id for token in sample(logits, [SamplingState(each, []) for each in params]).read()]
        alone = [
            sample(logits[row : row + 1], [SamplingState(each, [])]).read()[0].id for row, each in enumerate(params)
        ]
        assert together == alone
        params = [replace(each, seed=(each.seed or 0) + 1) for each in params]


def test_an_answer_comes_with_the_models_log_softmax(tmp_path: Path) -> None:
    model = load(tmp_path)
    ids = prompt(9)
    with running(model) as engine:
        requests = [EngineRequest(ids, 12, replace(OPEN, top_k=20), top_logprobs=count) for count in (0, 3)]

        async def ask() -> list[list[object]]:
            import asyncio

            return await asyncio.gather(*(collect(engine, request) for request in requests))  # type: ignore[arg-type]

        none, three = wait(ask)
    said = [step.id for step in three]  # type: ignore[attr-defined]
    assert said == [step.id for step in none]  # type: ignore[attr-defined]
    with torch.inference_mode():
        logs = model.module(input_ids=torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    for place, step in enumerate(three):
        assert step.logprob == pytest.approx(float(logs[place, said[place]]), abs=1e-4)  # type: ignore[attr-defined]
        best = logs[place].topk(3)
        assert [top.id for top in step.top] == best.indices.tolist()  # type: ignore[attr-defined]
        assert [top.value for top in step.top] == pytest.approx(best.values.tolist(), abs=1e-4)  # type: ignore[attr-defined]
    assert all(step.top == () and step.logprob is not None for step in none)  # type: ignore[attr-defined]

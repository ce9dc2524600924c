"""How well the direction of each layer and position separates harmful from harmless prompts that it was not made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ollama_forge.directions.selection import d_prime
from ollama_forge.models.batching import Batch
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import ids_before
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Moment
from ollama_forge.text.tokenizer import Ids

MAX_POSITIONS = 5
MAX_FIT, MAX_HELD_OUT = 32, 64  # prompts of each list

Visit = Callable[[int, tuple[int, ...], Tensor], None]


@dataclass(frozen=True)
class Separation:
    """The separation of held-out prompts by the difference of means of each layer and position.

    Attributes:
        positions: token positions, counted from the end of the templated prompt (-1: the last).
        layers: numbers of the layers.
        tokens: the token at each position; "" where it differs between prompts.
        prompts: number of held-out prompts of each list.
        d_prime: for each position and layer, the distance between the projections of harmful and of harmless prompts
            in units of their pooled standard deviation.
        at_thought: the same by layer before the first token of a thought; empty if the model does not think.
    """

    positions: tuple[int, ...]
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    prompts: dict[str, int]
    d_prime: tuple[tuple[float, ...], ...]
    at_thought: tuple[float, ...] = ()


def measure_separation(model: ChatModel, fit: PartPrompts, held_out: PartPrompts) -> Separation:
    """Compute the difference of means of the first fit prompts at every layer, and separate held-out prompts with it.

    Args:
        fit: prompts to compute the directions of, at most 32 of each list.
        held_out: prompts to separate, at most 64 of each list.
    """
    fitted, others = ([part.harmful, part.harmless] for part in (fit.first(MAX_FIT), held_out.first(MAX_HELD_OUT)))
    lists = [ids_before(model, prompts, Moment.ANSWER) for prompts in (*fitted, *others)]
    every = [ids for prompts in lists for ids in prompts]
    count = min(MAX_POSITIONS, *map(len, every))
    at_thought: tuple[float, ...] = ()
    if Moment.THOUGHT in model.tokenizer.moments:
        [at_thought] = _scores(model, [ids_before(model, prompts, Moment.THOUGHT) for prompts in (*fitted, *others)], 1)
    positions = tuple(range(-count, 0))
    return Separation(
        positions,
        tuple(range(model.model_map.n_layers)),
        tuple(_common_token(model, every, position) for position in positions),
        {"harmful": len(others[0]), "harmless": len(others[1])},
        _scores(model, lists, count),
        at_thought,
    )


def _scores(model: ChatModel, lists: Sequence[Sequence[Ids]], count: int) -> tuple[tuple[float, ...], ...]:
    """The separation at each of the last ``count`` positions and each layer.

    Args:
        lists: harmful and harmless fit prompts, then harmful and harmless held-out ones.
    """
    harmful, harmless, *others = lists
    directions = _means(model, harmful, count) - _means(model, harmless, count)  # their lengths do not matter
    projections = [_projections(model, prompts, directions) for prompts in others]
    return tuple(
        tuple(round(d_prime(*(each[:, layer, place] for each in projections)), 4) for layer in range(len(directions)))
        for place in range(count)
    )


def _common_token(model: ChatModel, prompts: Sequence[Ids], position: int) -> str:
    found = {ids[position] for ids in prompts}
    return model.tokenizer.marked_text([found.pop()]) if len(found) == 1 else ""


def _means(model: ChatModel, prompts: Sequence[Ids], count: int) -> Tensor:
    """The mean residual stream at the last positions, float64 ``[layers, count, d_model]``."""

    def run() -> Tensor:
        total = torch.zeros(model.model_map.n_layers, count, model.model_map.d_model, dtype=torch.float64)

        def add(layer: int, rows: tuple[int, ...], hidden: Tensor) -> None:
            total[layer] += hidden.sum(0)

        _visit(model, prompts, count, add)
        return total / len(prompts)

    found: Tensor = model.retry_smaller(run)
    return found


def _projections(model: ChatModel, prompts: Sequence[Ids], directions: Tensor) -> Tensor:
    """The component of each prompt along ``directions`` ``[layers, count, d_model]``: ``[prompts, layers, count]``."""

    def run() -> Tensor:
        out = torch.zeros(len(prompts), *directions.shape[:2], dtype=torch.float64)

        def project(layer: int, rows: tuple[int, ...], hidden: Tensor) -> None:
            out[list(rows), layer] = (hidden * directions[layer]).sum(-1)

        _visit(model, prompts, directions.shape[1], project)
        return out

    found: Tensor = model.retry_smaller(run)
    return found


def _visit(model: ChatModel, prompts: Sequence[Ids], count: int, visit: Visit) -> None:
    """Call ``visit`` with each layer, each batch's rows, and its last ``count`` outputs ``[rows, count, d_model]``."""
    last = model.model_map.n_layers - 1
    batches = list(model.batches(prompts))

    def work(batch: Batch) -> None:
        def hook(layer: int) -> Callable[..., None]:
            def keep(module: Any, args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                visit(layer, batch.rows, hidden[:, -count:].detach().to("cpu").double())

            return model.scoped(keep)

        handles = [model.layer(n).register_forward_hook(hook(n)) for n in range(last + 1)]
        try:
            model.run_to_layer(batch, last)
        finally:
            for handle in handles:
                handle.remove()

    for _ in model.in_step([partial(work, batch) for batch in batches], [batch.ids.numel() for batch in batches]):
        pass

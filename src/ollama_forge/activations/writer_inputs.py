"""What residual writers take in, on harmful and on harmless prompts: the statistics that least squares is fitted to.

Of harmful prompts the last positions are kept; of harmless ones the last positions and some from anywhere, each half of
the weight. The first token of a prompt is never among them: it is an attention sink of huge norm. For a writer with
fewer inputs than there are samples the harmless ones are folded into a second moment as they come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.text.tokenizer import Ids

LAST_POSITIONS = 4
BUDGET = 2 << 30
_BYTES = 4


@dataclass(frozen=True)
class WriterInputs:
    """Inputs of one writer, float32.

    Attributes:
        harmful: ``[samples, in]`` at the last positions of harmful prompts.
        harmless_last_mean: ``[in]``, at the last positions of harmless ones.
        harmless_moment: ``[in, in]`` weighted second moment of harmless inputs, or None where rows are kept.
        harmless_rows: ``[samples, in]``, each scaled so that ``rows.T @ rows`` is that moment; None where it is folded.
    """

    harmful: Tensor
    harmless_last_mean: Tensor
    harmless_moment: Tensor | None
    harmless_rows: Tensor | None


@dataclass(frozen=True)
class _Pick:
    """For each prompt the positions kept, and the weight of each in the second moment."""

    positions: list[list[int]]
    weights: list[list[float]]
    last: int

    @property
    def count(self) -> int:
        return sum(map(len, self.positions))


def gather_writer_inputs(
    model: ChatModel,
    writers: Sequence[Matrix],
    harmful: Sequence[Ids],
    harmless: Sequence[Ids],
    *,
    budget: int = BUDGET,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, WriterInputs]]:
    """Yield the inputs of groups of writers by tensor name: all at once where they fit ``budget`` bytes.

    Each group costs one pass over the prompts, up to its deepest layer.
    """
    bad = _pick_last(harmful)
    good = _pick_harmless(harmless, seed)
    for group in _groups(writers, bad.count, good.count, budget):
        yield _gather_group(model, group, (harmful, bad), (harmless, good), progress)


def _pick_last(prompts: Sequence[Ids]) -> _Pick:
    positions = [list(range(max(1, len(ids) - LAST_POSITIONS), len(ids))) for ids in prompts]
    count = sum(map(len, positions))
    return _Pick(positions, [[1 / count] * len(row) for row in positions], LAST_POSITIONS)


def _pick_harmless(prompts: Sequence[Ids], seed: int) -> _Pick:
    """The last positions, weighing half, and a seeded draw of positions from anywhere, weighing the other half."""
    drawn = random.Random(seed)
    last = _pick_last(prompts).positions
    anywhere = [drawn.sample(range(1, len(ids)), min(2 * LAST_POSITIONS, len(ids) - 1)) for ids in prompts]
    counts = sum(map(len, last)), sum(map(len, anywhere))
    positions = [a + b for a, b in zip(last, anywhere, strict=True)]
    weights = [[0.5 / counts[0]] * len(a) + [0.5 / counts[1]] * len(b) for a, b in zip(last, anywhere, strict=True)]
    return _Pick(positions, weights, LAST_POSITIONS)


def folds(in_features: int, samples: int) -> bool:
    """Whether a second moment is smaller than the rows it is made of; where it isn't, the solve is in the dual."""
    return in_features <= samples


def _size(writer: Matrix, bad: int, good: int) -> int:
    width = writer.in_features
    return _BYTES * width * (bad + 1 + (width if folds(width, bad + good) else good))


def _groups(writers: Sequence[Matrix], bad: int, good: int, budget: int) -> Iterator[list[Matrix]]:
    group: list[Matrix] = []
    size = 0
    for writer in writers:
        own = _size(writer, bad, good)
        if group and size + own > budget:
            yield group
            group, size = [], 0
        group.append(writer)
        size += own
    if group:
        yield group


class _Collector:
    """Takes one writer's inputs as batches pass."""

    def __init__(self, writer: Matrix, bad: int, good: int, device: torch.device) -> None:
        width = writer.in_features
        self.harmful: list[Tensor] = []
        self.last_sum = torch.zeros(width, dtype=torch.float64)
        self.last_count = 0
        self.moment = torch.zeros(width, width, device=device) if folds(width, bad + good) else None
        self.rows: list[Tensor] = []

    def add_harmless(self, rows: Tensor, weights: Tensor, is_last: Tensor) -> None:
        self.last_sum += rows[is_last].cpu().double().sum(0)
        self.last_count += int(is_last.sum())
        scaled = rows * weights.sqrt().unsqueeze(-1)
        if self.moment is not None:
            self.moment.addmm_(scaled.T, scaled)
        else:
            self.rows.append(scaled.cpu())

    def finish(self) -> WriterInputs:
        return WriterInputs(
            torch.cat(self.harmful),
            (self.last_sum / max(self.last_count, 1)).float(),
            None if self.moment is None else self.moment.cpu(),
            torch.cat(self.rows) if self.rows else None,
        )


def _gather_group(
    model: ChatModel,
    group: list[Matrix],
    harmful: tuple[Sequence[Ids], _Pick],
    harmless: tuple[Sequence[Ids], _Pick],
    progress: Callable[[int], None] | None,
) -> dict[str, WriterInputs]:
    deepest = max(writer.layer or 0 for writer in group)
    result: dict[str, WriterInputs] = {}

    def work() -> None:
        collectors = {w.tensor: _Collector(w, harmful[1].count, harmless[1].count, model.device) for w in group}
        for (prompts, pick), is_harmful in ((harmful, True), (harmless, False)):
            for batch in model.batches(prompts):
                index = _places(batch.rows, batch.ids.shape[1], prompts, pick)
                with _inputs(model, group, index) as seen:
                    model.run_to_layer(batch, deepest)
                for name, rows in seen.items():
                    if is_harmful:
                        collectors[name].harmful.append(rows.cpu())
                    else:
                        collectors[name].add_harmless(rows, index.weight.to(rows.device), index.is_last)
                if progress:
                    progress(len(batch.rows))
        result.update({name: collector.finish() for name, collector in collectors.items()})

    model.retry_smaller(work)
    return result


@dataclass(frozen=True)
class _Places:
    row: Tensor
    column: Tensor
    weight: Tensor
    is_last: Tensor


def _places(rows: Sequence[int], width: int, prompts: Sequence[Ids], pick: _Pick) -> _Places:
    """Where in a left-padded batch the picked positions lie."""
    entries = [
        (place, width - len(prompts[row]) + position, weight, order < pick.last)
        for place, row in enumerate(rows)
        for order, (position, weight) in enumerate(zip(pick.positions[row], pick.weights[row], strict=True))
    ]
    row, column, weight, is_last = zip(*entries, strict=True)
    return _Places(torch.tensor(row), torch.tensor(column), torch.tensor(weight), torch.tensor(is_last))


class _inputs:  # noqa: N801
    """Hooks that keep what writers take in at the picked places, float32, while the block runs."""

    def __init__(self, model: ChatModel, writers: Sequence[Matrix], places: _Places) -> None:
        self.seen: dict[str, Tensor] = {}
        self.places = places
        self.handles = [model.submodule(w).register_forward_pre_hook(self._keeper(w.tensor)) for w in writers]

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.seen[name] = args[0].detach()[self.places.row, self.places.column].float()

        return keep

    def __enter__(self) -> dict[str, Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

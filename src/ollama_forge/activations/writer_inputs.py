"""The inputs of residual writers on harmful and on harmless prompts: the statistics that least squares is fitted to.

Harmful prompts give their last positions. Harmless prompts give their last positions and positions drawn from anywhere,
and each of these two sets has half the weight. The first token of a prompt is never taken, as it is an attention sink
of huge norm: a prompt of one token gives nothing. Where a writer has no more inputs than there are samples, the
harmless inputs are added up in a second moment as they come; else they are kept as rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.text.tokenizer import Ids

LAST_POSITIONS = 4
BUDGET = 2 << 30
_BYTES = 4


@dataclass(frozen=True)
class WriterInputs:
    """Inputs of one writer, float32. The moment lies on the model's device if that is CUDA; all else is on the CPU.

    Attributes:
        harmful: ``[samples, in]`` at the last positions of harmful prompts.
        harmless_last_mean: ``[in]`` mean at the last positions of harmless prompts.
        harmless_moment: ``[in, in]`` weighted second moment of harmless inputs; None where rows are kept.
        harmless_rows: ``[samples, in]``, each scaled so that ``rows.T @ rows`` is that moment; None where the moment
            is kept.
    """

    harmful: Tensor
    harmless_last_mean: Tensor
    harmless_moment: Tensor | None
    harmless_rows: Tensor | None


@dataclass(frozen=True)
class _Pick:
    """The positions taken of each prompt: its last ones, and for harmless prompts ones drawn from anywhere."""

    last: list[list[int]]
    drawn: list[list[int]]

    @property
    def counts(self) -> tuple[int, int]:
        """How many last and how many drawn positions there are in all prompts together."""
        return sum(map(len, self.last)), sum(map(len, self.drawn))


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
    """Yield the inputs of groups of writers by tensor name, as many writers at a time as fit ``budget`` bytes.

    Each group costs one pass over the prompts, up to its deepest layer.

    Raises:
        ForgeError: every harmful, or every harmless, prompt is one token long.
    """
    bad = _Pick(_last(harmful), [[] for _ in harmful])
    good = _Pick(_last(harmless), _drawn(harmless, seed))
    for kind, pick in (("harmful", bad), ("harmless", good)):
        if not pick.counts[0]:
            raise ForgeError(
                f"every {kind} prompt is one token long, and least squares takes no prompt's first token",
                "give longer instructions, or --factors orthogonal",
            )
    for group in _groups(writers, sum(bad.counts), sum(good.counts), budget):
        yield _gather_group(model, group, (harmful, bad), (harmless, good), progress)


def _last(prompts: Sequence[Ids]) -> list[list[int]]:
    return [list(range(max(1, len(ids) - LAST_POSITIONS), len(ids))) for ids in prompts]


def _drawn(prompts: Sequence[Ids], seed: int) -> list[list[int]]:
    drawn = random.Random(seed)
    return [drawn.sample(range(1, len(ids)), min(2 * LAST_POSITIONS, len(ids) - 1)) for ids in prompts]


def folds(in_features: int, samples: int) -> bool:
    """Whether the second moment is smaller than the rows it is made of; where it is not, the dual is solved."""
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
    """Collects one writer's inputs, batch by batch."""

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
            self.moment if self.moment is None or self.moment.device.type == "cuda" else self.moment.cpu(),
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
    samples = sum(harmful[1].counts), sum(harmless[1].counts)
    result: dict[str, WriterInputs] = {}

    def work() -> None:
        collectors = {w.tensor: _Collector(w, *samples, model.device) for w in group}
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
    """Picked places ``[samples]`` in a batch: row, column, weight in the harmless moment, whether a last position."""

    row: Tensor
    column: Tensor
    weight: Tensor
    is_last: Tensor


def _places(rows: Sequence[int], width: int, prompts: Sequence[Ids], pick: _Pick) -> _Places:
    """Where in a left-padded batch the picked positions lie."""
    weights = [0.5 / max(count, 1) for count in pick.counts]
    entries = [
        (place, width - len(prompts[row]) + position, weight, is_last)
        for place, row in enumerate(rows)
        for positions, weight, is_last in ((pick.last[row], weights[0], True), (pick.drawn[row], weights[1], False))
        for position in positions
    ]
    types = (torch.long, torch.long, torch.float32, torch.bool)
    columns = [torch.tensor([entry[n] for entry in entries], dtype=dtype) for n, dtype in enumerate(types)]
    return _Places(*columns)


class _inputs:  # noqa: N801
    """Hooks that keep the writers' inputs at the picked places, float32, while the block runs."""

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

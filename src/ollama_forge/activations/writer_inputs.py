"""Collect the inputs of residual writers on harmful and harmless prompts, to fit least squares to them.

Harmful prompts contribute their last positions. Harmless prompts contribute their last positions and random positions;
each of these two sets has half the weight. The first token of a prompt is excluded, because it is an attention sink of
huge norm; a prompt of one token contributes nothing. If a writer has at most as many input features as there are
samples, the harmless inputs are accumulated in a second moment; otherwise they are kept as rows.
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
BUDGET = 2 << 30  # bytes
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class WriterInputs:
    """Inputs of one writer, float32 on the CPU; only the moment stays on a CUDA device.

    Attributes:
        harmful: ``[samples, in]`` at the last positions of harmful prompts.
        harmless_last_mean: ``[in]``, the mean at the last positions of harmless prompts.
        harmless_moment: ``[in, in]``, the weighted second moment of the harmless inputs; None if rows are kept.
        harmless_rows: ``[samples, in]``, scaled so that ``rows.T @ rows`` is the moment; None if the moment is kept.
    """

    harmful: Tensor
    harmless_last_mean: Tensor
    harmless_moment: Tensor | None
    harmless_rows: Tensor | None


@dataclass(frozen=True)
class _Positions:
    """The sampled positions of each prompt: its last ones and, for harmless prompts, random ones."""

    last: list[list[int]]
    drawn: list[list[int]]

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of last and of random positions in all prompts."""
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
    """Yield the writers' inputs by tensor name, for as many writers at a time as fit ``budget`` bytes.

    Each group of writers needs one pass over the prompts, up to its deepest layer.

    Raises:
        ForgeError: all harmful or all harmless prompts have only one token.
    """
    bad = _Positions(_last_positions(harmful), [[] for _ in harmful])
    good = _Positions(_last_positions(harmless), _drawn_positions(harmless, seed))
    for side, positions in (("harmful", bad), ("harmless", good)):
        if not positions.counts[0]:
            raise ForgeError(
                f"every {side} prompt has only one token, and least squares excludes the first token",
                "give longer instructions, or --factors orthogonal",
            )
    for group in _groups(writers, sum(bad.counts), sum(good.counts), budget):
        yield _gather_group(model, group, (harmful, bad), (harmless, good), progress)


def _last_positions(prompts: Sequence[Ids]) -> list[list[int]]:
    return [list(range(max(1, len(ids) - LAST_POSITIONS), len(ids))) for ids in prompts]


def _drawn_positions(prompts: Sequence[Ids], seed: int) -> list[list[int]]:
    drawn = random.Random(seed)
    return [drawn.sample(range(1, len(ids)), min(2 * LAST_POSITIONS, len(ids) - 1)) for ids in prompts]


def keeps_moment(in_features: int, samples: int) -> bool:
    """Whether to keep the second moment ``[in, in]`` instead of the rows; with rows, the dual problem is solved."""
    return in_features <= samples


def _size(writer: Matrix, bad: int, good: int) -> int:
    width = writer.in_features
    return _BYTES * width * (bad + 1 + (width if keeps_moment(width, bad + good) else good))


def _groups(writers: Sequence[Matrix], bad: int, good: int, budget: int) -> Iterator[list[Matrix]]:
    group: list[Matrix] = []
    size = 0
    for writer in writers:
        needed = _size(writer, bad, good)
        if group and size + needed > budget:
            yield group
            group, size = [], 0
        group.append(writer)
        size += needed
    if group:
        yield group


class _Collector:
    """Accumulates the inputs of one writer over batches."""

    def __init__(self, writer: Matrix, bad: int, good: int, device: torch.device) -> None:
        width = writer.in_features
        self.harmful: list[Tensor] = []
        self.last_sum = torch.zeros(width, dtype=torch.float64)
        self.last_count = 0
        self.moment = torch.zeros(width, width, device=device) if keeps_moment(width, bad + good) else None
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
    harmful: tuple[Sequence[Ids], _Positions],
    harmless: tuple[Sequence[Ids], _Positions],
    progress: Callable[[int], None] | None,
) -> dict[str, WriterInputs]:
    deepest = max(writer.layer or 0 for writer in group)
    samples = sum(harmful[1].counts), sum(harmless[1].counts)
    result: dict[str, WriterInputs] = {}

    def work() -> None:
        collectors = {w.tensor: _Collector(w, *samples, model.device) for w in group}
        for (prompts, positions), is_harmful in ((harmful, True), (harmless, False)):
            for batch in model.batches(prompts):
                index = _batch_positions(batch.rows, batch.ids.shape[1], prompts, positions)
                with _InputHooks(model, group, index) as seen:
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
class _BatchPositions:
    """The sampled positions in a batch, each field ``[samples]``.

    Attributes:
        row: row in the batch.
        column: column in the padded batch.
        weight: weight in the harmless moment.
        is_last: whether it is one of the last positions, not a random one.
    """

    row: Tensor
    column: Tensor
    weight: Tensor
    is_last: Tensor


def _batch_positions(rows: Sequence[int], width: int, prompts: Sequence[Ids], positions: _Positions) -> _BatchPositions:
    """Find the sampled positions in a left-padded batch."""
    weights = [0.5 / max(count, 1) for count in positions.counts]
    entries = [
        (place, width - len(prompts[row]) + position, weight, is_last)
        for place, row in enumerate(rows)
        for chosen, weight, is_last in (
            (positions.last[row], weights[0], True),
            (positions.drawn[row], weights[1], False),
        )
        for position in chosen
    ]
    types = (torch.long, torch.long, torch.float32, torch.bool)
    columns = [torch.tensor([entry[n] for entry in entries], dtype=dtype) for n, dtype in enumerate(types)]
    return _BatchPositions(*columns)


class _InputHooks:
    """Hooks that record the writers' inputs at the sampled positions, float32, inside the block."""

    def __init__(self, model: ChatModel, writers: Sequence[Matrix], positions: _BatchPositions) -> None:
        self.seen: dict[str, Tensor] = {}
        self.positions = positions
        self.handles = [
            model.submodule(w.place).register_forward_pre_hook(self._recording_hook(w.tensor)) for w in writers
        ]

    def _recording_hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.seen[name] = args[0].detach()[self.positions.row, self.positions.column].float()

        return keep

    def __enter__(self) -> dict[str, Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

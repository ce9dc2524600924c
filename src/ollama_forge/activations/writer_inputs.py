"""Collect the inputs of residual writers at sampled positions, to fit least squares to them.

If a writer has at most as many input features as there are samples, the harmless inputs are accumulated in a second
moment; otherwise they are kept as rows. A routed expert sees few of the samples, so its inputs are always kept as rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ollama_forge.activations.matrix_inputs import MatrixInputs, Writer, eager_experts, unseen
from ollama_forge.activations.samples import BatchSamples, Samples
from ollama_forge.architectures.model_map import Matrix
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.models.batching import Batch, batch_of
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.journal import Journal
from ollama_forge.text.tokenizer import Ids

BUDGET = 2 << 30  # bytes
_BYTES = 4  # of a float32
_LEAST_WEIGHT = 1e-12  # of all samples, so that no samples divide by something


@dataclass(frozen=True)
class WriterInputs:
    """Inputs of one writer, or of one expert of a stack, float32 on the CPU; only the moment stays on a CUDA device.

    Attributes:
        harmful: ``[samples, in]`` at the last positions of harmful prompts.
        harmless_last_mean: ``[in]``, the mean at the last positions of harmless prompts; zero if there are none.
        harmless_last: number of last positions of harmless prompts that the writer sees.
        harmless_moment: ``[in, in]``, the weighted second moment of the harmless inputs; None if rows are kept.
        harmless_rows: ``[samples, in]``, scaled so that ``rows.T @ rows`` is the moment; None if the moment is kept.
            The weights add up to 1, for an expert over the positions that are routed to it.
    """

    harmful: Tensor
    harmless_last_mean: Tensor
    harmless_last: int
    harmless_moment: Tensor | None
    harmless_rows: Tensor | None


def gather_writer_inputs(
    model: ChatModel,
    writers: Sequence[Matrix],
    harmful: Samples,
    harmless: Samples,
    *,
    budget: int = BUDGET,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
) -> Iterator[dict[str, list[WriterInputs]]]:
    """Yield the writers' inputs by tensor name, for as many writers at a time as fit ``budget`` bytes.

    A stack of experts has one entry for each of them, any other writer a single one. All experts of a layer come
    together. Each group of writers needs one pass over the sequences, up to its deepest layer; of a streamed model the
    writers of a layer are a group, and all groups come from one pass.

    Args:
        progress: called with the number of newly processed sequences.
        journal: keeps the state of a streamed pass; the groups of the layers before its layer are left out.

    Raises:
        ForgeError: the inputs of a writer cannot be seen.
    """
    if model.streams:
        start = 0 if journal is None else journal.layer
        groups = [group for group in _of_layers(writers) if (group[0].layer or 0) >= start]
        yield from _gather_groups(model, groups, harmful, harmless, progress, journal)
        return
    routed = _routed_share(model, writers, harmless)
    for group in _groups(writers, harmful.total, harmless.total, budget, routed):
        yield model.retry_smaller(partial(_gather_group, model, group, harmful, harmless, progress))


def keeps_moment(in_features: int, samples: int) -> bool:
    """Whether to keep the second moment ``[in, in]`` instead of the rows; with rows, the dual problem is solved."""
    return in_features <= samples


def held_size(writers: Sequence[Matrix], bad: int, good: int, taken: int) -> int:
    """Bytes of the inputs of a layer's writers, at most, as a streamed model gathers them.

    Args:
        bad, good: numbers of harmful and harmless positions.
        taken: number of experts that a token is routed to.
    """
    sizes = []
    for group in _of_layers(writers):
        tensors = len([writer for writer in group if writer.is_expert])
        routed = dict.fromkeys([group[0].layer], taken / max(tensors, 1))
        sizes.append(sum(_size(writer, bad, good, routed) for writer in group))
    return int(max(sizes, default=0))


def units(writers: Iterable[Matrix]) -> list[list[Matrix]]:
    """The writers in order, with all experts of a layer together and every other writer alone."""
    found: dict[object, list[Matrix]] = {}
    for writer in writers:
        found.setdefault(writer.layer if writer.is_expert else writer.tensor, []).append(writer)
    return list(found.values())


def _size(writer: Matrix, bad: int, good: int, routed: Mapping[int | None, float]) -> float:
    """Bytes of a writer's inputs; of all experts together if it is a stack, on average if it is one expert."""
    width = writer.in_features
    if writer.is_expert:
        return _BYTES * width * ((bad + good) * routed[writer.layer] + (writer.shape[0] if writer.experts else 1))
    return _BYTES * width * (bad + 1 + (width if keeps_moment(width, bad + good) else good))


def _groups(
    writers: Sequence[Matrix], bad: int, good: int, budget: int, routed: Mapping[int | None, float]
) -> Iterator[list[Matrix]]:
    """Group units of writers so that the inputs of a group fit the budget."""
    group: list[Matrix] = []
    size = 0.0
    for unit in units(writers):
        needed = sum(_size(writer, bad, good, routed) for writer in unit)
        if group and size + needed > budget:
            yield group
            group, size = [], 0.0
        group += unit
        size += needed
    if group:
        yield group


def _routed_share(model: ChatModel, writers: Sequence[Matrix], samples: Samples) -> dict[int | None, float]:
    """Measure on one batch to how many experts of each layer a position is routed, divided by the tensors of them."""
    experts = [writer for writer in writers if writer.is_expert]
    share: dict[int | None, float] = {}

    def work() -> None:
        if not experts:
            return
        batch = next(model.batches(samples.sequences))
        index = samples.in_batch(batch.rows, batch.ids.shape[1])
        inputs = MatrixInputs(model, experts, index.flat, batch.ids.numel())
        with inputs.recording():
            model.run_to_layer(batch, max(writer.layer or 0 for writer in experts))
        for layer in {writer.layer for writer in experts}:
            names = {writer.tensor for writer in experts if writer.layer == layer}
            rows = sum(len(taken) for (name, _), taken, _ in inputs if name in names)
            share[layer] = rows / max(len(index.flat), 1) / len(names)

    model.retry_smaller(work)
    return share


class _Collector:
    """Accumulates the inputs of one writer over batches."""

    def __init__(self, writer: Matrix, samples: int, device: torch.device) -> None:
        self.width, self.device = writer.in_features, device
        self.harmful: list[Tensor] = []
        self.last_sum = torch.zeros(self.width, dtype=torch.float64)
        self.last_count, self.weight = 0, 0.0
        keeps = keeps_moment(self.width, samples) and not writer.is_expert
        self.moment = torch.zeros(self.width, self.width, device=device) if keeps else None
        self.rows: list[Tensor] = []

    def add_harmless(self, rows: Tensor, weights: Tensor, is_last: Tensor) -> None:
        self.last_sum += rows[is_last].cpu().double().sum(0)
        self.last_count += int(is_last.sum())
        self.weight += float(weights.sum())
        scaled = rows * weights.sqrt().unsqueeze(-1)
        if self.moment is not None:
            self.moment.addmm_(scaled.T, scaled)
        else:
            self.rows.append(scaled.cpu())

    def finish(self) -> WriterInputs:
        none = torch.zeros(0, self.width)
        rows = None
        if self.moment is None:
            rows = torch.cat([none, *self.rows]).div_(max(self.weight, _LEAST_WEIGHT) ** 0.5)
            self.rows.clear()
        else:
            self.moment /= max(self.weight, _LEAST_WEIGHT)
        return WriterInputs(
            torch.cat([none, *self.harmful]),
            (self.last_sum / max(self.last_count, 1)).float(),
            self.last_count,
            self.moment if self.moment is None or self.moment.device.type == "cuda" else self.moment.cpu(),
            rows,
        )


def _gather_group(
    model: ChatModel,
    group: list[Matrix],
    harmful: Samples,
    harmless: Samples,
    progress: Callable[[int], None] | None,
) -> dict[str, list[WriterInputs]]:
    return next(_gather_groups(model, [group], harmful, harmless, progress))


def _gather_groups(
    model: ChatModel,
    groups: Sequence[list[Matrix]],
    harmful: Samples,
    harmless: Samples,
    progress: Callable[[int], None] | None,
    journal: Journal | None = None,
) -> Iterator[dict[str, list[WriterInputs]]]:
    """The inputs of each group of writers, in rising order of their layers, from one pass over the sequences."""
    writers = [writer for group in groups for writer in group]
    if not writers:
        return
    deepest = max(writer.layer or 0 for writer in writers)
    total = harmful.total + harmless.total
    collectors: dict[Writer, _Collector] = {}
    seen: list[tuple[Samples, BatchSamples, list[tuple[Writer, Tensor, Tensor]]]] = []

    def add_seen() -> None:
        """Add what streamed batches have seen, in this thread: MKL keeps memory for each that multiplies floats."""
        for found in seen:
            add(*found)
        seen.clear()

    def add(samples: Samples, index: BatchSamples, inputs: Iterable[tuple[Writer, Tensor, Tensor]]) -> None:
        for writer, rows, chosen in inputs:
            collector = collectors.get(writer)
            if collector is None:  # a module that a later layer runs too
                continue
            if samples is harmful:
                collector.harmful.append(rows.cpu())
            else:
                rows, chosen = rows.to(collector.device), chosen.to(collector.device)
                weights, is_last = index.weight.to(rows.device)[chosen], index.is_last.to(rows.device)[chosen]
                collector.add_harmless(rows, weights, is_last)

    def work(samples: Samples, batch: Batch) -> None:
        index = samples.in_batch(batch.rows, batch.ids.shape[1])
        inputs = MatrixInputs(model, writers, index.flat, batch.ids.numel())

        def take(*_: object) -> None:
            if model.streams:
                seen.append((samples, index, list(inputs)))
            else:
                add(samples, index, inputs)
            inputs.clear()

        with ExitStack() as stack:
            for layer in {writer.layer or 0 for writer in writers}:
                hook = model.scoped(take)
                stack.callback(model.layer(layer).register_forward_hook(hook).remove)
            stack.enter_context(inputs.recording())
            model.run_to_layer(batch, deepest)
        if progress:
            progress(len(batch.rows))

    def gather_from_copies() -> Iterator[int]:
        """The number of layers that all batches have passed, at the end."""
        assert model.copies is not None
        indices = [samples.in_batch(batch.rows, batch.ids.shape[1]) for samples, batch in batches]
        pieces = [
            _Piece(writers, [samples.sequences[row] for row in batch.rows], index.flat, deepest)
            for (samples, batch), index in zip(batches, indices, strict=True)
        ]
        found = model.copies.map(_inputs_of, pieces)
        for (samples, batch), index, inputs in zip(batches, indices, found, strict=True):
            add(samples, index, inputs)
            if progress:
                progress(len(batch.rows))
        yield model.model_map.n_layers

    waiting = list(groups)

    def begin() -> None:
        for writer in waiting[0] if waiting else ():
            for expert in experts_of(writer):
                device = model.device_of(model.submodule(writer.place))
                collectors[writer.tensor, expert] = _Collector(writer, total, device)

    begin()
    batches = [(samples, batch) for samples in (harmful, harmless) for batch in model.batches(samples.sequences)]
    works = [partial(work, samples, batch) for samples, batch in batches]
    routes = any(matrix.is_expert for matrix in model.model_map.matrices)
    with eager_experts(model.module) if routes else nullcontext():  # for all batches, as they may run side by side
        tokens = [batch.ids.numel() for _, batch in batches]
        steps = model.in_step(works, tokens, journal) if model.copies is None else gather_from_copies()
        for passed in steps:
            add_seen()
            while waiting and max(writer.layer or 0 for writer in waiting[0]) < passed:
                group = waiting.pop(0)
                found = {key: collectors.pop(key).finish() for key in list(collectors)}
                result = {w.tensor: [found.pop((w.tensor, e)) for e in experts_of(w)] for w in group}
                _check_seen(group, result)
                yield result
                del result  # before the collectors of the next group take as much
                begin()


@dataclass(frozen=True)
class _Piece:
    """A batch of sequences for a copy of the model.

    Attributes:
        positions: indices ``[samples]`` into the flattened tokens of the padded batch.
        deepest: the layer to run to.
    """

    writers: Sequence[Matrix]
    sequences: list[Ids]
    positions: Tensor
    deepest: int


def _inputs_of(model: ChatModel, piece: _Piece) -> list[tuple[Writer, Tensor, Tensor]]:
    """What ``MatrixInputs`` sees in one batch, on the CPU."""
    batch = batch_of(piece.sequences, model.tokenizer.pad_id, model.device)
    inputs = MatrixInputs(model, piece.writers, piece.positions, batch.ids.numel())
    routes = any(matrix.is_expert for matrix in model.model_map.matrices)
    with eager_experts(model.module) if routes else nullcontext(), inputs.recording():
        model.run_to_layer(batch, piece.deepest)
    return [(writer, rows.cpu(), chosen.cpu()) for writer, rows, chosen in inputs]


def _of_layers(writers: Sequence[Matrix]) -> list[list[Matrix]]:
    """The writers of each layer, in rising order."""
    found: dict[int, list[Matrix]] = {}
    for writer in writers:
        found.setdefault(writer.layer or 0, []).append(writer)
    return [found[layer] for layer in sorted(found)]


def _check_seen(group: Sequence[Matrix], result: Mapping[str, list[WriterInputs]]) -> None:
    """Raise ForgeError if a writer, or every expert of a layer, saw no harmful prompt."""
    seen = {(w.layer, w.is_expert or w.tensor) for w in group if any(len(i.harmful) for i in result[w.tensor])}
    for writer in group:
        if (writer.layer, writer.is_expert or writer.tensor) not in seen:
            raise unseen(writer)

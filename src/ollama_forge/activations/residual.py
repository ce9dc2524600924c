"""Collect the residual stream at the output of decoder layers, at one position of the templated prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.batching import Batch, batch_of
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.protocol import ModelCopies
from ollama_forge.text.tokenizer import Ids


@dataclass(frozen=True)
class ResidualStats:
    """Activations of the residual stream on a list of prompts.

    Attributes:
        layers: numbers of the layers, ascending.
        mean: mean over the prompts, float64 ``[len(layers), d_model]``.
        samples: float32 ``[prompts, len(layers), d_model]``; None without ``keep_samples``.
        lengths: number of tokens of each prompt.
    """

    layers: tuple[int, ...]
    mean: Tensor
    samples: Tensor | None
    lengths: tuple[int, ...]

    def of_layer(self, layer: int) -> Tensor:
        """The mean of one layer, ``[d_model]``."""
        return self.mean[self.layers.index(layer)]


def require_position(lists: Iterable[Sequence[Ids]], position: int) -> None:
    """Raise UsageError if a templated prompt is too short to have a position, counted from its end."""
    if position >= 0 or any(len(prompt) < -position for prompts in lists for prompt in prompts):
        raise UsageError(
            f"not every templated prompt has the position {position}",
            "positions count from the end: -1 is the last token",
        )


def gather_residuals(
    model: ChatModel,
    prompts: Sequence[Ids],
    layers: Sequence[int],
    *,
    position: int = -1,
    keep_samples: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ResidualStats:
    """The statistics of one list of prompts; see ``gather_residuals_of``.

    Args:
        keep_samples: keep the activations of every prompt.
    """
    return gather_residuals_of(
        model, [prompts], layers, position=position, keep_samples=[keep_samples], progress=progress
    )[0]


def gather_residuals_of(
    model: ChatModel,
    lists: Sequence[Sequence[Ids]],
    layers: Sequence[int],
    *,
    position: int = -1,
    keep_samples: Sequence[bool] = (),
    progress: Callable[[int], None] | None = None,
) -> list[ResidualStats]:
    """Run lists of prompts up to the deepest of ``layers`` and record the output of each layer at one position.

    Args:
        position: counted from the end of the prompt; -1 is the last token.
        keep_samples: for each list, whether to keep the activations of every prompt; none by default.
        progress: called with the number of newly processed prompts.

    Returns:
        the statistics of each list.

    Raises:
        UsageError: ``position`` is not negative, or a prompt is shorter than that.
        ForgeError: the model computes NaN or infinite values.
    """
    require_position(lists, position)
    layers = sorted(set(layers))
    keeps = [*keep_samples, *[False] * len(lists)][: len(lists)]

    def run() -> list[_Sums]:
        sums = [_Sums.of(model, len(prompts), layers, keep) for prompts, keep in zip(lists, keeps, strict=True)]
        batches = [
            (own, prompts, batch) for own, prompts in zip(sums, lists, strict=True) for batch in model.batches(prompts)
        ]

        def work(own: _Sums, batch: Batch) -> None:
            with own.recording(model, batch, position):
                model.run_to_layer(batch, layers[-1])
            if progress:
                progress(len(batch.rows))

        if model.copies is not None:
            for count in _add_from_copies(model.copies, batches, layers, position):
                if progress:
                    progress(count)
            return sums
        key = {"pass": "residuals", "ids": list(lists), "layers": layers, "position": position, "samples": keeps}
        journal = model.journal(key)
        if journal is not None:
            _restore(sums, journal.kept)
            journal.statistics = partial(_statistics, sums)
        works = [partial(work, own, batch) for own, _, batch in batches]
        for _ in model.in_step(works, [batch.ids.numel() for *_, batch in batches], journal):
            pass
        if journal is not None:
            journal.remove()
        return sums

    found: list[_Sums] = model.retry_smaller(run)
    if not all(torch.isfinite(own.total).all() for own in found):
        raise ForgeError(
            "the model computes NaN or infinite values",
            "try --dtype float32; if that fails too, the weights are damaged",
        )
    return [
        ResidualStats(tuple(layers), own.total / len(prompts), own.samples, tuple(map(len, prompts)))
        for own, prompts in zip(found, lists, strict=True)
    ]


@dataclass(frozen=True)
class _Sums:
    """Sums over the prompts of one list, float64 ``[layers, d_model]``, and the samples if they are kept."""

    layers: Sequence[int]
    total: Tensor
    samples: Tensor | None

    @classmethod
    def of(cls, model: ChatModel, prompts: int, layers: Sequence[int], keep: bool) -> _Sums:
        width = model.model_map.d_model
        samples = torch.empty(prompts, len(layers), width) if keep else None
        return cls(layers, torch.zeros(len(layers), width, dtype=torch.float64), samples)

    def add(self, rows: Sequence[int], part: _Sums) -> None:
        """Add the sums over a batch of the prompts ``rows``."""
        self.total.add_(part.total)
        if self.samples is not None and part.samples is not None:
            self.samples[list(rows)] = part.samples

    @contextmanager
    def recording(self, model: ChatModel, batch: Batch, position: int) -> Iterator[None]:
        """Inside, add the outputs of the layers for a batch."""

        def hook(index: int) -> Callable[..., None]:
            def add(module: nn.Module, args: Any, output: Any) -> None:
                hidden: Tensor = output[0] if isinstance(output, tuple) else output
                values = hidden[:, position].detach().to("cpu", copy=True)
                self.total[index] += values.double().sum(0)
                if self.samples is not None:
                    self.samples[list(batch.rows), index] = values.float()

            return model.scoped(add)

        handles = [model.layer(layer).register_forward_hook(hook(n)) for n, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Piece:
    """A batch of prompts for a copy of the model, and what to record of it."""

    prompts: list[Ids]
    layers: Sequence[int]
    position: int
    keep_samples: bool


def _sums_of(model: ChatModel, piece: _Piece) -> _Sums:
    own = _Sums.of(model, len(piece.prompts), piece.layers, piece.keep_samples)
    batch = batch_of(piece.prompts, model.tokenizer.pad_id, model.device)
    with own.recording(model, batch, piece.position):
        model.run_to_layer(batch, piece.layers[-1])
    return own


def _add_from_copies(
    copies: ModelCopies,
    batches: Sequence[tuple[_Sums, Sequence[Ids], Batch]],
    layers: Sequence[int],
    position: int,
) -> Iterator[int]:
    """Have copies of the model run the batches, and add to the sums; yields the numbers of newly run prompts."""
    pieces = [
        _Piece([prompts[row] for row in batch.rows], layers, position, own.samples is not None)
        for own, prompts, batch in batches
    ]
    for (own, _, batch), part in zip(batches, copies.map(_sums_of, pieces), strict=True):
        own.add(batch.rows, part)
        yield len(batch.rows)


def _statistics(sums: Sequence[_Sums]) -> dict[str, Tensor]:
    totals = {f"total.{number}": own.total for number, own in enumerate(sums)}
    return totals | {f"samples.{number}": own.samples for number, own in enumerate(sums) if own.samples is not None}


def _restore(sums: Sequence[_Sums], kept: Mapping[str, Tensor]) -> None:
    """Continue with the sums of an interrupted pass; those of the layers that have not run are zero."""
    for name, values in _statistics(sums).items():
        if name in kept:
            values.copy_(kept[name])

"""The readers of a block: whose input changes when the stream is nudged, and which axis of which parameter reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.architectures.calls import STILL, parallel, rows
from ollama_forge.architectures.learned import Gap, NormFound, RoleFound
from ollama_forge.architectures.roles.axes import expert_axis, input_axes, is_linear
from ollama_forge.architectures.roles.norms import measured_norms, name_norm, norm_passed
from ollama_forge.architectures.roles.paths import Paths
from ollama_forge.architectures.roles.region import Held, Region, Replay

_COMPARED = 16  # tokens of an input that are compared with a norm's output


@dataclass(frozen=True)
class _Source:
    """Where an input comes from: the stream, or a norm of it; and the first channels of the copies of the stream."""

    norm: NormFound | None
    stream_at: tuple[int, ...] = (0,)


class Readers:
    """Finds the readers of one block. ``find`` yields what it finds and what it cannot explain.

    Args:
        region: the region of the block.
        points: the stream at the points where the block may take it from: its input, and the first block's.
    """

    def __init__(self, region: Region, paths: Paths, d_model: int, points: tuple[Tensor, ...]) -> None:
        self.region, self.paths, self.d, self.points = region, paths, d_model, points
        self.generator = torch.Generator().manual_seed(5)
        self.parameters = paths.named(region.modules)
        self.norms = measured_norms(region, lambda width: width % d_model == 0)

    def find(self) -> Iterator[RoleFound | Gap]:
        size = float(self.points[0].abs().mean())
        nudge = torch.randn(self.d, generator=self.generator) * size
        answer = self.region.replay(stream_nudge=nudge, watch=self.region.held)
        yield from self._carried(answer, nudge)
        for held in self.region.held:
            yield from self._site(held, answer, nudge)

    def _carried(self, answer: Replay, nudge: Tensor) -> Iterator[Gap]:
        """Whether the block hands the stream on as it is, up to a factor for each token."""
        change = rows(answer.stream - self.region.stream)
        if float(change.abs().max()) < STILL * float(nudge.abs().max()):
            yield Gap(self.region.module, "stream", "it does not hand the stream on")
        elif parallel(change, nudge) is None:
            norm = norm_passed(self.region, self.norms, answer, change, nudge)
            how = "norms, mixes or scales its channels" if norm is None else f"norms it ({self.paths.module(norm)})"
            yield Gap(self.region.module, "stream", f"it does not hand the stream on as it is, but {how}")

    def _site(self, held: Held, answer: Replay, nudge: Tensor) -> Iterator[RoleFound | Gap]:
        for key, was in self.region.held[held][0].inputs.items():
            now = answer.calls[held][0].inputs.get(key)
            if now is None or now.shape != was.shape:
                continue
            change = now - was
            if float(change.abs().max()) < STILL * float(was.abs().max()):
                continue
            source = self._source(was, change, answer, nudge)
            if source is None:
                reason = "it reads the stream, but not as it is and not through a norm that can be measured"
                yield Gap(self.paths.module(held.module), "readers", reason)
                continue
            if isinstance(source, Gap):
                yield source
                continue
            found = list(self._parameters(held, key, source))
            if not found:
                yield Gap(
                    self.paths.module(held.module),
                    "readers",
                    "it reads the stream, but along no axis of its parameters",
                )
            yield from found

    def _source(self, was: Tensor, change: Tensor, answer: Replay, nudge: Tensor) -> _Source | Gap | None:
        """Where an input comes from, by how it changed; None if nothing in the block changed like it."""
        if was.shape[-1] == self.d and parallel(change, nudge) is not None:
            return _Source(None)
        for module, norm in self.norms.items():
            for (was_in, was_out), (now_in, now_out) in zip(
                self.region.passed[module], answer.passed.get(module, []), strict=False
            ):
                if was_out.shape[-1] != was.shape[-1] or not _same_rows(change, now_out - was_out):
                    continue
                found = name_norm(norm, module, self.paths.module(module), self.parameters)
                if found is None:
                    reason = "the gain or bias of this norm before a reader is no parameter's"
                    return Gap(self.paths.module(module), "readers", reason)
                copies = self._copies(was_in, now_in - was_in, nudge)
                return _Source(found, copies) if copies else None
        copies = self._copies(was, change, nudge)
        return _Source(None, copies) if copies else None

    def _copies(self, was: Tensor, change: Tensor, nudge: Tensor) -> tuple[int, ...]:
        """The first channels of the copies of the stream in a tensor ``[..., n d]``."""
        if was.shape[-1] % self.d:
            return ()
        firsts = range(0, was.shape[-1], self.d)
        return tuple(first for first in firsts if self._is_stream(was, change, first, nudge))

    def _is_stream(self, was: Tensor, change: Tensor, first: int, nudge: Tensor) -> bool:
        """Whether ``d`` channels move with the nudge, or are the stream at another point."""
        part, moved = was[..., first : first + self.d], change[..., first : first + self.d]
        if float(moved.abs().max()) > STILL * float(nudge.abs().max()):
            return parallel(moved, nudge) is not None
        return any(
            point.numel() == part.numel() and torch.allclose(point.reshape(-1), part.reshape(-1), atol=1e-5)
            for point in self.points
        )

    def _parameters(self, held: Held, key: int | str, source: _Source) -> Iterator[RoleFound]:
        for weight, axis, bias in input_axes(self.region, held, key):
            yield RoleFound(
                self.paths.parameter(weight),
                self.paths.module(held.module),
                writes=False,
                axis=axis,
                expert_axis=expert_axis(self.region, held, weight, axis),
                block=self.region.block,
                norms=(source.norm,) if source.norm is not None else (),
                stream_at=source.stream_at,
                linear=is_linear(held, self.region.held[held], weight, bias),
                bias=self.paths.parameter(bias) if bias is not None else None,
            )


def _same_rows(change: Tensor, norm_change: Tensor) -> bool:
    """Whether each row of a change is a multiple of some row of a norm's change (experts get some tokens only)."""
    mine, norms = rows(change), rows(norm_change)
    mine = mine[mine.norm(dim=1) > 1e-6 * mine.norm(dim=1).max()][:_COMPARED]
    mine = mine / mine.norm(dim=1, keepdim=True)
    norms = norms / (norms.norm(dim=1, keepdim=True) + 1e-30)
    return bool(((mine @ norms.T).abs().max(dim=1).values > 1 - 1e-6).all())

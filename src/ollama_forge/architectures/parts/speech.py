"""One writer that speaks alone in a block, and how its output answers when the output of a reader is nudged.

A reader is nudged at one token by a rank-one change ``c u^T`` of its parameter, where ``u`` is orthogonal to the
reader's input at every other token. This works for a matrix of any module, also where a fused module reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.architectures.learned import RoleFound
from ollama_forge.architectures.parts.solo import Solo
from ollama_forge.architectures.roles.region import nudged

_MOVED = 1e-4  # of the largest change
_ROUNDING = 1e-5  # of the writer's output: float32 rounding stays below
_BENT = 1e-3  # second difference, of the first one: what is linear shows rounding alone
_NUDGE = 2.0  # of a reader's rms output: crosses the bend of a ReLU, mostly stays below a clamp
_FEW = 8  # units of one expert: enough that a ReLU leaves some of them on
_GOLDEN = 0.6180339887


@dataclass(frozen=True)
class Response:
    """How a writer answers when a reader's output is nudged at one token.

    Attributes:
        here: it moves at that token.
        elsewhere: it moves at other tokens.
        linear: it moves in proportion to the nudge.
        first: a nudge at the first token, which sees no other, moves it there.
        first_linear: it does so in proportion to the nudge.
    """

    here: bool
    elsewhere: bool
    linear: bool
    first: bool
    first_linear: bool


class Speech:
    """What a writer says alone in a block; made while it speaks.

    Attributes:
        spoken: what it says ``[tokens, n]``, float64.
    """

    def __init__(
        self, solo: Solo, block: int, writer: RoleFound, inputs: Mapping[str, Tensor], *, at_module: bool
    ) -> None:
        """``at_module``: listen to its module, where it gives a vector a token, instead of the stream."""
        self.solo, self.block, self.writer, self._inputs = solo, block, writer, inputs
        self._module = writer.module if at_module and solo.output(block, writer.module) is not None else None
        self.spoken = self._listen()

    def _listen(self, *, changed: bool = False) -> Tensor:
        output = self.solo.output(self.block, self._module, changed=changed) if self._module else None
        return self.solo.contribution(self.block, changed=changed) if output is None else output

    def mixes(self) -> bool:
        """Whether it says something else at other tokens after one token of the text is changed."""
        moved = moved_tokens(self._listen(changed=True) - self.spoken)
        moved[self.solo.changed] = False
        return bool(moved.any())

    def moves(self, reader: RoleFound) -> bool:
        """Whether it depends on the reader. Each token has a nudge of its own: one for all keys would cancel."""
        if reader.parameter not in self._inputs:
            return False
        each = {token: self.all_rows(reader, seed=token) for token in range(self.solo.tokens)}
        return bool(self._answer(reader, each).abs().max() > _MOVED * self.spoken.abs().max())

    def response(self, reader: RoleFound, row: Tensor) -> Response:
        """How it answers to the nudge ``row`` ``[rows]``."""
        token, rounding = self.solo.changed, _ROUNDING * float(self.spoken.abs().max())
        up, down = (self._answer(reader, {token: sign * row}) for sign in (1, -1))
        moved = up.abs().amax(dim=1) > max(_MOVED * float(up.abs().max()), rounding)
        here = bool(moved[token])
        moved[token] = False
        first_up, first_down = (self._answer(reader, {0: sign * row})[0] for sign in (1, -1))
        first = bool(first_up.abs().max() > _ROUNDING * self.spoken[0].abs().max())
        return Response(here, bool(moved.any()), _linear(up, down), first, first and _linear(first_up, first_down))

    def has_query_rows(self, reader: RoleFound) -> bool:
        """Whether some rows of a reader move it at their own token alone, and not at the first token."""
        count, size = self.rows(reader), self._size(reader)
        responses = (self.response(reader, _one_hot(count, row, size)) for row in spread(count, 9))
        return any(answer.here and not answer.elsewhere and not answer.first for answer in responses)

    def linear_rows(self, reader: RoleFound) -> dict[int, bool]:
        """Whether it moves in proportion to rows of a reader, where it does not mix: one row at each token."""
        tokens, count, size = self.solo.tokens, self.rows(reader), self._size(reader)
        rows = spread(count, 2 * tokens)
        linear: dict[int, bool] = {}
        for chosen in (rows[:tokens], rows[tokens:]):
            each = {token: _one_hot(count, row, size) for token, row in enumerate(chosen)}
            if each:
                up = self._answer(reader, each)
                down = self._answer(reader, {token: -row for token, row in each.items()})
                moved = moved_tokens(up)[: len(chosen)].nonzero().flatten().tolist()
                linear |= {chosen[token]: _linear(up[token], down[token]) for token in moved}
        return linear

    def weighers(self, readers: Mapping[int, RoleFound]) -> set[int]:
        """The readers that weigh experts: nudged, they scale what a few units of one expert say at each token."""
        parameter = self.solo.parameters[self.writer.parameter]
        full, all_spoken = parameter.detach().clone(), self.spoken
        with torch.no_grad():
            try:
                for kept in _few_units(parameter, self.writer):
                    parameter.copy_(full * kept)
                    self.spoken = self._listen()
                    if int(moved_tokens(self.spoken).sum()) >= min(3, self.solo.tokens):
                        break
                return {number for number, reader in readers.items() if self._weighs(reader)}
            finally:
                parameter.copy_(full)
                self.spoken = all_spoken

    def _weighs(self, reader: RoleFound) -> bool:
        nudge = 0.3 * self.all_rows(reader)  # small, so that most tokens keep their experts
        moved = self.spoken + self._answer(reader, dict.fromkeys(range(self.solo.tokens), nudge))
        return _parallel(self.spoken, moved) or self._one_row_an_expert(reader)

    def _one_row_an_expert(self, reader: RoleFound) -> bool:
        """Llama 4's router scales what its experts take in, and so turns what they give."""
        axis = self.writer.expert_axis
        stack = self.solo.parameters[self.writer.parameter].shape
        return axis is not None and reader.expert_axis is None and self.rows(reader) == stack[axis]

    # nudges

    def rows(self, reader: RoleFound) -> int:
        """Size of a reader's output; of one expert, if it is a stack."""
        shape = self.solo.parameters[reader.parameter].shape
        experts = 1 if reader.expert_axis is None else shape[reader.expert_axis]
        return shape.numel() // shape[reader.axis] // experts

    def all_rows(self, reader: RoleFound, seed: int = 0) -> Tensor:
        """A nudge of all rows with random signs ``[rows]``."""
        drawn = torch.randn(self.rows(reader), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self._size(reader) * drawn.sign()

    def _size(self, reader: RoleFound) -> float:
        parameter = self.solo.parameters[reader.parameter].detach().double()
        given = torch.tensordot(parameter, self._inputs[reader.parameter].T, dims=([reader.axis], [0]))
        return _NUDGE * float(given.square().mean().sqrt())

    def _answer(self, reader: RoleFound, each: Mapping[int, Tensor]) -> Tensor:
        """How much it moves ``[tokens, n]`` when ``each[t]`` ``[rows]`` is added to the reader's output at token t."""
        parameter = self.solo.parameters[reader.parameter]
        duals = torch.linalg.pinv(self._inputs[reader.parameter], rtol=1e-6)  # [in, tokens]
        change = torch.stack(list(each.values()), dim=1) @ duals[:, list(each)].T  # [rows, in]
        apart = (reader.axis, reader.expert_axis)
        rest = [size for axis, size in enumerate(parameter.shape) if axis not in apart]
        before = reader.expert_axis is not None and reader.expert_axis < reader.axis
        change = change.reshape(*rest, -1).movedim(-1, reader.axis - before)
        if reader.expert_axis is not None:
            change = change.unsqueeze(reader.expert_axis)
        with nudged(parameter, change.to(parameter.dtype)):
            return self._listen() - self.spoken


def moved_tokens(change: Tensor, scale: Tensor | None = None) -> Tensor:
    """The tokens ``[tokens]`` at which a change ``[tokens, n]`` is more than rounding."""
    largest = (change if scale is None else scale).abs().max().clamp_min(1e-30)
    return change.abs().amax(dim=1) > _MOVED * largest


def spread(count: int, number: int) -> list[int]:
    """Up to ``number`` indices below ``count``, each once, at no period of a fused layout."""
    return list(dict.fromkeys(int((0.31 + n * _GOLDEN) % 1 * count) for n in range(number)))


def _one_hot(count: int, index: int, size: float) -> Tensor:
    row = torch.zeros(count, dtype=torch.float64)
    row[index] = size
    return row


def _linear(up: Tensor, down: Tensor) -> bool:
    """Whether opposite nudges have opposite effects."""
    return bool((up + down).abs().max() < _BENT * up.abs().max())


def _parallel(before: Tensor, after: Tensor) -> bool:
    """Whether every row keeps its direction, where both are not zero."""
    lengths = before.norm(dim=1) * after.norm(dim=1)
    both = lengths > 1e-12 * lengths.max()
    cosine = (before * after).sum(dim=1)[both].abs() / lengths[both]
    return bool(both.any()) and bool((cosine > 1 - 1e-6).all())


def _few_units(parameter: Tensor, writer: RoleFound) -> Iterator[Tensor]:
    """Masks of a writer's parameter, one after the other, that each keep a few neighbouring units of one expert."""
    units = [axis for axis in range(parameter.dim()) if axis not in (writer.axis, writer.expert_axis)]
    axis = max(units, key=lambda unit: parameter.shape[unit])
    few = min(_FEW, parameter.shape[axis])
    for number in range(8 if writer.expert_axis is None else parameter.shape[writer.expert_axis]):
        mask = torch.zeros_like(parameter)
        if writer.expert_axis is None:
            mask.narrow(axis, (parameter.shape[axis] - few) * number // 7, few).fill_(1)
        else:
            mask.narrow(writer.expert_axis, number, 1).narrow(axis, 0, few).fill_(1)
        yield mask

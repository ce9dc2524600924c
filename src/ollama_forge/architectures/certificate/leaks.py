"""How much of a direction an edited model still writes to the residual stream, or reads from it, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import Call, first_tensor
from ollama_forge.architectures.certificate.held_norms import HeldNorm, call_again, statistics_held
from ollama_forge.architectures.certificate.stream import (
    BlockCall,
    Blocks,
    Inputs,
    held,
    largest,
    matrix_owners,
    share_along,
    shifted,
    vectors,
    watched,
    without,
)
from ollama_forge.architectures.roles.region import nudged

_NUDGE = 0.3  # of the mean length of the stream's vectors
_PARALLEL = 1e-3  # sine of the largest angle between a nudge and what the stream carries of it


def written_alone(call: BlockCall, direction: Tensor) -> float:
    """``|r.h| / |h|`` behind a block, if nothing along ``r`` enters it."""
    return share_along(call.again(without(call.entering, direction)), direction)


def writing_modules(call: BlockCall, direction: Tensor) -> dict[nn.Module, float]:
    """How much of the stream's length along a direction each module with a matrix adds in a block.

    Each is silenced in turn, while all others give what they gave.
    """
    entering = without(call.entering, direction)
    with watched(matrix_owners(call.module.modules())) as seen:
        call.again(entering)
    return _contributions(seen, lambda: call.again(entering), direction)


def writing_parameters(call: BlockCall, direction: Tensor) -> dict[str, float]:
    """By how much the share along a direction falls if a parameter of a block is zero; names are those in the block."""
    entering = without(call.entering, direction)
    return _reliefs(call.module.named_parameters(), lambda: call.again(entering), direction)


class Start:
    """What happens in front of the first block."""

    def __init__(self, blocks: Blocks, inputs: Inputs) -> None:
        self.blocks, self.inputs = blocks, inputs
        inside = {parameter for block in blocks.modules for parameter in block.parameters()}
        self.parameters = {name: p for name, p in blocks.model.named_parameters() if p not in inside}

    def stream(self) -> Tensor:
        """The stream in front of the first block."""
        return self.blocks.calls(self.inputs)[0].entering  # what follows costs little on a twin

    def writing_modules(self, direction: Tensor) -> dict[nn.Module, float]:
        """As for a block."""
        with watched(matrix_owners(self.blocks.outside)) as seen:
            self.stream()
        return _contributions(seen, self.stream, direction)

    def writing_parameters(self, direction: Tensor) -> dict[str, float]:
        """As for a block; names are those in the model."""
        return _reliefs(self.parameters.items(), self.stream, direction)

    def weightless(self, direction: Tensor) -> float:
        """The share of the stream's length along a direction that is there if every weight is zero."""
        length = torch.linalg.vector_norm(vectors(self.stream(), len(direction)), dim=1).mean()
        with ExitStack() as changes:
            for parameter in self.parameters.values():
                changes.enter_context(nudged(parameter, -parameter.detach()))
            left = vectors(self.stream(), len(direction))
        return largest((left @ direction.double()).abs() / length)


def _contributions(
    seen: Mapping[nn.Module, list[Call]], run: Callable[[], Tensor], direction: Tensor
) -> dict[nn.Module, float]:
    with held(seen):
        normal = vectors(run(), len(direction))
    length = torch.linalg.vector_norm(normal, dim=1).mean()
    found = {}
    for module in seen:
        with held(seen, silent=[module]):
            change = normal - vectors(run(), len(direction))
        found[module] = largest((change @ direction.double()).abs() / length)
    return found


def _reliefs(
    parameters: Iterable[tuple[str, nn.Parameter]], run: Callable[[], Tensor], direction: Tensor
) -> dict[str, float]:
    share = share_along(run(), direction)
    found = {}
    for name, parameter in parameters:
        if parameter.is_floating_point():
            with nudged(parameter, -parameter.detach()):
                found[name] = share - share_along(run(), direction)
    return found


class NudgedBlock:
    """One call of a block, run again with the stream in front of it nudged along a direction.

    Args:
        norms: the norms that readers take their input from; they keep their statistics of each token, because an edit
            that removes the direction from what a norm gives cannot remove its effect on the norm's denominator.

    Attributes:
        not_norms: those of ``norms`` that do not behave like a norm, and are not held.
    """

    def __init__(self, call: BlockCall, norms: Iterable[nn.Module]) -> None:
        self.call = call
        owners = matrix_owners(call.module.modules())
        inside = set(call.module.modules())
        with watched({*owners, *(norm for norm in norms if norm in inside)}) as seen:
            self.leaving = call.again()
        self.matrices = {module: seen[module] for module in owners if module in seen}
        self.norms: dict[nn.Module, list[HeldNorm]] = {}
        self.not_norms: list[nn.Module] = []
        for module in seen.keys() - self.matrices.keys():
            measured = [HeldNorm.of_call(module, one) for one in seen[module]]
            found = [norm for norm in measured if norm is not None]
            if len(found) == len(measured):
                self.norms[module] = found
            else:
                self.not_norms.append(module)
        self.size = _NUDGE * float(torch.linalg.vector_norm(call.entering, dim=-1).mean())

    @property
    def repeats(self) -> bool:
        """Whether the block gives the same when it is run again alone."""
        return torch.allclose(self.leaving, self.call.leaving, rtol=1e-3, atol=1e-4)

    def carried(self, direction: Tensor) -> Tensor:
        """How the stream behind the block moves ``[n, d]`` if all matrices give what they gave."""
        with held(self.matrices):
            return self._moved(direction)

    def effect(self, direction: Tensor) -> float:
        """The largest change of what the block adds, relative to what it adds in the mean."""
        carried = self.carried(direction)
        with statistics_held(self.norms):
            moved = self._moved(direction)
        r = direction.double()
        if not bool(carried.any()):  # the block hands the stream through a module that was held
            carried = torch.outer(moved @ r, r)
        factor = (carried @ r / self.size).unsqueeze(1)
        entering, leaving = (vectors(stream, len(r)) for stream in (self.call.entering, self.leaving))
        added = torch.linalg.vector_norm(leaving - factor * entering, dim=1).mean()
        return largest(torch.linalg.vector_norm(moved - carried, dim=1) / added)

    def reading_modules(self, direction: Tensor) -> dict[nn.Module, float]:
        """How much the output of each module with a matrix changes, relative to its size, by what it reads itself."""
        with held(self.matrices):
            return self.moved_modules(direction)

    def moved_modules(self, direction: Tensor) -> dict[nn.Module, float]:
        """The same, by whatever reaches it in the block."""
        with statistics_held(self.norms), watched(self.matrices) as nudged_calls:
            self._moved(direction)
        return {
            module: max(_change(module, old, new) for old, new in zip(calls, nudged_calls[module], strict=False))
            for module, calls in self.matrices.items()
            if module in nudged_calls
        }

    def _moved(self, direction: Tensor) -> Tensor:
        leaving = self.call.again(shifted(self.call.entering, direction * self.size))
        return vectors(leaving, len(direction)) - vectors(self.leaving, len(direction))


def _change(module: nn.Module, old: Call, new: Call) -> float:
    """The relative change of what a module gives, from the arguments of one call to those of another."""
    before, after = (first_tensor(call_again(module, call)) for call in (old, new))
    if before is None or after is None or not before.is_floating_point():
        return 0.0
    return largest(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before))


def stays_parallel(moved: Tensor, direction: Tensor) -> bool:
    """Whether vectors ``[n, d]`` are multiples of a direction; zero vectors are."""
    off = moved - torch.outer(moved @ direction.double(), direction.double())
    lengths = torch.linalg.vector_norm(moved, dim=1)
    return bool((torch.linalg.vector_norm(off, dim=1) <= _PARALLEL * lengths.max()).all())

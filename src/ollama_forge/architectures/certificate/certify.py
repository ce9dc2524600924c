"""Prove a learned architecture on its twin: edit the twin on disk, load it again, and measure what is left.

Writers: after an edit of all writers and embeddings, the stream has no component along ``r`` at any block. Readers:
after an edit of all readers, a nudge along ``r`` in front of a block changes nothing that the block adds, while its
norms keep their statistics. Edits with a direction of its own for each layer show that no layer got the tensors of
another one. The edit is handed in, so that it is the one that real checkpoints get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.certificate.certificate import Certificate, EditKind, Failure, Leak
from ollama_forge.architectures.certificate.held_norms import norms_sharing
from ollama_forge.architectures.certificate.leaks import (
    NudgedBlock,
    Start,
    stays_parallel,
    writing_modules,
    writing_parameters,
    written_alone,
)
from ollama_forge.architectures.certificate.reach import Part, felt, parts_of, prompts_for, prompts_reaching, reached
from ollama_forge.architectures.certificate.stream import BlockCall, Blocks, Inputs, share_along
from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.checkpoints.checkpoint import Checkpoint

WRITTEN = 1e-5  # the largest |r.h| / |h| that counts as nothing
READ = 1e-4  # the largest effect of a nudge, relative to what the block adds, that counts as nothing
_POWER = 100.0  # without an edit, a test must show at least this many times its bound
_DIRECTIONS = 3

Edit = Callable[[Checkpoint, ModelMap, Tensor, EditKind, Path], None]
"""Edits a checkpoint at full strength and writes it to a folder, given a unit vector ``[n_layers, d_model]`` for each
layer; embeddings take the first one."""
Load = Callable[[Path], nn.Module]
"""Loads the checkpoint of a folder with transformers, in float32 and eval mode."""


def certify(twin: Twin, checkpoint: Checkpoint, model_map: ModelMap, edit: Edit, load: Load) -> Certificate:
    """Edit the twin's checkpoint on disk, load it again, and measure what is left at every block.

    Args:
        checkpoint: the twin as ``save_pretrained`` wrote it, with its ``model_map``.

    Raises:
        ForgeError: the edit fails, or the edited checkpoint cannot be loaded.
    """
    return _Examination(twin, checkpoint, model_map, edit, load).certificate()


class _Examination:
    """Collects the leaks and failures of one twin."""

    def __init__(self, twin: Twin, checkpoint: Checkpoint, model_map: ModelMap, edit: Edit, load: Load) -> None:
        self.twin, self.checkpoint, self.map, self.edit, self.load = twin, checkpoint, model_map, edit, load
        self.unedited = Blocks(twin.model, model_map.layers, model_map.d_model)
        self.matrices = {
            EditKind.WRITERS: [matrix for matrix in model_map.matrices if matrix.writes],
            EditKind.READERS: [m for m in model_map.matrices if not m.writes and m.role is not Role.UNEMBEDDING],
        }
        self.prompts = prompts_for(twin)
        self.calls = [self.unedited.calls(inputs) for inputs in self.prompts]
        self.failures: dict[tuple[EditKind, int | None, str], Failure] = {}
        self.obstacles: list[str] = []

    def certificate(self) -> Certificate:
        for layer in set(range(self.map.n_layers)) - {call.layer for call in self.calls[0]}:
            for kind in EditKind:
                self.fail(kind, layer, self.map.layers[layer], 0.0, "{module} does not run, or hands on no stream")
        self.look_for_bends()
        writers = () if self.obstacles else self.writers()
        readers = () if self.obstacles else self.readers()
        return Certificate(self.map.layers, writers, readers, tuple(self.failures.values()), tuple(self.obstacles))

    @contextmanager
    def edited(self, directions: Tensor, kind: EditKind) -> Iterator[Blocks]:
        with TemporaryDirectory() as folder:
            target = Path(folder) / "edited"
            self.edit(self.checkpoint, self.map, directions, kind, target)
            yield Blocks(self.load(target), self.map.layers, self.map.d_model)

    def fail(self, kind: EditKind, layer: int | None, module: str, amount: float, what: str) -> None:
        """Note a failure, the largest of each module; ``what`` may hold ``{module}``."""
        place = "in front of the first layer" if layer is None else f"layer {layer}"
        found = Failure(kind, layer, module, amount, f"{place}: {what.replace('{module}', module)}")
        known = self.failures.get((kind, layer, module))
        if known is None or known.amount < amount:
            self.failures[kind, layer, module] = found

    def look_for_bends(self) -> None:
        """Blocks that turn a direction of the stream into another one are obstacles."""
        r = _unit(0, self.map.d_model)
        for call in self.calls[0]:
            if not stays_parallel(NudgedBlock(call, ()).carried(r), r):
                self.obstacles.append(
                    f"layer {call.layer}: the stream itself passes a norm, or a gain of each channel, in "
                    f"{self.map.layers[call.layer]}: no direction is the same in all layers"
                )

    def writers(self) -> tuple[Leak, ...]:
        leaks = _Worst(self.map.layers)
        waiting = parts_of(self.matrices[EditKind.WRITERS])
        for seed in range(_DIRECTIONS):
            r = _unit(seed, self.map.d_model)
            with self.edited(r.expand(self.map.n_layers, -1), EditKind.WRITERS) as blocks:
                more = self.more_prompts(blocks, EditKind.WRITERS, self.prompts, waiting)
                plain = [*self.calls, *(self.unedited.calls(inputs) for inputs in more)]
                for inputs, befores in zip([*self.prompts, *more], plain, strict=True):
                    for before, after in zip(befores, blocks.calls(inputs), strict=True):
                        was, entering = share_along(before.entering, r), share_along(after.entering, r)
                        if before is befores[0]:
                            leaks.add(None, was, entering, seed)
                        leaving = max(entering, share_along(after.leaving, r))
                        leaks.add(before.layer, max(was, share_along(before.leaving, r)), leaving, seed)
                if leaks.largest > WRITTEN:
                    self.blame_writers(blocks, r, [*self.prompts, *more])
                    break
        else:
            self.compare_layers()
        self.fail_untested(EditKind.WRITERS, leaks, waiting, WRITTEN)
        return leaks.ordered

    def more_prompts(
        self, blocks: Blocks, kind: EditKind, prompts: Sequence[Inputs], waiting: set[Part]
    ) -> list[dict[str, Any]]:
        """Prompts that reach what ``prompts`` do not; what they all reach is taken out of ``waiting``."""
        more: list[dict[str, Any]] = []
        if waiting:
            waiting -= reached(blocks.model, prompts, self.matrices[kind])
            waiting -= felt(blocks.model, prompts[0], self.matrices[kind], waiting)
            more = prompts_reaching(self.twin, blocks.model, self.matrices[kind], waiting)
            waiting -= reached(blocks.model, more, self.matrices[kind]) if more else set()
        return more

    def blame_writers(self, blocks: Blocks, r: Tensor, prompts: Sequence[Inputs]) -> None:
        """Name what still writes along ``r``."""
        before = len(self.failures)
        for inputs in prompts:
            calls = blocks.calls(inputs)
            if share_along(calls[0].entering, r) > WRITTEN:
                start = Start(blocks, inputs)
                weightless = start.weightless(r)
                if weightless > WRITTEN:
                    self.obstacles.append(
                        f"something that is not a weight is added to the stream before the first layer: "
                        f"{weightless:.2g} of its length is along the direction"
                    )
                    return
                found = self.guilty(start.writing_modules(r), WRITTEN, blocks)
                self.blame(EditKind.WRITERS, None, found or start.writing_parameters(r), WRITTEN)
            for call in calls:
                self.blame_block(blocks, call, r)
        if len(self.failures) == before:
            self.fail(EditKind.WRITERS, None, "", 1.0, "the stream between two layers is written by no module")

    def blame_block(self, blocks: Blocks, call: BlockCall, r: Tensor) -> None:
        """Name what writes along ``r`` in one block, if anything does."""
        share = written_alone(call, r)
        if share > WRITTEN:
            found = self.guilty(writing_modules(call, r), WRITTEN, blocks)
            path = self.map.layers[call.layer]
            if not found:
                found = {f"{path}.{name}": amount for name, amount in writing_parameters(call, r).items()}
            self.blame(EditKind.WRITERS, call.layer, found, WRITTEN, share)

    def compare_layers(self) -> None:
        """Edit each layer along a direction of its own: a layer that got another one's tensors still writes its own."""
        directions = self.separate(0)
        with self.edited(directions, EditKind.WRITERS) as blocks:
            for call in blocks.calls(self.prompts[0]):
                self.blame_block(blocks, call, directions[call.layer])

    def readers(self) -> tuple[Leak, ...]:
        leaks = _Worst(self.map.layers)
        waiting = parts_of(self.matrices[EditKind.READERS])
        plain = [self.nudged(self.unedited, call) for call in self.calls[0]]
        for block in plain:
            for norm in block.not_norms:
                path = next(path for path, module in self.unedited.model.named_modules() if module is norm)
                self.fail(EditKind.READERS, block.call.layer, path, 1.0, "{module} does not behave like a norm")
            if not block.repeats:
                path = self.map.layers[block.call.layer]
                self.fail(EditKind.READERS, block.call.layer, path, 0.0, "{module} cannot be run again alone")
        for seed in range(_DIRECTIONS):
            directions = self.separate(seed)
            with self.edited(directions, EditKind.READERS) as blocks:
                more = self.more_prompts(blocks, EditKind.READERS, self.prompts[:1], waiting)
                befores = [plain, *([self.nudged(self.unedited, c) for c in self.unedited.calls(p)] for p in more)]
                for inputs, unedited in zip([self.prompts[0], *more], befores, strict=True):
                    for before, call in zip(unedited, blocks.calls(inputs), strict=True):
                        after, r = self.nudged(blocks, call), directions[call.layer]
                        leak = after.effect(r)
                        leaks.add(call.layer, before.effect(r), leak, seed)
                        if leak > READ:
                            found = self.guilty(after.reading_modules(r), READ, blocks)
                            self.blame(EditKind.READERS, call.layer, found, READ, leak)
                        elif waiting:
                            waiting -= self.read_before(before, after, r, blocks)
        self.fail_untested(EditKind.READERS, leaks, waiting, READ)
        return leaks.ordered

    def read_before(self, before: NudgedBlock, after: NudgedBlock, r: Tensor, blocks: Blocks) -> set[Part]:
        """The readers whose output a nudge moved before the edit, and does not any more.

        It proves what has no gradient, because its output only chooses (the tokens to attend to).
        """
        read = self.guilty(before.moved_modules(r), _POWER * READ, self.unedited)
        still = self.guilty(after.moved_modules(r), READ, blocks)
        return {
            (matrix.tensor, None)
            for matrix in self.matrices[EditKind.READERS]
            if all(p.expert is None and p.module in read and p.module not in still for p in matrix.places)
            and not matrix.experts
        }

    def nudged(self, blocks: Blocks, call: BlockCall) -> NudgedBlock:
        paths = {matrix.reads.module for matrix in self.map.matrices if matrix.reads and matrix.reads.module}
        known = {blocks.model.get_submodule(path) for path in paths}
        return NudgedBlock(call, [*known, *norms_sharing(known, call.module)])

    def separate(self, seed: int) -> Tensor:
        """A direction ``[n_layers, d_model]`` for each layer; layers that share a parameter share the direction."""
        directions = torch.stack([_unit(1 + seed, self.map.d_model, layer) for layer in range(self.map.n_layers)])
        first: dict[nn.Parameter, int] = {}
        for layer, module in enumerate(self.unedited.modules):
            for parameter in module.parameters():
                directions[layer] = directions[first.setdefault(parameter, layer)]
        return directions

    def guilty(self, amounts: Mapping[nn.Module, float], bound: float, blocks: Blocks) -> dict[str, float]:
        """The modules over a bound, by path."""
        paths = {module: path for path, module in blocks.model.named_modules()}
        return {paths[module]: amount for module, amount in amounts.items() if amount > bound}

    def blame(
        self, kind: EditKind, layer: int | None, amounts: Mapping[str, float], bound: float, whole: float = 1.0
    ) -> None:
        """Note all that writes or reads more than ``bound``; the block itself, with ``whole``, if nothing does."""
        known = {place.module for matrix in self.matrices[kind] for place in matrix.places}
        guilty = {path: amount for path, amount in amounts.items() if amount > bound}
        for path, amount in guilty.items():
            self.fail(kind, layer, path, amount, _accusation(kind, path in known, amount))
        if not guilty:
            verb = "writes" if kind is EditKind.WRITERS else "reads"
            block = "" if layer is None else self.map.layers[layer]
            self.fail(kind, layer, block, whole, f"{{module}} {verb} the direction without a matrix ({whole:.2g})")

    def fail_untested(self, kind: EditKind, leaks: _Worst, waiting: set[Part], bound: float) -> None:
        """Note each block where the test could not have failed, and each matrix that no prompt reaches."""
        failed = {layer for other, layer, _ in self.failures if other is kind}
        for leak in leaks.ordered:
            if leak.before < _POWER * bound and leak.layer not in failed:
                what = f"without an edit only {leak.before:.2g} is found along a direction, too little for a test"
                self.fail(kind, leak.layer, leak.block, leak.after, what)
        layers = {matrix.tensor: matrix for matrix in self.matrices[kind]}
        for tensor, expert in sorted(waiting, key=str):
            part = "{module}" if expert is None else f"expert {expert} of {{module}}"
            self.fail(
                kind, layers[tensor].layer, tensor, 0.0, f"{part} takes no part in any answer, so it is not proven"
            )


def _accusation(kind: EditKind, known: bool, amount: float) -> str:
    if kind is EditKind.WRITERS:
        size = f"{amount:.2g} of the stream's length along the direction"
        return f"{{module}} still writes {size}" if known else f"{{module}} writes {size}, but no writer is known there"
    size = f"a nudge changes its output by {amount:.2g}"
    still = "{module} still reads the direction" if known else "{module} reads the stream, but no reader is known there"
    return f"{still}: {size}"


def _unit(seed: int, d: int, layer: int = 0) -> Tensor:
    vector = torch.randn(d, generator=torch.Generator().manual_seed(1000 * layer + seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vector, dim=0).float()


class _Worst:
    """The largest leak of each block, and the largest one without an edit."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.leaks: dict[int | None, Leak] = {}

    def add(self, layer: int | None, before: float, after: float, seed: int) -> None:
        known = self.leaks.get(layer)
        before = max(before, known.before) if known else before
        if known is not None and known.after >= after:
            after, seed = known.after, known.seed
        self.leaks[layer] = Leak(layer, "" if layer is None else self.paths[layer], after, before, seed)

    @property
    def largest(self) -> float:
        return max((leak.after for leak in self.leaks.values()), default=0.0)

    @property
    def ordered(self) -> tuple[Leak, ...]:
        return tuple(sorted(self.leaks.values(), key=lambda leak: -1 if leak.layer is None else leak.layer))

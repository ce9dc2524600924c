"""Roles by experiment on a twin: which parameters write to the residual stream, which read it, and what lies between.

Nothing is read off the name of a module or a parameter. ``region.py`` runs a stretch of the stream with its matrices
held, ``writers.py`` and ``readers.py`` nudge what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import rows
from ollama_forge.architectures.learned import Gap, RoleFound
from ollama_forge.architectures.roles.blocks import (
    BlockCall,
    StreamShape,
    block_region,
    find_block_calls,
    first_calls,
    first_region,
)
from ollama_forge.architectures.roles.kinds import MeasuredBlock, block_kind
from ollama_forge.architectures.roles.paths import Paths
from ollama_forge.architectures.roles.readers import Readers
from ollama_forge.architectures.roles.region import Region, nudged, owns_matrix
from ollama_forge.architectures.roles.writers import Writers
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.errors import ForgeError


@dataclass(frozen=True)
class Found:
    """What the experiments on a twin found.

    Attributes:
        blocks: paths of the blocks, in the order of their first calls.
        roles: the parameters that write to the stream or read it; ``role`` and ``mixes`` are not known yet.
        d_model: width of the stream.
        gaps: what could not be found out.
    """

    blocks: tuple[str, ...]
    roles: tuple[RoleFound, ...]
    d_model: int
    gaps: tuple[Gap, ...]


def find_roles(twin: Twin) -> Found:
    """Find the blocks of a twin, and the parameters that write to its residual stream or read it.

    The weights are nudged, and restored bit for bit.

    Raises:
        ForgeError: the blocks have no stream in common, as those of an encoder and a decoder.
    """
    paths = Paths(twin.model)
    calls = find_block_calls(twin)
    if not calls:
        return Found((), (), 0, (Gap("", "stream", "no block was found that maps the stream to the stream"),))
    width = calls[-1].given.shape[-1]
    blocks = [call for call in calls if call.given.shape[-1] == width]
    shape = _stream_shape(twin, blocks, paths)
    start = first_region(twin, blocks, shape)
    found = list(Writers(start, paths, shape.d_model).find())
    ran = _ran(start)
    measured: dict[object, MeasuredBlock] = {}
    for number, call in enumerate(first_calls(blocks)):
        kind = block_kind(call)
        known = measured[kind].at(call.block, number, paths) if kind in measured else None
        if known is None:
            region = block_region(call, shape, module=paths.module(call.block), block=number)
            items = [*Writers(region, paths, shape.d_model).find()]
            items += Readers(region, paths, shape.d_model, (shape.split(call.taken), start.stream)).find()
            known = MeasuredBlock(call.block, tuple(items), frozenset(_ran(region)))
            measured.setdefault(kind, known)
        found += known.items
        ran |= known.ran
    roles, conflicts = _merged(item for item in found if isinstance(item, RoleFound))
    gaps = [item for item in found if isinstance(item, Gap)]
    gaps += [
        Gap(paths.module(call.block), "stream", f"its stream is not {width} wide")
        for call in calls
        if call.given.shape[-1] != width
    ]
    gaps += [*conflicts, *_between(blocks, start, shape, paths), *_idle(twin, blocks, ran, shape.d_model, paths)]
    names = tuple(paths.module(call.block) for call in first_calls(blocks))
    return Found(names, roles, shape.d_model, tuple(dict.fromkeys(gaps)))


def _stream_shape(twin: Twin, calls: list[BlockCall], paths: Paths) -> StreamShape:
    """The shape of the stream: as wide as what the first block gives, or as the embedding if nothing writes so wide
    (the blocks then hand on several copies side by side).
    """
    tokens = next(x.shape for x in twin.inputs.values() if isinstance(x, Tensor) and not x.is_floating_point())
    embedding: Any = twin.model.get_input_embeddings() if hasattr(twin.model, "get_input_embeddings") else None  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    width = calls[0].given.shape[-1]
    narrow = width if weight is None else weight.shape[-1]
    if narrow < width and width % narrow == 0:
        region = block_region(calls[0], StreamShape(tokens, width), module="", block=0)
        if not any(isinstance(item, RoleFound) for item in Writers(region, paths, width).find()):
            return StreamShape(tokens, narrow)
    return StreamShape(tokens, width)


def _merged(found: Iterable[RoleFound]) -> tuple[tuple[RoleFound, ...], list[Gap]]:
    """One role for each parameter, use and axis: that of the first block that uses it.

    Another norm elsewhere is a gap. Another module with the same parameters is the same norm.
    """
    merged: dict[tuple[str, bool, int], RoleFound] = {}
    gaps = []
    for role in found:
        first = merged.setdefault((role.parameter, role.writes, role.axis), role)
        if [replace(norm, module="") for norm in first.norms] != [replace(norm, module="") for norm in role.norms]:
            about: Literal["writers", "readers"] = "writers" if role.writes else "readers"
            gaps.append(Gap(role.module, about, "several blocks use it, each behind another norm"))
    return tuple(merged.values()), gaps


def _between(calls: list[BlockCall], start: Region, shape: StreamShape, paths: Paths) -> list[Gap]:
    """Blocks whose input is not, token by token, a weighted sum of what blocks and embeddings gave before."""
    addends = [rows(start.stream), *_addends(start, shape.d_model)]
    latest: dict[nn.Module, Tensor] = {}
    gaps = []
    for before, after in pairwise(calls):
        latest[before.block] = rows(shape.split(before.given))
        taken = rows(shape.split(after.taken))
        if before.given.shape == after.taken.shape and torch.equal(before.given, after.taken):
            continue
        points = [point for point in [*addends, *latest.values()] if point.shape == taken.shape]
        if not points:
            raise ForgeError(
                f"there is no one residual stream: {paths.module(after.block)} takes another number of vectors than "
                f"{paths.module(before.block)} gives",
                "take a model of decoder layers alone",
            )
        if not _is_weighted_sum(taken, points):
            gaps.append(
                Gap(paths.module(after.block), "stream", "its input is no sum of what the blocks before it gave")
            )
    return gaps


def _is_weighted_sum(total: Tensor, points: list[Tensor]) -> bool:
    """Whether each row of ``total`` ``[rows, d_model]`` is a weighted sum of the same rows of fewer points."""
    if len(points) >= total.shape[1]:
        return False
    columns = torch.stack(points, 2)
    weights = torch.linalg.lstsq(columns, total[:, :, None], driver="gelsd").solution
    return bool((columns @ weights - total[:, :, None]).norm() <= 1e-4 * total.norm())


def _addends(start: Region, d_model: int) -> list[Tensor]:
    """What may be added up to the stream before the first block: outputs of its modules, and vectors."""
    count = len(rows(start.stream))
    outputs = [rows(calls[0].result) for calls in start.held.values() if calls[0].result is not None]
    vectors = [
        p.detach().double() for module in start.modules for p in module.parameters(recurse=False) if p.dim() == 1
    ]
    laid = [*outputs, *(vector[None] for vector in vectors)]
    return [p.expand(count, -1) for p in laid if p.shape[-1] == d_model and len(p) in (1, count)]


def _ran(region: Region) -> set[nn.Module]:
    """The modules that ran in a region, and those that own a matrix of which the products were seen."""
    return {m for held in region.held for m in ([held.module] if held.product else held.module.modules())}


def _idle(twin: Twin, calls: list[BlockCall], ran: set[nn.Module], d_model: int, paths: Paths) -> list[Gap]:
    """Modules of the blocks, or of their siblings, that own a matrix of the stream's width which text does not use."""
    blocks = {call.block for call in calls}
    containers = [m for m in twin.model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    inside = dict.fromkeys(m for c in containers if blocks & set(c.children()) for m in c.modules())
    logits = twin.run()
    gaps = []
    for module in inside:
        own = [p for p in module.parameters(recurse=False) if d_model in p.shape]
        if module in ran or not owns_matrix(module) or any(inner in ran for inner in module.modules()):
            continue
        if own and not any(_matters(twin, parameter, logits) for parameter in own):
            gaps.append(Gap(paths.module(module), "idle", "it never ran on text, so what it does is not known"))
    return gaps


def _matters(twin: Twin, parameter: nn.Parameter, logits: Tensor) -> bool:
    """Whether the logits depend on a parameter: a class may use a module's matrix without calling the module."""
    with nudged(parameter, parameter.detach() + 1):
        return not torch.equal(twin.run(), logits)

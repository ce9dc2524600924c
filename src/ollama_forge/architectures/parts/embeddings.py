"""The roles of parameters outside the blocks, by experiment: embeddings, positions, the unembedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.architectures.learned import RoleFound
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.parts.solo import Solo
from ollama_forge.architectures.parts.speech import moved_tokens
from ollama_forge.architectures.roles.region import nudged


def role_outside(solo: Solo, one: RoleFound) -> Role:
    """The role of a reader or writer that belongs to no block.

    A reader that feeds no block reads the end of the stream: it is the unembedding. A writer that looks up rows by
    token id is an embedding; one that writes the same whatever the text is a position embedding if it differs from
    position to position, else a constant, which an edit treats as an embedding's row (token types, stray vectors).
    """
    if not one.writes:
        return Role.UP if _feeds_blocks(solo, one) else Role.UNEMBEDDING
    if not is_matrix(solo, one) or looks_up(solo, one):
        return Role.EMBEDDING
    written, turned = (_written(solo, one, ids) for ids in (solo.ids, solo.ids.roll(1, dims=1)))
    if moved_tokens(turned - written, written).any():
        return Role.DOWN
    return Role.POSITION if moved_tokens(written - written[:1], written).any() else Role.EMBEDDING


def is_matrix(solo: Solo, one: RoleFound) -> bool:
    """Whether the parameter has two axes or more that are not 1."""
    return sum(size > 1 for size in solo.parameters[one.parameter].shape) > 1


def looks_up(solo: Solo, writer: RoleFound) -> bool:
    """Whether a nudge of one token's row moves the stream at that token alone."""
    parameter, other = solo.parameters[writer.parameter], 1 - writer.axis
    if parameter.dim() != 2 or parameter.shape[other] <= int(solo.ids.max()):
        return False
    row = torch.linspace(-1, 1, parameter.shape[writer.axis], dtype=parameter.dtype) * parameter.detach().abs().max()
    change = torch.zeros_like(parameter)
    change.select(other, int(solo.ids[0, solo.changed])).copy_(row)
    before = _stream(solo, solo.ids, writer.block)
    with nudged(parameter, change):
        moved = moved_tokens(_stream(solo, solo.ids, writer.block) - before)
    return bool(moved[solo.changed]) and int(moved.sum()) == 1


def _written(solo: Solo, writer: RoleFound, ids: Tensor) -> Tensor:
    """What it adds to the stream ``[tokens, n]``."""
    parameter = solo.parameters[writer.parameter]
    before = _stream(solo, ids, writer.block)
    with nudged(parameter, -parameter.detach().clone()):
        return before - _stream(solo, ids, writer.block)


def _stream(solo: Solo, ids: Tensor, block: int | None) -> Tensor:
    """The stream ``[tokens, n]`` in front of the first block, or behind another one."""
    return solo.first_stream(ids) if block is None else solo.stream(block)


def _feeds_blocks(solo: Solo, reader: RoleFound) -> bool:
    parameter = solo.parameters[reader.parameter]
    if parameter is solo.head:
        return False
    before = solo.arguments()
    with nudged(parameter, parameter.detach().clone()):
        return any(not torch.equal(new, old) for new, old in zip(solo.arguments(), before, strict=True))

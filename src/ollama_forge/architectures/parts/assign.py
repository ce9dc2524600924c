"""What each reader and writer is for, by experiment: attention's or the MLP's, q, k or v, gate or up.

A writer belongs to the part of the block that mixes tokens if what it writes at one token depends on another token.
Its readers are those that it depends on. What a reader is for shows in how the writer answers to a nudge of it
(``speech.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ollama_forge.architectures.learned import RoleFound
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.parts.embeddings import is_matrix, looks_up, role_outside
from ollama_forge.architectures.parts.solo import Solo
from ollama_forge.architectures.parts.speech import Response, Speech
from ollama_forge.architectures.twin.build import Twin

_LINEAR = 0.7  # share of rows from which a reader is linear as a whole: a clamp may bend some of them
_BENT = 0.25  # share up to which it is not: a ReLU may leave some of them straight

Rows = tuple[tuple[int, Role], ...]


@dataclass(frozen=True)
class Word:
    """The role of a parameter, whether it belongs to the part that mixes tokens, and the roles of some of its rows."""

    role: Role
    mixes: bool
    rows: Rows = ()


Words = dict[int, Word]  # by the number of the reader or writer


def assign_roles(twin: Twin, found: tuple[RoleFound, ...], blocks: tuple[str, ...]) -> tuple[RoleFound, ...]:
    """The readers and writers with ``role``, ``mixes`` and ``rows`` filled in, in the order given.

    The twin's weights are changed, and restored bit for bit.

    Args:
        found: what ``find_roles`` found, without roles.
        blocks: paths of the twin's blocks, in the order of their first calls.
    """
    words: Words = {}
    kinds: dict[tuple[object, ...], list[Word]] = {}
    with Solo(twin, found, blocks) as solo:
        for block, path in enumerate(blocks):
            inside = {number: one for number, one in enumerate(found) if one.block == block}
            kind = tuple(_likeness(solo, one, path) for one in inside.values())
            if kind not in kinds:
                kinds[kind] = list(_roles_inside(solo, block, inside).values())
            words |= dict(zip(inside, kinds[kind], strict=True))
        for number, one in enumerate(found):
            if one.block is None:
                words[number] = Word(role_outside(solo, one), mixes=False)
    named = ((one, words[number]) for number, one in enumerate(found))
    return tuple(replace(one, role=word.role, mixes=word.mixes, rows=word.rows) for one, word in named)


def _likeness(solo: Solo, one: RoleFound, path: str) -> tuple[object, ...]:
    """Equal for parameters at the same place of blocks of one kind."""
    place = one.parameter.removeprefix(path)
    return place, solo.parameters[one.parameter].shape, one.writes, one.axis, one.expert_axis, len(one.norms)


def _roles_inside(solo: Solo, block: int, inside: Mapping[int, RoleFound]) -> Words:
    """The roles of one block's parameters, in their order."""
    readers = {number: one for number, one in inside.items() if not one.writes}
    inputs = solo.reader_inputs(block, list(readers.values()))
    words: Words = {}
    for number, writer in inside.items():
        if not writer.writes or not is_matrix(solo, writer):
            continue
        with solo.speaking(writer):
            if not solo.contribution(block).any():
                continue
            speech = Speech(solo, block, writer, inputs, at_module=True)
            mixes = speech.mixes()
            smeared = any(norm.column is not None for norm in writer.norms)  # a convolution behind it mixes tokens
            if not mixes and not smeared:  # what weighs a whole MLP comes after its module
                speech = Speech(solo, block, writer, inputs, at_module=False)
            words[number] = Word(Role.O if mixes else Role.EMBEDDING if looks_up(solo, writer) else Role.DOWN, mixes)
            own = {n: reader for n, reader in readers.items() if n not in words and speech.moves(reader)}
            words |= _mixer_words(speech, own) if mixes else _mlp_words(speech, own)
    words |= _unheard(solo, inside, words)
    return {number: words[number] for number in inside}


def _mixer_words(speech: Speech, readers: Mapping[int, RoleFound]) -> Words:
    """The roles of the readers of a part that mixes tokens.

    Softmax attention gives the first token its own value whatever the query and the key. So a query moves its own
    token alone, and not the first one; a key moves other tokens too, and not the first one; a value moves other tokens
    in proportion. A part without queries is no softmax attention, but a recurrent or convolutional mixer; so is one
    without values, unless all keys and values come from another block.
    """
    weighers = speech.weighers(readers) if speech.writer.expert_axis is not None else set()
    answers = {n: speech.response(one, speech.all_rows(one)) for n, one in readers.items() if n not in weighers}
    roles = {n: role for n, answer in answers.items() if (role := _word(answer))}
    if Role.Q not in roles.values() and Role.K not in roles.values() and _has_sinks(answers):
        for n, answer in answers.items():
            roles.setdefault(n, Role.K if answer.elsewhere else Role.Q)
    others = [n for n in answers if n not in roles]
    reaching = [answer for answer in answers.values() if answer.elsewhere]
    valued = not reaching or any(answer.first_linear for answer in reaching)
    fused = {n for n in others if valued and speech.has_query_rows(readers[n])}
    if not valued or not (fused or Role.Q in roles.values()):
        roles, others = dict.fromkeys(answers, Role.MIXER), []
    for n in others:
        local = Role.Q if n in fused else Role.MIXER  # queries beside a gate; a gate alone
        roles[n] = Role.QKV if answers[n].elsewhere else local
    return {n: Word(role, mixes=True) for n, role in (roles | dict.fromkeys(weighers, Role.ROUTER)).items()}


def _word(answer: Response) -> Role | None:
    """q, k or v; None for what is something else, or several of them at once."""
    if not answer.elsewhere:
        return Role.Q if answer.here and not answer.first else None
    if answer.linear:
        return Role.V
    return None if answer.first else Role.K


def _has_sinks(answers: Mapping[int, Response]) -> bool:
    """Whether a softmax may have one more entry, so that queries and keys move the first token too.

    Then values are linear, keys and queries are not. In linear attention queries or keys are linear too.
    """
    local = [answer for answer in answers.values() if not answer.elsewhere]
    bent = [answer for answer in answers.values() if answer.elsewhere and not answer.linear]
    valued = sum(answer.elsewhere and answer.linear for answer in answers.values())
    return bool(local) and bool(bent) and valued == 1 and not any(answer.linear for answer in local)


def _mlp_words(speech: Speech, readers: Mapping[int, RoleFound]) -> Words:
    """The roles of the readers of a part that mixes no tokens: up is linear at a fixed gate, gate is not.

    A reader without a partner is called up, also in front of an activation.
    """
    words = dict.fromkeys(speech.weighers(readers), Word(Role.ROUTER, mixes=False))
    linear = {n: speech.linear_rows(reader) for n, reader in readers.items() if n not in words}
    shares = {n: sum(rows.values()) / max(len(rows), 1) for n, rows in linear.items()}
    for n, share in shares.items():
        if _BENT < share < _LINEAR:
            rows = tuple((row, Role.UP if straight else Role.GATE) for row, straight in sorted(linear[n].items()))
            words[n] = Word(Role.GATE_UP, mixes=False, rows=rows)
        else:
            partner = any(other > _BENT for m, other in shares.items() if m != n)
            words[n] = Word(Role.GATE if share <= _BENT and partner else Role.UP, mixes=False)
    return words


def _unheard(solo: Solo, inside: Mapping[int, RoleFound], words: Words) -> Words:
    """Vectors by the part that they lie in; what no token reached (an expert) as its like in the same block."""
    more: Words = {}
    for number, one in inside.items():
        if number in words:
            continue
        like = next((n for n in words if _alike(solo, one, inside[n])), None)
        if like is not None:
            more[number] = words[like]
            continue
        mixes = _lies_in_mixer(one, inside, words)
        role = (Role.O if mixes else Role.DOWN) if one.writes else (Role.MIXER if mixes else Role.UP)
        more[number] = Word(role, mixes)
    return more


def _alike(solo: Solo, one: RoleFound, other: RoleFound) -> bool:
    same = (one.writes, one.axis, one.norms) == (other.writes, other.axis, other.norms)
    return same and solo.parameters[one.parameter].shape == solo.parameters[other.parameter].shape


def _lies_in_mixer(one: RoleFound, inside: Mapping[int, RoleFound], words: Words) -> bool:
    """Whether most of what is known in the nearest module around it belongs to the part that mixes tokens."""
    path = one.module
    while path:
        near = [word.mixes for n, word in words.items() if f"{inside[n].module}.".startswith(f"{path}.")]
        if near:
            return Counter(near).most_common(1)[0][0]
        path = path.rpartition(".")[0]
    return False

"""Which slot of llama.cpp continues a conversation, if each request has a strength of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Slot:
    """A slot, and what its last request was.

    Attributes:
        ids: the tokens of the prompt.
        users: number of requests that run in it.
        last_use: number of the last request; 0: none.
    """

    number: int
    ids: Sequence[int] = ()
    strength: float | None = None
    users: int = 0
    last_use: int = 0

    def continued_by(self, ids: Sequence[int]) -> int:
        """The number of its tokens that ``ids`` begin with; 0 if they are less than half of them."""
        differing = (place for place, pair in enumerate(zip(self.ids, ids, strict=False)) if pair[0] != pair[1])
        common = next(differing, min(len(self.ids), len(ids)))
        return common if 2 * common >= len(self.ids) else 0


class SlotChoice:
    """Chooses a slot for each request.

    llama.cpp itself takes the slot that holds most of the prompt's tokens at whatever strength, and empties it if that
    is another: two strengths of one conversation, as side by side, would compute all of it again at each turn.

    Args:
        count: number of slots.
    """

    def __init__(self, count: int) -> None:
        self._slots = [_Slot(number) for number in range(count)]
        self._uses = 0

    @contextmanager
    def use(self, ids: Sequence[int], strength: float) -> Iterator[int]:
        """Use a slot for a prompt: one that holds most of it at its strength, else the one unused for longest."""
        slot = max(self._slots, key=lambda slot: _rank(slot, ids, strength))
        self._uses += 1
        slot.ids, slot.strength, slot.last_use = ids, strength, self._uses
        slot.users += 1
        try:
            yield slot.number
        finally:
            slot.users -= 1


def _rank(slot: _Slot, ids: Sequence[int], strength: float) -> tuple[int, int, int]:
    return -slot.users, slot.continued_by(ids) if slot.strength == strength else 0, -slot.last_use

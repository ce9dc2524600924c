"""The prefix cache: states of earlier sequences, so that the beginning of a conversation is not prefilled again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class Kept(Generic[State]):
    """Token ids and the model's state after them."""

    ids: tuple[int, ...]
    state: State
    nbytes: int


class Prefixes(Generic[State]):
    """Keeps the states of the latest sequences and evicts the least recently used.

    Args:
        count: maximum number of states.
        nbytes: maximum size of all states together.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self._kept: list[Kept[State]] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, ids: Sequence[int], state: State, nbytes: int) -> None:
        """Keep a state of ``nbytes``; it replaces states whose ids are a prefix of ``ids``."""
        new = Kept(tuple(ids), state, nbytes)
        self._kept = [old for old in self._kept if shared_length(old.ids, new.ids) < len(old.ids)]
        self._kept.append(new)
        while self._kept and (len(self._kept) > self.count or sum(kept.nbytes for kept in self._kept) > self.nbytes):
            self._kept.pop(0)

    def longest(self, ids: Sequence[int], *, whole: bool = False) -> tuple[State, int] | None:
        """The state that shares the longest prefix with a prompt, and the prefix's length; None if no state shares any.

        The prefix never includes the prompt's last token: its logits have to be computed.

        Args:
            whole: take only states all of whose ids are a prefix of the prompt, because they cannot be shortened.
        """
        wanted = tuple(ids[:-1])
        best, length = None, 0
        for kept in self._kept:
            shared = shared_length(kept.ids, wanted)
            if shared > length and (not whole or shared == len(kept.ids)):
                best, length = kept, shared
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return best.state, length

    def clear(self) -> None:
        self._kept.clear()


def shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # binary search: slices compare many times faster than a loop over ids
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

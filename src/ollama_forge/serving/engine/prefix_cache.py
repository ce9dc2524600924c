"""The prefix cache: states of earlier sequences, so that the beginning of a conversation is not prefilled again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class Entry(Generic[State]):
    """Token ids and the model's state after them."""

    ids: tuple[int, ...]
    state: State
    nbytes: int


class PrefixCache(Generic[State]):
    """Keeps the states of the latest sequences and evicts the least recently used.

    Args:
        count: maximum number of states.
        nbytes: maximum size of all states together.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self._entries: list[Entry[State]] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, ids: Sequence[int], state: State, nbytes: int) -> None:
        """Keep a state of ``nbytes``, unless it is too large; it replaces states whose ids are a prefix of ``ids``."""
        if nbytes <= self.nbytes:
            new = Entry(tuple(ids), state, nbytes)
            self._entries = [old for old in self._entries if common_prefix(old.ids, new.ids) < len(old.ids)]
            self._entries.append(new)
        while len(self._entries) > self.count or sum(entry.nbytes for entry in self._entries) > self.nbytes:
            self._entries.pop(0)

    def match(self, ids: Sequence[int], *, whole: bool = False) -> tuple[State, int] | None:
        """The state that shares the longest prefix with a prompt, and the prefix's length; None if no state shares any.

        The prefix never includes the prompt's last token: its logits have to be computed.

        Args:
            whole: take only states all of whose ids are a prefix of the prompt, because they cannot be shortened.
        """
        best, length = self._longest(ids, whole)
        if best is None:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        return best.state, length

    def shared(self, ids: Sequence[int]) -> int:
        """Length of the prefix that ``match`` would find; this does not count as a use."""
        return self._longest(ids, whole=False)[1]

    def _longest(self, ids: Sequence[int], whole: bool) -> tuple[Entry[State] | None, int]:
        usable = tuple(ids[:-1])
        best, length = None, 0
        for entry in self._entries:
            shared = common_prefix(entry.ids, usable)
            if shared > length and (not whole or shared == len(entry.ids)):
                best, length = entry, shared
        return best, length

    def clear(self) -> None:
        self._entries.clear()


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # binary search: slices compare many times faster than a loop over ids
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

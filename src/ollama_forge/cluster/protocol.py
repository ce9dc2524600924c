"""The interface of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

State = TypeVar("State")
Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Cluster(Protocol):
    """Processes, its workers, that do pieces of work on this machine or on others."""

    def map(
        self,
        setup: Callable[[], State],
        work: Callable[[State, Piece], Result],
        pieces: Iterable[Piece],
    ) -> Iterator[Result]:
        """Yield ``work(setup(), piece)`` for each piece, in the order of the pieces.

        A worker keeps what ``setup`` returned until it gets another one. A piece is taken from ``pieces`` when a worker
        has time for it, and given to another worker if its own is lost; an exception of ``work`` is raised here.

        Args:
            setup, work: functions that can be pickled.
        """

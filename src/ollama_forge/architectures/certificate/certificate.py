"""The certificate of a learned architecture: what a full edit of its twin left, and what is therefore proven."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EditKind(StrEnum):
    """Which matrices an edit changes: all that write, embeddings included, or all that read in the decoder layers."""

    WRITERS, READERS = "writers", "readers"


class Tier(StrEnum):
    """``PROVEN``: all writers and readers. ``PARTIAL``: some of them. ``REFUSED``: none that would free the stream."""

    PROVEN, PARTIAL, REFUSED = "proven", "partial", "refused"


@dataclass(frozen=True)
class Leak:
    """What the edit left at one block, the largest over directions, prompts and tokens.

    Attributes:
        layer: number of the block; None for the stream in front of the first block.
        block: path of the block's module; "" in front of the first.
        after: writers: ``|r.h| / |h|``; readers: the effect of a nudge relative to what the block adds.
        before: the same without the edit.
        seed: number of the direction that left the most.
    """

    layer: int | None
    block: str
    after: float
    before: float
    seed: int


@dataclass(frozen=True)
class Failure:
    """Something that is not proven.

    Attributes:
        kind: whether an edit of writers or of readers fails.
        layer: number of the block; None outside the blocks.
        module: path of the module, or name of the parameter, that fails.
        amount: how much it writes or reads, as in ``Leak``; 0 if it could not be tested.
        message: one sentence.
    """

    kind: EditKind
    layer: int | None
    module: str
    amount: float
    message: str


@dataclass(frozen=True)
class Certificate:
    """What is proven about a twin; layers are numbered as the twin's.

    Attributes:
        blocks: path of each layer's block in the twin.
        writers, readers: what the edit of each kind left, block by block.
        failures: what is not proven.
        obstacles: why no edit can free the stream from a direction; empty if one can.
    """

    blocks: tuple[str, ...]
    writers: tuple[Leak, ...]
    readers: tuple[Leak, ...]
    failures: tuple[Failure, ...]
    obstacles: tuple[str, ...]

    @property
    def tier(self) -> Tier:
        if not self.failures and not self.obstacles:
            return Tier.PROVEN
        failed = {failure.layer for failure in self.failures if failure.kind is EditKind.WRITERS}
        nothing = failed.issuperset(range(len(self.blocks)))
        return Tier.REFUSED if self.obstacles or nothing else Tier.PARTIAL

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the tier is not ``PROVEN``, one sentence each."""
        return (*self.obstacles, *(failure.message for failure in self.failures))

    def proves(self, kind: EditKind) -> bool:
        """Whether all matrices of one kind are proven."""
        return not self.obstacles and all(failure.kind is not kind for failure in self.failures)

    def reason_against(self, kind: EditKind, block: str | None) -> str | None:
        """Why the writers or the readers of a block (None: the embeddings) are not proven; None if they are."""
        if self.obstacles:
            return self.obstacles[0]
        layer = None if block is None else self.blocks.index(block)
        return next((f.message for f in self.failures if f.kind is kind and f.layer == layer), None)

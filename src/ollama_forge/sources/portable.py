"""A checkpoint that other machines open."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.sources.resolve import resolve


@dataclass(frozen=True)
class PortableCheckpoint:
    """Where a checkpoint lies, and what it holds; it can be pickled.

    Attributes:
        checkpoint: as it is on the machine that resolved it, without what that has read.
    """

    checkpoint: Checkpoint
    fingerprint: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PortableCheckpoint:
        return cls(replace(checkpoint), checkpoint.fingerprint)

    def here(self) -> Checkpoint:
        """The checkpoint on this machine: at its path if that exists, else fetched from the Hub or its object store.

        Raises:
            ForgeError: this machine has no such file or folder, or another model there.
        """
        there = self.checkpoint
        if there.location.exists():
            found = replace(there)
        elif there.kind in ("hub", "store"):
            found = resolve(there.label, there.revision, trust_remote_code=True)  # loading it asks again
        else:
            raise ForgeError(
                f"{socket.gethostname()} has no {there.location}",
                "put the model on storage that all nodes see under the same path; if it lies in the cache, set "
                "OLLAMA_FORGE_CACHE to such a path on every node",
            )
        if found.fingerprint != self.fingerprint:
            raise ForgeError(
                f"{found.location} on {socket.gethostname()} is another model than on the machine of the command",
                "put the model on storage that all nodes see under the same path",
            )
        return found

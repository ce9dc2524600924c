"""A checkpoint that another machine has resolved, on this one."""

from __future__ import annotations

import socket

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.sources.resolve import resolve


def on_this_machine(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint: at its path if this machine has that, else a model of the Hub from the Hub.

    Raises:
        ForgeError: this machine has no such file or folder.
    """
    if checkpoint.location.exists():
        return checkpoint
    if checkpoint.kind == "hub":
        return resolve(checkpoint.label, checkpoint.revision)
    raise ForgeError(
        f"{socket.gethostname()} has no {checkpoint.location}",
        "put the model on storage that all nodes see under the same path; if it lies in the cache, set "
        "OLLAMA_FORGE_CACHE to such a path on every node",
    )

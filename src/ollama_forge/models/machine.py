"""The machine and the library versions that figures were computed with."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.device import pick_device, pick_dtype
from ollama_forge.system import usable_cores, versions

_PACKAGES = ("torch", "transformers", "xllamacpp")


@dataclass(frozen=True)
class Machine:
    """The machine and the libraries.

    Attributes:
        processor: its name; that of the GPU is in ``accelerator``.
        cores: logical cores that the process may use.
        threads: threads of torch.
        memory: bytes of main memory.
        versions: installed versions by package; "" for one that is not installed.
        dtype, device: what the models were computed in and on.
    """

    system: str
    processor: str
    cores: int
    threads: int
    memory: int
    accelerator: str
    versions: dict[str, str]
    dtype: str
    device: str

    @classmethod
    def here(cls, load: LoadSettings) -> Machine:
        """This machine, with the device and the dtype that the settings choose on it."""
        device = pick_device(load.device)
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            processor=_processor(),
            cores=usable_cores(),
            threads=torch.get_num_threads(),
            memory=int(psutil.virtual_memory().total),
            accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            versions={"python": platform.python_version(), **versions(_PACKAGES)},
            dtype=str(pick_dtype(load.dtype, device)).removeprefix("torch."),
            device=str(device),
        )

    @property
    def numerics(self) -> dict[str, str]:
        """What the figures themselves depend on."""
        return {"dtype": self.dtype, "device": self.device}


def _processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")  # platform.processor() gives no name on Linux
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if named:
            return named[0]
    return platform.processor() or platform.machine()

"""Time of ``apply`` on a synthetic 4 GB checkpoint, compared with ``cp`` and ``sync``; and its peak memory by depth.

    python benchmarks/apply.py [FOLDER]

The page cache is cold. Bounds: ``apply`` without interpreter start and imports takes at most 1.5x the time of the copy;
ten times the layers raise the peak memory by less than 100 MB. For each round the processor time of both, and what
``apply`` reads from disk and writes to it, tell whether the disk or the processor is what takes the time. Needs 13 GB
on the disk of FOLDER (default: the system's temporary folder).
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import forget, measured, write_llama

ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Seconds, seconds of the processor in the program and in the kernel, and bytes read from and written to disk."""

    wall: float
    user: float
    kernel: float
    read: int
    written: int

    def __str__(self) -> str:
        disk = f"{self.read / 1e9:.2f} GB read, {self.written / 1e9:.2f} GB written"
        return f"{self.wall:.1f} s (processor {self.user:.1f} s, kernel {self.kernel:.1f} s; {disk})"


def cost(command: list[str]) -> Cost:
    """Run a command; return what it took."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(
        wall,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        512 * (after.ru_inblock - before.ru_inblock),
        512 * (after.ru_oublock - before.ru_oublock),
    )


def apply_command(model: Path, direction: Path, output: Path) -> list[str]:
    arguments = ["--model", str(model), "--refusal-pt", str(direction), "--output-dir", str(output)]
    return [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "apply", *arguments]


def direction(folder: Path, d: int) -> Path:
    path = folder / f"direction-{d}.pt"
    torch.save(torch.nn.functional.normalize(torch.randn(1, d)), path)
    return path


def main() -> int:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        root = Path(temporary)
        size = write_llama(root / "model", 3072, 8192, 18, vocabulary=64000, tied=True)
        print(f"checkpoint of {size / 1e9:.2f} GB")
        refusal = direction(root, 3072)
        imports = [
            sys.executable,
            "-c",
            "import ollama_forge.cli.main, ollama_forge.api, transformers.models.llama.modeling_llama",
        ]
        cost(imports)
        cost(apply_command(root / "model", refusal, root / "edited"))  # learns the architecture, which is cached
        shutil.rmtree(root / "edited")
        ratios = []
        for _ in range(ROUNDS):
            forget(root / "model")
            copied = cost(["sh", "-c", f"cp -r --reflink=never '{root}/model' '{root}/copy' && sync"])
            shutil.rmtree(root / "copy")
            forget(root / "model")
            start = cost(imports)
            applied = cost(apply_command(root / "model", refusal, root / "edited"))
            shutil.rmtree(root / "edited")
            ratios.append((applied.wall - start.wall) / copied.wall)
            print(f"cp and sync {copied}\nimports {start}\napply with imports {applied}\nratio {ratios[-1]:.2f}")
        shutil.rmtree(root / "model")
        peaks = []
        for layers in (6, 60):
            write_llama(root / f"deep-{layers}", 1024, 2816, layers, tied=True)
            _, peak = measured(apply_command(root / f"deep-{layers}", direction(root, 1024), root / "out"))
            peaks.append(peak / 2**20)
            shutil.rmtree(root / "out")
            print(f"{layers} layers: peak {peaks[-1]:.0f} MB")
    ratio, growth = statistics.median(ratios), peaks[1] - peaks[0]
    print(f"median ratio {ratio:.2f}; ten times the layers raise the peak by {growth:.0f} MB")
    return 0 if ratio <= 1.5 and growth < 100 else 1


if __name__ == "__main__":
    sys.exit(main())

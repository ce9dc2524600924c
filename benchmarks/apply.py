"""Time of ``apply`` on a synthetic 4 GB checkpoint, compared with ``cp`` and ``sync``; and its peak memory by depth.

    python benchmarks/apply.py [FOLDER]

The page cache is cold. Bounds: ``apply`` without interpreter start and imports takes at most 2x the time of the copy;
ten times the layers raise the peak memory by less than 100 MB. Needs 13 GB on the disk of FOLDER (default: the system's
temporary folder).
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkpoints import forget, measured, write_llama

ROUNDS = 3


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


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
        imports = [sys.executable, "-c", "import ollama_forge.cli.main, ollama_forge.api"]
        timed(imports)
        ratios = []
        for _ in range(ROUNDS):
            forget(root / "model")
            copied = timed(["sh", "-c", f"cp -r '{root}/model' '{root}/copy' && sync"])
            shutil.rmtree(root / "copy")
            forget(root / "model")
            start = timed(imports)
            applied = timed(apply_command(root / "model", refusal, root / "edited")) - start
            shutil.rmtree(root / "edited")
            ratios.append(applied / copied)
            print(
                f"apply {applied:.1f} s (without imports, {start:.1f} s), cp and sync {copied:.1f} s: {ratios[-1]:.2f}"
            )
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
    return 0 if ratio <= 2 and growth < 100 else 1


if __name__ == "__main__":
    sys.exit(main())

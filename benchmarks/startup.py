"""CPU time of ``--help``, and a check that it does not import torch or transformers.

    python benchmarks/startup.py

Bound: the median of three runs is below 0.2 s of CPU time.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    helps = (["--help"], ["abliterate", "--help"], ["abliterate", "run", "--help"])
    worst = 0.0
    for arguments in helps:
        times = [cpu_seconds([sys.executable, "-m", "ollama_forge.cli.main", *arguments]) for _ in range(3)]
        worst = max(worst, statistics.median(times))
        print(f"{' '.join(arguments)}: median {statistics.median(times):.3f} s of CPU")
    code = (
        "import sys; from ollama_forge.cli.main import cli\n"
        "try: cli.main(['abliterate', 'run', '--help'], standalone_mode=False)\n"
        "finally: sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    clean = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
    print("torch is not imported" if clean else "torch IS imported")
    return 0 if clean and worst < 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())

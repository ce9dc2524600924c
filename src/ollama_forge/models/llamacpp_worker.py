"""llama.cpp in a process of its own, so that no file and no CPU can take a run down with it.

    python gguf_server.py FILE.gguf CONTEXT SLOTS THREADS

Prints where it listens (a loopback port), and ends when its stdin does. Imports nothing of this package.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    import xllamacpp

    path, context, slots, threads = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = context, slots
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.warmup = False
    params.verbosity = 1  # errors alone
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # nothing is to be kept


if __name__ == "__main__":
    main()

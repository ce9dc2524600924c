"""A worker process that runs llama.cpp: a crash in its native code ends this process, not the run.

    python llamacpp_worker.py FILE.gguf CONTEXT SLOTS THREADS [ADAPTER.gguf]

It prints the loopback address that it listens on, and ends when its stdin is closed. It imports nothing from this
package.
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
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in sys.argv[5:]]
    params.warmup = False
    params.verbosity = 1  # errors only
    server = xllamacpp.Server(params)
    try:
        print(server.listening_address, flush=True)  # fails if the process that wants it was killed meanwhile
        sys.stdin.read()
    finally:
        os._exit(0)  # the server's threads would keep the process alive


if __name__ == "__main__":
    main()

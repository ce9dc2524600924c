"""A worker that runs a GGUF file with an adapter in llama.cpp, as ``models/llamacpp_worker.py`` runs one without.

python llamacpp_adapter.py FILE.gguf ADAPTER.gguf
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Convert several tiny checkpoints with llama.cpp's own script, in one process: starting it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.export import converter_worker

_SCRIPT = """
import json, sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("converter_worker", sys.argv[1])
worker = module_from_spec(spec)
spec.loader.exec_module(worker)
import transformers
transformers.AutoConfig = None  # then the converter reads config.json itself, with keys that transformers renames
converter, jobs = sys.argv[2], json.loads(sys.argv[3])
for source, target in jobs.items():
    arguments = [source, "--outfile", target, "--outtype", "f32", "--model-name", "tiny"]
    arguments += ["--no-mtp"] if "qwen3_next" in source else []  # or it asks for the layers that predict further tokens
    sys.argv = ["", converter, worker.NO_VOCABULARY, *arguments]
    worker.main()
"""


def convert_all(targets: Mapping[Path, Path]) -> None:
    """Convert each checkpoint folder to an F32 file without a vocabulary."""
    converter = find_converter(None)
    jobs = json.dumps({str(source): str(target) for source, target in targets.items()})
    command = [sys.executable, "-P", "-c", _SCRIPT, converter_worker.__file__, str(converter), jobs]
    environment = {**os.environ, "PYTHONPATH": str(converter / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

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
import json, runpy, sys
from conversion.base import ModelBase
write = ModelBase.write
def write_without_vocabulary(self):
    self.set_vocab = self._set_vocab_none
    write(self)
ModelBase.write = write_without_vocabulary
worker, converter, outtype, jobs = runpy.run_path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
for source, target in jobs.items():
    arguments = [source, "--outfile", target, "--outtype", outtype, "--model-name", "tiny"]
    arguments += ["--no-mtp"] if "qwen3_next" in source else []  # or it asks for the layers that predict further tokens
    sys.argv = ["", converter, "default", *arguments]
    worker["main"]()
"""


def convert_all(targets: Mapping[Path, Path], outtype: str = "f32") -> None:
    """Convert each checkpoint folder to a file without a vocabulary."""
    converter = find_converter(None)
    jobs = json.dumps({str(source): str(target) for source, target in targets.items()})
    command = [sys.executable, "-P", "-c", _SCRIPT, converter_worker.__file__, str(converter), outtype, jobs]
    libraries = os.pathsep.join([str(converter / "gguf-py"), str(converter)])
    environment = {**os.environ, "PYTHONPATH": libraries, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

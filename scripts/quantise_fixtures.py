"""Make the fixtures of the quantiser's tests with llama.cpp's tool. The repository contains the result.

    python scripts/quantise_fixtures.py LLAMA_QUANTIZE CHECKPOINT.gguf

CHECKPOINT is the demo model converted to F16. Writes ``tests/data/quantised.npz`` (rows before and after the tool
quantised them) and ``tests/data/types.json`` (the type that the tool chose for each tensor of several models).
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S")
MIXES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
MIXES_WITH_IMATRIX = (
    "Q4_0", "Q5_0", "Q4_K_M", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M",
    "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def layer(i: int, d: int, kv: int, ff: int, *, bias: bool = False, experts: int = 0) -> Shapes:
    """Tensor shapes ``(rows, columns)`` of one decoder layer."""
    at, e = f"blk.{i}.", (experts,) if experts else ()
    out: Shapes = {f"{at}attn_norm.weight": (d,), f"{at}ffn_norm.weight": (d,)}
    out |= {f"{at}attn_q.weight": (d, d), f"{at}attn_k.weight": (kv, d), f"{at}attn_v.weight": (kv, d)}
    out |= {f"{at}attn_output.weight": (d, d)}
    if bias:
        out |= {f"{at}attn_q.bias": (d,), f"{at}attn_k.bias": (kv,), f"{at}attn_v.bias": (kv,)}
    kind = "_exps" if experts else ""
    out |= {f"{at}ffn_{n}{kind}.weight": (*e, ff, d) for n in ("gate", "up")}
    out[f"{at}ffn_down{kind}.weight"] = (*e, d, ff)
    if experts:
        out[f"{at}ffn_gate_inp.weight"] = (experts, d)
    return out


def fused(i: int, d: int) -> Shapes:
    """Tensor shapes of a layer that has one matrix for q, k and v, and no gate."""
    at = f"blk.{i}."
    out: Shapes = {f"{at}attn_norm.weight": (d,), f"{at}attn_qkv.weight": (3 * d, d), f"{at}attn_output.weight": (d, d)}
    return out | {f"{at}ffn_up.weight": (4 * d, d), f"{at}ffn_down.weight": (d, 4 * d)}


def models() -> dict[str, tuple[str, int, int, int, int, Shapes]]:
    """For each name: the architecture, the numbers of layers, heads, KV heads and experts, and the tensor shapes."""

    def stack(n: int, one: Any, **more: tuple[int, ...]) -> Shapes:
        out: Shapes = {f"{name}.weight": shape for name, shape in more.items()}
        for i in range(n):
            out |= one(i)
        return out

    norm = (896,)
    qwen = stack(24, lambda i: layer(i, 896, 128, 4864, bias=True), token_embd=(1024, 896), output_norm=norm)
    big = stack(80, lambda i: layer(i, 512, 64, 1024), token_embd=(512, 512), output=(512, 512), output_norm=(512,))
    moe = stack(12, lambda i: layer(i, 512, 128, 768, experts=8), token_embd=(512, 512), output=(512, 512))
    falcon = stack(20, lambda i: fused(i, 512), token_embd=(512, 512), output=(512, 512))
    gpt2 = stack(12, lambda i: fused(i, 768), token_embd=(512, 768), position_embd=(128, 768), output=(512, 768))
    odd = stack(9, lambda i: layer(i, 352, 88, 1000), token_embd=(512, 352))
    return {
        "0.5 B": ("qwen2", 24, 14, 2, 0, qwen),
        "70 B": ("llama", 80, 64, 8, 0, big),
        "experts": ("llama", 12, 32, 8, 8, moe),
        "falcon": ("falcon", 20, 8, 8, 0, falcon),
        "gpt2": ("gpt2", 12, 12, 12, 0, gpt2),
        "odd": ("llama", 9, 4, 4, 0, odd),
    }


def writer(path: Path, arch: str, layers: int, heads: int, kv: int, experts: int) -> gguf.GGUFWriter:
    made = gguf.GGUFWriter(path, arch)
    for add, value in (
        (made.add_context_length, 256), (made.add_embedding_length, 512), (made.add_block_count, layers),
        (made.add_feed_forward_length, 512), (made.add_head_count, heads), (made.add_head_count_kv, kv),
        (made.add_layer_norm_rms_eps, 1e-5), (made.add_layer_norm_eps, 1e-5), (made.add_vocab_size, 512),
    ):  # fmt: skip
        add(value)
    if experts:
        made.add_expert_count(experts)
        made.add_expert_used_count(2)
    return made


def finish(made: gguf.GGUFWriter) -> None:
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def write_imatrix(path: Path, tensors: dict[str, Any]) -> None:
    """An importance matrix that has the same importance for all inputs of every matrix."""
    matrices = {name: shape for name, (shape, _) in tensors.items() if len(shape) > 1}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(matrices)))
        for name, shape in matrices.items():
            values = np.ones(shape[0] * (shape[2] if len(shape) > 2 else 1), np.float32)
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", 1, len(values)) + values.tobytes())


def listed(tool: str, path: Path) -> dict[str, Any]:
    """The tensors of a file, and the types that the tool's dry run prints for each mix, without and with imatrix."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: [list(map(int, t.shape)), t.tensor_type.name] for t in reader.tensors}
    imatrix = path.with_suffix(".imatrix")
    write_imatrix(imatrix, tensors)
    return {
        "tensors": tensors,
        "types": printed_types([tool], path, MIXES, list(tensors)),
        "types with imatrix": printed_types([tool, "--imatrix", str(imatrix)], path, MIXES_WITH_IMATRIX, list(tensors)),
    }


def printed_types(command: list[str], path: Path, mixes: tuple[str, ...], tensors: list[str]) -> dict[str, str]:
    types: dict[str, str] = {}
    for mix in mixes:
        done = subprocess.run([*command, "--dry-run", str(path), mix], capture_output=True, text=True, check=False)
        if done.returncode:
            continue  # the tool has no fallback for rows that blocks of 32 do not divide
        found = {}
        for line in (done.stdout + done.stderr).splitlines():
            entry = re.match(r"\[ *\d+/ *\d+\] +(\S+) .*type = +(\S+), size.*?(?:\((\w+)\))?$", line.strip())
            if entry:
                found[entry[1]] = (entry[3] or entry[2]).upper()
        assert set(found) == set(tensors), (path, mix, set(tensors) ^ set(found))
        types[mix] = " ".join(found[name] for name in tensors)
    return types


def rows() -> dict[str, np.ndarray]:
    """Gaussian rows, heavy-tailed rows with a row of zeros, and rows of a length that K-quants do not support."""
    random = np.random.default_rng(5)
    tails = random.standard_t(3, (4, 512)).astype(np.float32)
    tails[2] = 0
    return {
        "attn_q": random.standard_normal((8, 256)).astype(np.float32),
        "attn_k": tails,
        "attn_output": (random.standard_normal((4, 576)) * 0.02).astype(np.float32),
    }


def quantised(tool: str, folder: Path) -> dict[str, np.ndarray]:
    source, drawn = folder / "rows.gguf", rows()
    made = writer(source, "llama", 1, 4, 4, 0)
    for name, values in drawn.items():
        made.add_tensor(f"blk.0.{name}.weight", values)
    finish(made)
    out = {f"rows.{name}": values for name, values in drawn.items()}
    for kind in TYPES:
        target = folder / f"{kind}.gguf"
        subprocess.run([tool, "--pure", str(source), str(target), kind], capture_output=True, check=True)
        for tensor in gguf.GGUFReader(target).tensors:
            if tensor.tensor_type.name == kind:
                out[f"{kind}.{tensor.name.split('.')[2]}"] = np.array(tensor.data)
    return out


def main() -> None:
    tool, demo = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez_compressed(DATA / "quantised.npz", **quantised(tool, folder))
        about: dict[str, Any] = {"demo": {"arch": "llama", "layers": 30, "heads": 9, "kv": 3, "experts": 0}}
        about["demo"] |= listed(tool, demo)
        for name, (arch, layers, heads, kv, experts, shapes) in models().items():
            path = folder / "shapes.gguf"
            made = writer(path, arch, layers, heads, kv, experts)
            for tensor, shape in shapes.items():
                made.add_tensor(tensor, np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
            finish(made)
            about[name] = {"arch": arch, "layers": layers, "heads": heads, "kv": kv, "experts": experts}
            about[name] |= listed(tool, path)
    (DATA / "types.json").write_text(json.dumps(about, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

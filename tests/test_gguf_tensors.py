"""The tensors of GGUF files under their Hugging Face names, against checkpoints that llama.cpp's script converted."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor as Values
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ollama_forge.architectures.gguf.file_layout import file_layout
from ollama_forge.architectures.gguf.learn_layout import learn_layout
from ollama_forge.architectures.gguf.outputs import LearnedLayout
from ollama_forge.architectures.gguf.session import converter_session
from ollama_forge.checkpoints.formats.base import Region, WritableCodec
from ollama_forge.checkpoints.formats.rounding import Kept
from ollama_forge.checkpoints.gguf.codec import decode_rows
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, read_gguf
from ollama_forge.checkpoints.gguf.places import Place
from ollama_forge.checkpoints.gguf.rows import Lines
from ollama_forge.checkpoints.gguf.tensors import GgufTensors
from ollama_forge.checkpoints.storage import decode_tensor, tensor_bytes
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, write_json
from ollama_forge.models.decoded import decoded_tensors
from tests import families, tiny
from tests.converted import convert_all
from tests.gguf_models import retype

_SIZES: dict[str, Any] = {
    **families.SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
_EXPERTS: dict[str, Any] = {**_SIZES, "num_experts_per_tok": 2}


def _config(model_type: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **values)


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("llama", **_SIZES, tie_word_embeddings=True),  # permuted rows
    "gpt2": _config("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=tiny.VOCABULARY),  # transposed
    "gpt_neox": _config("gpt_neox", **_SIZES),  # regrouped rows
    "gemma2": _config("gemma2", **_SIZES, head_dim=16),  # gains plus one
    "phi3": _config("phi3", **_SIZES),  # fused matrices
    "mixtral": _config("mixtral", **_EXPERTS, num_local_experts=3),  # separate experts, stacked
    "qwen3_moe": _config("qwen3_moe", **_EXPERTS, num_experts=4, moe_intermediate_size=32),
    "gpt_oss": _config("gpt_oss", **_EXPERTS, num_local_experts=3, head_dim=16),  # alternating columns of two tensors
    "deepseek_v3": _config(
        "deepseek_v3",
        **{**_EXPERTS, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=14,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),  # a matrix that is rows of one tensor and columns of another
    "qwen3_next": _config(
        "qwen3_next",
        **_EXPERTS,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),  # one matrix in three tensors, convolutions
    "qwen3_5_text": _config(
        "qwen3_5_text",
        **_SIZES,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),  # regrouped columns
    "mamba": _config(
        "mamba", hidden_size=64, state_size=6, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, eos_token_id=1
    ),  # decays as -exp(x)
}
_OLD_KEYS: dict[str, dict[str, Any]] = {"gpt2": {"n_ctx": 64}, "gpt_neox": {"rotary_pct": 0.25}}
"""Keys that the converter asks for, and transformers no longer writes."""
_UNPACKED = {
    "deepseek_v3": ("kv_b_proj.weight",),
    "qwen3_next": ("conv1d.weight",),
    "qwen3_5_text": ("conv1d.weight",),
    "mamba": ("conv1d.weight", ".A_log"),
}
"""The endings of the tensors of several axes that no GGUF rows are rows or columns of."""
_TYPES = (Type.Q8_0, Type.Q4_0, Type.F16, Type.Q5_1, Type.BF16)


@dataclass(frozen=True)
class Converted:
    """A checkpoint folder, its conversion in F32, and what was learned of the layout of such files."""

    folder: Path
    path: Path
    learned: LearnedLayout

    def tensors(self, path: Path | None = None) -> GgufTensors:
        """The tensors of the conversion, or of another file with the same ones."""
        file = read_gguf(path or self.path)
        return GgufTensors(self.folder, file, file_layout(self.learned, file))

    def retyped(self, target: Path, choose: Callable[[Tensor], Type]) -> GgufTensors:
        """The tensors of a new file whose matrices have other types."""
        retype(read_gguf(self.path), target, choose)
        return self.tensors(target)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Converted]:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model.tie_weights()
        tiny.save(model, folder / name)
        path = folder / name / "config.json"
        write_json(path, {**read_json(path), **_OLD_KEYS.get(name, {})})
    convert_all({folder / name: folder / f"{name}.gguf" for name in MODELS})
    with converter_session() as session:
        return {
            name: Converted(
                folder / name, folder / f"{name}.gguf", learn_layout(read_json(folder / name / "config.json"), session)
            )
            for name in MODELS
        }


def values_of(tensors: GgufTensors, name: str) -> Values:
    info = tensors[name]
    return decode_tensor(tensors.read_bytes(name), info.dtype, info.shape)


def matrices_of(tensors: GgufTensors, name: str) -> list[int | None]:
    """The experts of a packed stack; ``[None]`` for a matrix."""
    packed = tensors.packed[name]
    return list(range(packed.shape[0])) if packed.is_stack else [None]


def of_many_types(tensor: Tensor) -> Type:
    """A type for a tensor, by its name, that fits its rows."""
    fitting = _TYPES if tensor.row_length % 32 == 0 else (Type.F32,)
    return fitting[zlib.crc32(tensor.name.encode()) % len(fitting)]


def of_two_types(tensor: Tensor) -> Type:
    return Type.F32 if tensor.row_length % 32 else Type.Q8_0 if "up" in tensor.name else Type.Q4_0


def dequantise(file: Gguf, plain: Gguf) -> None:
    """Write a file's values into an F32 file with the same tensors."""
    data, written = file.path.read_bytes(), bytearray(plain.path.read_bytes())
    for before, after in zip(file.tensors, plain.tensors, strict=True):
        rows = torch.frombuffer(bytearray(data[before.start : before.start + before.size]), dtype=torch.uint8)
        values = decode_rows(rows.view(before.rows, -1), before.type)
        written[after.start : after.start + after.size] = values.numpy().tobytes()
    plain.path.write_bytes(written)


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_values_are_those_of_the_converted_checkpoint(
    models: Mapping[str, Converted], name: str
) -> None:
    tensors = models[name].tensors()
    converted = load_file(models[name].folder / "model.safetensors")
    assert tensors.shapes == {tensor: tuple(values.shape) for tensor, values in converted.items()}
    for tensor, values in converted.items():
        found = values_of(tensors, tensor)
        computed = "norm" in tensor or tensor.endswith(".A_log")  # of some models
        assert torch.allclose(found, values, atol=3e-7) if computed else torch.equal(found, values), tensor
    unpacked = {t for t in converted if t not in tensors.packed and len(tensors.shapes[t]) > 1 and "bias" not in t}
    assert {ending for ending in _UNPACKED.get(name, ()) if any(t.endswith(ending) for t in unpacked)} == set(
        _UNPACKED.get(name, ())
    )
    assert all(t.endswith(_UNPACKED.get(name, ())) for t in unpacked)


@pytest.mark.parametrize("name", MODELS)
def test_encoded_values_are_read_by_regions_and_byte_ranges(
    models: Mapping[str, Converted], tmp_path: Path, name: str
) -> None:
    tensors = models[name].retyped(tmp_path / "types.gguf", of_many_types)
    plain = models[name].retyped(tmp_path / "plain.gguf", lambda tensor: tensor.type)
    dequantise(tensors.file, plain.file)
    assert {tensor.type for tensor in tensors.file.tensors} >= {Type.Q8_0, Type.Q4_0, Type.F16}
    for tensor, info in tensors.items():
        expected = values_of(plain, tensor)
        assert torch.equal(values_of(tensors, tensor), expected), tensor
        start, size = info.size // 3, min(info.size // 2, 4000)
        assert tensors.read_bytes(tensor, start, size) == bytes(tensor_bytes(expected))[start : start + size]
        if tensor in tensors.packed:
            for expert in matrices_of(tensors, tensor):
                matrix, wanted = tensors.read_packed(tensor, expert), expected if expert is None else expected[expert]
                rows, columns = slice(matrix.shape[0] // 4, -(matrix.shape[0] // 4) or None), slice(7, 45)
                assert torch.equal(matrix.decode(rows, columns), wanted[rows, columns]), tensor


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_back_is_read_again_and_fills_the_same_bytes(
    models: Mapping[str, Converted], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "types.gguf"
    tensors = models[name].retyped(path, of_many_types)
    before = path.read_bytes()
    blank = bytearray(before)
    for tensor in tensors.file.tensors:
        if tensors.layout.parts.get(tensor.name):
            blank[tensor.start : tensor.start + tensor.size] = b"\xff" * tensor.size
    matrices = {(n, e): tensors.read_packed(n, e) for n in tensors.packed for e in matrices_of(tensors, n)}
    vectors = {n: values_of(tensors, n) for n in tensors if n not in tensors.packed}
    path.write_bytes(blank)
    with path.open("r+b", buffering=0) as file:
        for (tensor, expert), matrix in matrices.items():
            for place, rows in zip(tensors.places(tensor, expert), matrix.parts, strict=True):
                place.write(file, rows)
        for tensor, values in vectors.items():
            for start, data in tensors.encoded(tensor, values):
                file.seek(start)
                file.write(data)
    after = path.read_bytes()
    if name in ("gemma2", "mamba", "deepseek_v3"):  # a computed or twice encoded value may differ in its last bit
        twice = {t.name for t in tensors.file.tensors if "norm" in t.name or "ssm_a" in t.name or "_b.weight" in t.name}
        spans = [(t.start, t.start + t.size) for t in tensors.file.tensors if t.name in twice]
        before, after = (_without(data, spans) for data in (before, after))
    assert after == before


def test_rows_between_those_of_a_place_are_left_alone(tmp_path: Path) -> None:
    data = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    (tmp_path / "rows").write_bytes(data.tobytes())
    lines = Lines(0, np.array([4, 0, 2]), np.array([0, 1, 2]), None)
    place = Place(Tensor("rows", (8, 6), Type.F32, 0, tmp_path / "rows"), 1, lines)
    with (tmp_path / "rows").open("r+b", buffering=0) as file:
        rows = place.read(file)
        assert np.array_equal(rows.view(torch.float32), data[[5, 1, 3]])
        place.write(file, torch.full_like(rows, 0))
    data[[5, 1, 3]] = 0
    assert (tmp_path / "rows").read_bytes() == data.tobytes()


def _without(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    kept = bytearray(data)
    for start, stop in spans:
        kept[start:stop] = bytes(stop - start)
    return bytes(kept)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_module_holds_the_values_rounded_once(
    models: Mapping[str, Converted], name: str, dtype: torch.dtype
) -> None:
    config = AutoConfig.from_pretrained(models[name].folder)
    tensors = models[name].tensors()
    loaded, info = _loaded(config, decoded_tensors(tensors), dtype)
    expected, _ = _loaded(config, {t: values_of(tensors, t) for t in tensors}, dtype)
    assert not any(info.values())
    for parameter, values in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[parameter], values), parameter


def _loaded(config: PretrainedConfig, state: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    model_class = type(AutoModelForCausalLM.from_config(config))
    loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    return loaded


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("llama", "q_proj.weight"),
        ("gpt2", "mlp.c_fc.weight"),
        ("gpt_oss", "gate_up_proj"),
        ("qwen3_5_text", "linear_attn.out_proj.weight"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_encoding_keeps_products_and_says_what_it_wrote(
    models: Mapping[str, Converted], tmp_path: Path, name: str, ending: str, axis: int
) -> None:
    tensors = models[name].retyped(tmp_path / "types.gguf", of_two_types)
    packed = next(p for p in tensors.packed.values() if p.name.endswith(ending))
    source = tensors.read_packed(packed.name, 1 if packed.is_stack else None)
    assert isinstance(source.codec, WritableCodec)
    before = source.decode()
    basis = torch.nn.functional.normalize(torch.randn(before.shape[axis], 1), dim=0)
    kept = Kept(basis, axis)
    wanted = before - kept.matrix_of(kept.product(before))
    region = Region(slice(0, before.shape[0]), slice(0, before.shape[1]), wanted)
    errors = []
    for products in (None, kept):
        result = source.codec.blank(source, [region])
        written = source.codec.encode(result, region, products)
        assert torch.equal(result.decode(), written)
        spacing = source.codec.spacing(result, region)
        assert bool(((written - wanted).abs() <= spacing * (1 + 1e-5) + 1e-6).all())
        errors.append(float(kept.product(written).norm()))
    assert errors[1] < errors[0] / 4


def test_a_matrix_of_two_tensors_names_both_types(models: Mapping[str, Converted], tmp_path: Path) -> None:
    types = {"ffn_gate_exps": Type.Q8_0, "ffn_up_exps": Type.Q4_0}
    tensors = models["gpt_oss"].retyped(
        tmp_path / "two", lambda tensor: types.get(tensor.name.split(".")[-2], Type.F16)
    )
    packed = tensors.packed["model.layers.0.mlp.experts.gate_up_proj"]
    assert packed.codec.label == "Q8_0 and Q4_0"
    gate, up = tensors.read_packed(packed.name, 1).parts
    assert (gate.shape, up.shape) == ((96, 2 * 34), (96, 2 * 18))


def test_only_bytes_that_are_read_as_they_are_lie_in_the_file(models: Mapping[str, Converted]) -> None:
    llama, gemma = (models[name].tensors() for name in ("llama", "gemma2"))
    layer = "model.layers.0"
    assert llama.lies_in_file(f"{layer}.mlp.up_proj.weight")
    assert llama.lies_in_file(f"{layer}.input_layernorm.weight")
    assert not llama.lies_in_file(f"{layer}.self_attn.q_proj.weight")  # permuted
    assert not gemma.lies_in_file(f"{layer}.input_layernorm.weight")  # plus one
    for tensors in (llama, gemma):
        for name, info in tensors.items():
            stored = tensors.file.path.read_bytes()[info.start : info.end]
            assert not tensors.lies_in_file(name) or stored == tensors.read_bytes(name)


def test_equal_bytes_are_found_in_matrices_and_vectors(models: Mapping[str, Converted]) -> None:
    tensors = models["llama"].tensors()
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert tensors.same_bytes(first, first)
    assert not tensors.same_bytes(first, second)
    assert not tensors.same_bytes(first, "model.layers.0.mlp.gate_proj.weight")


def test_a_tensor_that_the_file_holds_in_part_is_not_shown(models: Mapping[str, Converted]) -> None:
    whole = models["gpt_oss"].tensors()
    less = tuple(tensor for tensor in whole.file.tensors if tensor.name != "blk.0.ffn_up_exps.weight")
    gone = set(whole) - set(GgufTensors(whole.folder, replace(whole.file, tensors=less), whole.layout))
    assert gone == {"model.layers.0.mlp.experts.gate_up_proj"}


def test_a_file_cut_short_after_its_table_was_read_is_an_error(models: Mapping[str, Converted], tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    tensors = models["llama"].retyped(path, lambda tensor: tensor.type)
    last = max(tensors.file.tensors, key=lambda tensor: tensor.start)
    path.write_bytes(path.read_bytes()[: last.start])
    name = tensors.layout.parts[last.name][0].tensor
    with pytest.raises(ForgeError, match="is truncated"):
        tensors.read_bytes(name)

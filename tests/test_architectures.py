"""The roles of every family's tensors, compared with tables written by hand from the models' code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.architectures.learn import learn, map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm, Place, Role
from ollama_forge.architectures.names.bind import bind
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.tensors import TensorInfo
from ollama_forge.errors import ForgeError
from tests import tiny
from tests.test_apply import packed_gpt_oss

LAYERS = 4
Checkpoints = Callable[[str], Checkpoint]


@dataclass(frozen=True)
class Expected:
    """A family: ``readers`` name -> (role, norm in front), ``writers`` name -> (role, norm behind)."""

    layer: str
    readers: dict[str, tuple[str, str | None]]
    writers: dict[str, tuple[str, str | None]]
    embedding: list[str]
    heads: list[str]
    offset: float = 0.0
    centred: bool = False
    biased: set[str] = field(default_factory=set)
    transposed: bool = False
    module: str = "model.layers.{}."


Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))

LLAMA = Expected(
    "model.layers.{}.",
    {
        Q: ("q", "input_layernorm"),
        K: ("k", "input_layernorm"),
        V: ("v", "input_layernorm"),
        GATE: ("gate", "post_attention_layernorm"),
        UP: ("up", "post_attention_layernorm"),
    },
    {O: ("o", None), DOWN: ("down", None)},
    ["model.embed_tokens"],
    ["lm_head"],
)
GEMMA = Expected(
    "model.layers.{}.",
    {
        Q: ("q", "input_layernorm"),
        K: ("k", "input_layernorm"),
        V: ("v", "input_layernorm"),
        GATE: ("gate", "pre_feedforward_layernorm"),
        UP: ("up", "pre_feedforward_layernorm"),
    },
    {O: ("o", "post_attention_layernorm"), DOWN: ("down", "post_feedforward_layernorm")},
    ["model.embed_tokens"],
    [],
    offset=1.0,
)
OLMO2 = Expected(
    "model.layers.{}.",
    {Q: ("q", None), K: ("k", None), V: ("v", None), GATE: ("gate", None), UP: ("up", None)},
    {O: ("o", "post_attention_layernorm"), DOWN: ("down", "post_feedforward_layernorm")},
    ["model.embed_tokens"],
    ["lm_head"],
)
PHI3 = Expected(
    "model.layers.{}.",
    {
        "self_attn.qkv_proj": ("qkv", "input_layernorm"),
        "mlp.gate_up_proj": ("gate_up", "post_attention_layernorm"),
    },
    {O: ("o", None), DOWN: ("down", None)},
    ["model.embed_tokens"],
    ["lm_head"],
)
GPT2 = Expected(
    "transformer.h.{}.",
    {"attn.c_attn": ("qkv", "ln_1"), "mlp.c_fc": ("up", "ln_2")},
    {"attn.c_proj": ("o", None), "mlp.c_proj": ("down", None)},
    ["transformer.wte", "transformer.wpe"],
    [],
    centred=True,
    biased={"attn.c_attn", "mlp.c_fc", "attn.c_proj", "mlp.c_proj"},
    transposed=True,
    module="transformer.h.{}.",
)
NEOX = Expected(
    "gpt_neox.layers.{}.",
    {
        "attention.query_key_value": ("qkv", "input_layernorm"),
        "mlp.dense_h_to_4h": ("up", "post_attention_layernorm"),
    },
    {"attention.dense": ("o", None), "mlp.dense_4h_to_h": ("down", None)},
    ["gpt_neox.embed_in"],
    ["embed_out"],
    centred=True,
    biased={"attention.query_key_value", "mlp.dense_h_to_4h", "attention.dense", "mlp.dense_4h_to_h"},
    module="gpt_neox.layers.{}.",
)
_FALCON = {"self_attention.query_key_value", "mlp.dense_h_to_4h", "self_attention.dense", "mlp.dense_4h_to_h"}


def _falcon(attention: str, mlp: str, biased: bool) -> Expected:
    return Expected(
        "transformer.h.{}.",
        {"self_attention.query_key_value": ("qkv", attention), "mlp.dense_h_to_4h": ("up", mlp)},
        {"self_attention.dense": ("o", None), "mlp.dense_4h_to_h": ("down", None)},
        ["transformer.word_embeddings"],
        [],
        centred=True,
        biased=_FALCON if biased else set(),
        module="transformer.h.{}.",
    )


EXPECTED = {
    "llama": replace(LLAMA, heads=[]),
    "llama-bias": replace(LLAMA, biased={Q, K, V, O, GATE, UP, DOWN}),
    "mistral": LLAMA,
    "qwen2": replace(LLAMA, biased={Q, K, V}),
    "qwen3": LLAMA,
    "smollm3": replace(LLAMA, heads=[]),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": replace(
        GEMMA,
        layer="language_model.model.layers.{}.",
        embedding=["language_model.model.embed_tokens"],
        module="model.language_model.layers.{}.",
    ),
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "falcon": _falcon("input_layernorm", "input_layernorm", biased=False),
    "falcon-new": _falcon("ln_attn", "ln_mlp", biased=True),
    "falcon-rw": _falcon("input_layernorm", "post_attention_layernorm", biased=True),
    "gpt_oss": Expected(
        "model.layers.{}.",
        {
            Q: ("q", "input_layernorm"),
            K: ("k", "input_layernorm"),
            V: ("v", "input_layernorm"),
            "mlp.router": ("router", "post_attention_layernorm"),
            "mlp.experts.gate_up_proj": ("gate_up", "post_attention_layernorm"),
        },
        {O: ("o", None), "mlp.experts.down_proj": ("down", None)},
        ["model.embed_tokens"],
        ["lm_head"],
        biased={Q, K, V, O, "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    ),
}
FAMILIES = list(tiny.FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A family's checkpoint on disk, made once."""
    made: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            made[family] = tiny.save(tiny.build(family), tmp_path_factory.mktemp(family))
        return made[family]

    return get


def tensor_name(matrix: str) -> str:
    return matrix if ".experts." in matrix else f"{matrix}.weight"


def bias_name(matrix: str) -> str:
    return f"{matrix}_bias" if ".experts." in matrix else f"{matrix}.bias"


def norm_at(expected: Expected, prefix: str, module: str, name: str | None) -> Norm | None:
    if name is None:
        return None
    bias = f"{prefix}{name}.bias" if expected.centred else None
    return Norm(f"{prefix}{name}.weight", bias, expected.offset, expected.centred, f"{module}{name}")


def norms_behind(expected: Expected, prefix: str, module: str, name: str | None) -> tuple[Norm, ...]:
    norm = norm_at(expected, prefix, module, name)
    return () if norm is None else (norm,)


def place_of(module: str, *, biased: bool, transposed: bool) -> Place:
    if ".experts." in module:
        owner, parameter = module.rsplit(".", 1)
        return Place(owner, parameter, f"{parameter}_bias" if biased else None, transposed, linear=False)
    return Place(module, "weight", "bias" if biased else None, transposed)


def map_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelMap:
    return bind(learn(config), config, {name: tensor.shape for name, tensor in tensors.items()})


def by_tensor(model_map: ModelMap) -> dict[str, Matrix]:
    return {matrix.tensor: matrix for matrix in model_map.matrices}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_found(checkpoints: Checkpoints, family: str) -> None:
    model_map = map_checkpoint(checkpoints(family))
    assert model_map.model_type == tiny.FAMILIES[family]().model_type
    assert model_map.n_layers == LAYERS
    assert model_map.d_model == tiny.D
    assert model_map.tied is (not EXPECTED[family].heads)
    assert [writer.layer for writer in model_map.writers] == [0, 0, 1, 1, 2, 2, 3, 3]
    for matrix in model_map.matrices:
        if matrix.layer is None:
            assert matrix.in_features == tiny.D
        elif matrix.writes:
            assert matrix.out_features == tiny.D
        else:
            assert matrix.in_features == tiny.D


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_found_with_its_norm(checkpoints: Checkpoints, family: str) -> None:
    expected, checkpoint = EXPECTED[family], checkpoints(family)
    found = by_tensor(map_checkpoint(checkpoint))
    wanted: set[str] = set()
    for layer in range(LAYERS):
        prefix = expected.layer.format(layer)
        module = expected.module.format(layer)
        for writes, table in ((False, expected.readers), (True, expected.writers)):
            for name, (role, norm) in table.items():
                tensor = prefix + tensor_name(name)
                wanted.add(tensor)
                in_out = expected.transposed or ".experts." in name
                bias = prefix + bias_name(name) if name in expected.biased else None
                assert found[tensor] == Matrix(
                    tensor=tensor,
                    role=role,  # type: ignore[arg-type]
                    layer=layer,
                    shape=checkpoint.tensors[tensor].shape,
                    places=(place_of(module + name, biased=bias is not None, transposed=in_out),),
                    writes=writes,
                    bias=bias,
                    reads=None if writes else norm_at(expected, prefix, module, norm),
                    post_norms=norms_behind(expected, prefix, module, norm) if writes else (),
                    transposed=in_out,
                    experts=".experts." in name,
                )
    embeddings = list(zip(("embedding", "position"), expected.embedding, strict=False))
    for role, name in [*embeddings, *(("unembedding", name) for name in expected.heads)]:
        matrix = found[f"{name}.weight"]
        wanted.add(matrix.tensor)
        assert (matrix.role, matrix.layer, matrix.writes) == (role, None, role != "unembedding")
    assert set(found) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_of_the_language_model_is_left_out(checkpoints: Checkpoints, family: str) -> None:
    checkpoint = checkpoints(family)
    found = by_tensor(map_checkpoint(checkpoint))
    aside = ("vision_tower.", "multi_modal_projector.")
    matrices = {
        name
        for name, info in checkpoint.tensors.items()
        if len(info.shape) >= 2 and not name.startswith(aside) and not name.endswith("_bias")
    }
    assert set(found) == matrices
    taken = {matrix.bias for matrix in found.values()} - {None}
    norms = {norm for matrix in found.values() for norm in (matrix.reads, *matrix.post_norms) if norm}
    taken |= {norm.weight for norm in norms} | {norm.bias for norm in norms}
    others = {name for name in checkpoint.tensors if not name.startswith(aside)} - set(found) - taken
    assert {name.split(".")[-2] for name in others} <= {"norm", "ln_f", "final_layer_norm", "q_norm", "k_norm"} | {
        "self_attn"
    }
    assert {name for name in others if ".self_attn." in name and "_norm" not in name} == (
        {f"model.layers.{layer}.self_attn.sinks" for layer in range(LAYERS)} if family == "gpt_oss" else set()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_name_the_loaded_model(checkpoints: Checkpoints, family: str) -> None:
    model_map = map_checkpoint(checkpoints(family))
    model = tiny.build(family)
    for matrix in (matrix for matrix in model_map.matrices if matrix.role is not Role.UNEMBEDDING):
        place = matrix.place
        owner = model.get_submodule(place.module)
        shape = tuple(owner.get_parameter(place.parameter).shape)
        assert shape == (matrix.shape if place.transposed == matrix.transposed else matrix.shape[::-1])
        assert (matrix.bias is None) == (place.bias is None)
        if place.bias is not None:
            owner.get_parameter(place.bias)
    for norm in {norm for matrix in model_map.matrices for norm in (matrix.reads, *matrix.post_norms) if norm}:
        model.get_submodule(norm.module)
    assert len({id(model.get_submodule(path)) for path in model_map.layers}) == LAYERS


def extra(name: str, *shape: int) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", shape, Path("none.safetensors"), 0, 0)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tail", ["mlp.extra_proj.weight", "attn_extra", "adapter.norm.weight"])
def test_one_unknown_tensor_in_a_layer_is_named(checkpoints: Checkpoints, family: str, tail: str) -> None:
    checkpoint = checkpoints(family)
    name = EXPECTED[family].layer.format(2) + tail
    with pytest.raises(ForgeError, match="1 tensors are unknown") as caught:
        map_tensors(checkpoint.config, {**checkpoint.tensors, **extra(name, 3, 3)})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.extra.weight",
        "vision_tower.embeddings.weight",
        "model.layers.extra.weight",
        "model.layers.weight",
    ],
)
def test_unknown_tensors_of_any_kind_are_named(checkpoints: Checkpoints, name: str) -> None:
    checkpoint = checkpoints("llama")
    with pytest.raises(ForgeError) as caught:
        map_tensors(checkpoint.config, {**checkpoint.tensors, **extra(name, 3)})
    assert name in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_missing_matrix_is_named(checkpoints: Checkpoints, family: str) -> None:
    expected, checkpoint = EXPECTED[family], checkpoints(family)
    for name in [*expected.readers, *expected.writers]:
        for layer in (0, 2):
            missing = expected.layer.format(layer) + tensor_name(name)
            left = {key: info for key, info in checkpoint.tensors.items() if key != missing}
            with pytest.raises(ForgeError) as caught:
                map_tensors(checkpoint.config, left)
            assert missing in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_norm_is_an_error(checkpoints: Checkpoints, family: str) -> None:
    expected, checkpoint = EXPECTED[family], checkpoints(family)
    for norm in {norm for _, norm in [*expected.readers.values(), *expected.writers.values()] if norm}:
        missing = f"{expected.layer.format(1)}{norm}."
        left = {key: info for key, info in checkpoint.tensors.items() if not key.startswith(missing)}
        with pytest.raises(ForgeError):
            map_tensors(checkpoint.config, left)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_embedding_is_an_error(checkpoints: Checkpoints, family: str) -> None:
    missing, checkpoint = f"{EXPECTED[family].embedding[0]}.weight", checkpoints(family)
    left = {key: info for key, info in checkpoint.tensors.items() if key != missing}
    with pytest.raises(ForgeError) as caught:
        map_tensors(checkpoint.config, left)
    assert missing in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_missing_layer_is_an_error(checkpoints: Checkpoints, family: str, layer: int) -> None:
    checkpoint, prefix = checkpoints(family), EXPECTED[family].layer.format(layer)
    left = {key: info for key, info in checkpoint.tensors.items() if not key.startswith(prefix)}
    with pytest.raises(ForgeError, match="layers"):
        map_tensors(checkpoint.config, left)


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "model.norm."), ("gpt2", "transformer.ln_f."), ("gemma2", "model.norm.")]
)
def test_a_missing_final_norm_is_an_error(checkpoints: Checkpoints, family: str, norm: str) -> None:
    checkpoint = checkpoints(family)
    left = {key: info for key, info in checkpoint.tensors.items() if not key.startswith(norm)}
    assert len(left) < len(checkpoint.tensors)
    with pytest.raises(ForgeError, match=r"norm|ln_f"):
        map_tensors(checkpoint.config, left)


def edited(checkpoint: Checkpoint, folder: Path, **changes: object) -> Checkpoint:
    """A copy with other entries in config.json."""
    shutil.copytree(checkpoint.folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Checkpoint(folder, folder.name, "folder")


def test_a_class_that_does_not_generate_text_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = edited(checkpoints("qwen3"), tmp_path / "vit", model_type="vit")
    with pytest.raises(ForgeError, match="no class that generates text for the model_type 'vit'"):
        map_checkpoint(checkpoint)


def test_tensors_of_another_architecture_are_refused_with_their_matrices(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint = edited(checkpoints("gpt2"), tmp_path / "wrong", model_type="llama")
    with pytest.raises(ForgeError, match=r"transformer\.h\.N\.attn\.c_attn\.weight \(x4\)"):
        map_checkpoint(checkpoint)


def test_a_config_without_model_type_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ForgeError, match="unknown"):
        map_tensors({}, checkpoints("llama").tensors)


@pytest.mark.parametrize("content", ["[]", '"llama"', "{"])
def test_a_config_that_is_none_is_one_error(checkpoints: Checkpoints, tmp_path: Path, content: str) -> None:
    checkpoint = edited(checkpoints("llama"), tmp_path / "broken")
    (checkpoint.folder / "config.json").write_text(content)
    with pytest.raises(ForgeError, match=r"config\.json"):
        map_checkpoint(checkpoint)


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str]) -> dict[str, TensorInfo]:
    return {rename(name): replace(info, name=rename(name)) for name, info in checkpoint.tensors.items()}


def test_gpt2_without_its_root_and_with_old_buffers(checkpoints: Checkpoints) -> None:
    """As the gpt2 repository has it."""
    checkpoint = checkpoints("gpt2")
    tensors = renamed(checkpoint, lambda name: name.removeprefix("transformer."))
    for layer in range(LAYERS):
        tensors |= extra(f"h.{layer}.attn.bias", 1, 1, 512, 512) | extra(f"h.{layer}.attn.masked_bias")
    bare, rooted = map_tensors(checkpoint.config, tensors), map_checkpoint(checkpoint)
    assert [f"transformer.{matrix.tensor}" for matrix in bare.matrices] == [m.tensor for m in rooted.matrices]
    assert [matrix.places for matrix in bare.matrices] == [matrix.places for matrix in rooted.matrices]
    first = by_tensor(bare)["h.0.attn.c_attn.weight"]
    assert first.reads is not None
    assert first.reads.weight == "h.0.ln_1.weight"


def test_gemma3_under_its_newer_names(checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints("gemma3")

    def rename(name: str) -> str:
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.")
        return f"model.{name}"

    newer, older = map_tensors(checkpoint.config, renamed(checkpoint, rename)), map_checkpoint(checkpoint)
    assert [matrix.places for matrix in newer.matrices] == [matrix.places for matrix in older.matrices]
    assert newer.matrices[0].tensor == "model.language_model.embed_tokens.weight"
    assert len(newer.writers) == 8


def test_mxfp4_experts_are_mapped_as_decoded_ones(checkpoints: Checkpoints, tmp_path: Path) -> None:
    packed = map_checkpoint(packed_gpt_oss(tmp_path / "packed"))
    assert packed == map_checkpoint(checkpoints("gpt_oss"))

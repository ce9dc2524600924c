"""What was learned on a twin, bound to checkpoints of other depth, sizes, number of experts and spelling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from ollama_forge.architectures.learned import LearnedArchitecture, RoleFound, StoredParameter
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.architectures.names.bind import bind as bind_shapes
from ollama_forge.architectures.names.bind import bind_checkpoint
from ollama_forge.architectures.names.boxes import Box, whole
from ollama_forge.architectures.names.counterparts import Counterpart, Counterparts
from ollama_forge.architectures.names.matrices import MatrixBuilder
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.tensors import TensorInfo
from ollama_forge.errors import ForgeError
from tests import by_hand, tiny
from tests.by_hand import Family, tiny_model
from tests.places import assert_places

TYPES: dict[str, Family] = {
    "llama": by_hand.LLAMA,
    "mixtral": by_hand.MIXTRAL,
    "qwen3_moe": by_hand.QWEN3_MOE,
    "deepseek_v3": by_hand.DEEPSEEK_V3,
    "sarvam_moe": by_hand.SARVAM_MOE,
    "gpt_oss": by_hand.GPT_OSS,
    "gpt2": by_hand.GPT2,
}
# of the real checkpoint; those of the twin are in by_hand.py
LARGER: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 11, "hidden_size": 48},
    "mixtral": {"num_hidden_layers": 11, "hidden_size": 48, "num_local_experts": 12, "intermediate_size": 56},
    "qwen3_moe": {"num_hidden_layers": 6, "hidden_size": 48, "num_experts": 11, "mlp_only_layers": [0, 4]},
    "deepseek_v3": {"num_hidden_layers": 5, "n_routed_experts": 12, "first_k_dense_replace": 2, "q_lora_rank": 12},
    "sarvam_moe": {"num_hidden_layers": 3, "num_experts": 5, "num_attention_heads": 8, "vocab_size": 300},
    "gpt_oss": {"num_hidden_layers": 3, "num_local_experts": 6, "intermediate_size": 32},
    "gpt2": {"num_hidden_layers": 3, "hidden_size": 24, "n_positions": 50},
}


@pytest.fixture(scope="module")
def known() -> Callable[[str], LearnedArchitecture]:
    """What there is to learn about a type, found once."""
    made: dict[str, LearnedArchitecture] = {}

    def get(model_type: str) -> LearnedArchitecture:
        if model_type not in made:
            made[model_type] = by_hand.learned(tiny_model(model_type), TYPES[model_type])
        return made[model_type]

    return get


Known = Callable[[str], LearnedArchitecture]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Checkpoint]]:
    """A larger model of a type and its checkpoint, made once."""
    made: dict[str, tuple[nn.Module, Checkpoint]] = {}

    def get(model_type: str) -> tuple[nn.Module, Checkpoint]:
        if model_type not in made:
            model = tiny_model(model_type, **LARGER[model_type])
            made[model_type] = (model, tiny.save(model, tmp_path_factory.mktemp(model_type)))
        return made[model_type]

    return get


Real = Callable[[str], tuple[nn.Module, Checkpoint]]


def by_tensor(model_map: ModelMap) -> dict[str, Matrix]:
    return {matrix.tensor: matrix for matrix in model_map.matrices}


def info(name: str, *shape: int) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", shape, Path("none.safetensors"), 0, 0)}


def bind(learned: LearnedArchitecture, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelMap:
    return bind_shapes(learned, config, {name: tensor.shape for name, tensor in tensors.items()})


def without(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert len(left) < len(tensors)
    return left


def renamed(tensors: Mapping[str, TensorInfo], rename: Callable[[str], str]) -> dict[str, TensorInfo]:
    return {rename(name): replace(tensor, name=rename(name)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("model_type", TYPES)
def test_places_are_where_the_loaded_model_has_the_same_values(known: Known, real: Real, model_type: str) -> None:
    model, checkpoint = real(model_type)
    model_map = bind_checkpoint(known(model_type), checkpoint)
    assert_places(model, checkpoint, model_map)
    assert model_map.gaps == ()
    assert model_map.d_model == model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    assert all(model.get_submodule(path) for path in model_map.layers)
    assert {matrix.layer for matrix in model_map.writers} == set(range(model_map.n_layers))
    norms = ("norm", "ln_", "attn.q_b_proj", "attn.kv_b_proj")  # and what is between two matrices of latent attention
    aside = {name for name in model_map.unused if not any(part in name for part in norms)}
    assert {name.split(".")[-1] for name in aside} <= {"sinks", "e_score_correction_bias", "expert_bias"}


def test_every_expert_of_every_layer_is_a_matrix(known: Known, real: Real) -> None:
    model_map = bind_checkpoint(known("mixtral"), real("mixtral")[1])
    assert model_map.layers == tuple(f"model.layers.{layer}" for layer in range(11))
    found = by_tensor(model_map)
    last = found["model.layers.10.block_sparse_moe.experts.11.w3.weight"]
    assert (last.layer, last.expert, last.shape, last.role) == (10, 11, (56, 48), Role.GATE_UP)
    assert (last.place.module, last.place.parameter) == ("model.layers.10.mlp.experts", "gate_up_proj")
    assert (last.place.expert, last.place.rows, last.place.stored_rows) == (11, range(56, 112), None)
    assert last.reads is not None
    assert last.reads.weight == "model.layers.10.post_attention_layernorm.weight"
    roles = Counter(matrix.role for matrix in model_map.matrices if matrix.layer == 10)
    assert roles == {"q": 1, "k": 1, "v": 1, "o": 1, "router": 1, "gate_up": 24, "down": 12}


@pytest.mark.parametrize(
    ("wrong", "w1", "w3"), [(0, Role.GATE, Role.UP), (3, Role.GATE, Role.UP), (5, Role.GATE_UP, Role.GATE_UP)]
)
def test_each_half_of_a_fused_matrix_has_its_own_role(known: Known, real: Real, wrong: int, w1: Role, w3: Role) -> None:
    """The twin's fused matrix has 96 rows, the real one 112; some rows look like those of the other half."""
    learned, (_, checkpoint) = known("mixtral"), real("mixtral")
    rows = tuple((row, Role.GATE if (row < 48) == (row % 48 >= 4 * wrong) else Role.UP) for row in range(0, 96, 4))
    roles = tuple(replace(one, rows=rows) if one.role is Role.GATE_UP else one for one in learned.roles)
    found = by_tensor(bind(replace(learned, roles=roles), checkpoint.config, checkpoint.tensors))
    experts = "model.layers.10.block_sparse_moe.experts.11"
    assert (found[f"{experts}.w1.weight"].role, found[f"{experts}.w3.weight"].role) == (w1, w3)


def test_layers_of_two_kinds_are_told_apart(known: Known, real: Real) -> None:
    model_map = bind_checkpoint(known("qwen3_moe"), real("qwen3_moe")[1])
    experts = Counter(matrix.layer for matrix in model_map.matrices if matrix.expert is not None)
    assert experts == dict.fromkeys((1, 2, 3, 5), 33)
    assert "model.layers.4.mlp.down_proj.weight" in by_tensor(model_map)


def test_rows_of_a_tensor_that_is_split_in_memory(known: Known, real: Real) -> None:
    """q, k and v have other shares of the tensor than in the twin."""
    matrix = by_tensor(bind_checkpoint(known("sarvam_moe"), real("sarvam_moe")[1]))[
        "model.layers.2.attention.query_key_value.weight"
    ]
    assert (matrix.role, matrix.shape) == (Role.QKV, (96, 32))
    assert [(place.module.rpartition(".")[2], place.rows, place.stored_rows) for place in matrix.places] == [
        ("q_proj", None, range(64)),
        ("k_proj", None, range(64, 80)),
        ("v_proj", None, range(80, 96)),
    ]


def test_a_tensor_of_several_roles_is_left_out_and_reported(known: Known, real: Real) -> None:
    learned, (_, checkpoint) = known("sarvam_moe"), real("sarvam_moe")
    fused = "model.layers.1.attention.query_key_value.weight"

    def changed(**values: Any) -> tuple[ModelMap, ModelMap]:
        roles = tuple(
            replace(role, **values) if role.parameter.endswith("1.self_attn.k_proj.weight") else role
            for role in learned.roles
        )
        dropped = tuple(role for role in learned.roles if not role.parameter.endswith("1.self_attn.k_proj.weight"))
        return (
            bind(replace(learned, roles=roles), checkpoint.config, checkpoint.tensors),
            bind(replace(learned, roles=dropped), checkpoint.config, checkpoint.tensors),
        )

    for model_map in changed(norms=()):
        assert fused not in by_tensor(model_map)
        assert any(fused in gap and "k_proj" in gap for gap in model_map.gaps)
        assert "model.layers.1.attention.dense.weight" in by_tensor(model_map)


def test_gpt2_without_its_root_and_with_old_buffers(known: Known, real: Real) -> None:
    """As the gpt2 repository has it."""
    learned, (_, checkpoint) = known("gpt2"), real("gpt2")
    tensors = renamed(checkpoint.tensors, lambda name: name.removeprefix("transformer."))
    for layer in range(3):
        tensors |= info(f"h.{layer}.attn.bias", 1, 1, 50, 50) | info(f"h.{layer}.attn.masked_bias")
    bare, rooted = bind(learned, checkpoint.config, tensors), bind_checkpoint(learned, checkpoint)
    assert [f"transformer.{matrix.tensor}" for matrix in bare.matrices] == [m.tensor for m in rooted.matrices]
    assert [matrix.places for matrix in bare.matrices] == [matrix.places for matrix in rooted.matrices]
    first = by_tensor(bare)["h.0.attn.c_attn.weight"]
    assert first.reads is not None
    assert (first.reads.weight, first.reads.bias) == ("h.0.ln_1.weight", "h.0.ln_1.bias")
    assert (first.bias, first.transposed) == ("h.0.attn.c_attn.bias", True)
    assert {"h.1.attn.bias", "h.1.attn.masked_bias"} <= bare.unused


def test_experts_that_are_stored_as_in_memory(known: Known, real: Real) -> None:
    learned, (model, checkpoint) = known("qwen3_moe"), real("qwen3_moe")
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if ".experts." not in name}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            tensors |= info(name, *parameter.shape)
    found = by_tensor(bind(learned, checkpoint.config, tensors))
    stack = found["model.layers.1.mlp.experts.down_proj"]
    assert (stack.experts, stack.expert, stack.transposed, stack.shape[0]) == (True, None, False, 11)
    assert (stack.place.expert, stack.place.rows) == (None, None)


def further_layer(tensors: Mapping[str, TensorInfo], source: str, copy: str) -> dict[str, TensorInfo]:
    return renamed({n: t for n, t in tensors.items() if n.startswith(source)}, lambda name: name.replace(source, copy))


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_layers_that_predict_more_tokens_are_copied(known: Known, real: Real, model_type: str) -> None:
    learned, (_, checkpoint) = known(model_type), real(model_type)
    depth = checkpoint.config["num_hidden_layers"]
    copy = f"model.layers.{depth}."
    tensors = {**checkpoint.tensors, **further_layer(checkpoint.tensors, f"model.layers.{depth - 1}.", copy)}
    with pytest.raises(ForgeError, match="more layers than its config says"):
        bind(learned, checkpoint.config, tensors)
    tensors |= info(f"{copy}eh_proj.weight", 32, 64) | info(f"{copy}enorm.weight", 32)
    model_map = bind(learned, checkpoint.config, tensors)
    assert model_map.n_layers == depth
    assert {name for name in tensors if name.startswith(copy)} <= model_map.unused
    assert not any(matrix.tensor.startswith(copy) for matrix in model_map.matrices)


def test_what_the_class_skips_is_copied(known: Known, real: Real) -> None:
    learned, (_, checkpoint) = known("llama"), real("llama")
    old = info("model.layers.1.self_attn.rotary_emb.inv_freq", 4)
    assert set(old) <= bind(learned, checkpoint.config, {**checkpoint.tensors, **old}).unused


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.extra_proj.weight",
        "model.layers.1.self_attn.q_proj.weight_scale_inv",
        "model.extra.weight",
        "vision_tower.embeddings.weight",
        "model.layers.extra.weight",
    ],
)
def test_unknown_tensors_are_named(known: Known, real: Real, name: str) -> None:
    learned, (_, checkpoint) = known("llama"), real("llama")
    with pytest.raises(ForgeError, match="1 tensors are unknown to the architecture 'llama'") as caught:
        bind(learned, checkpoint.config, {**checkpoint.tensors, **info(name, 3, 3)})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.7.mlp.up_proj.weight"),
        ("llama", "model.layers.7.input_layernorm.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.10.block_sparse_moe.experts.9.w1.weight"),
        ("sarvam_moe", "model.layers.2.attention.query_key_value.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
    ],
)
def test_a_missing_tensor_is_named(known: Known, real: Real, model_type: str, name: str) -> None:
    learned, (_, checkpoint) = known(model_type), real(model_type)
    with pytest.raises(ForgeError, match="lacks") as caught:
        bind(learned, checkpoint.config, without(checkpoint.tensors, name))
    assert name in str(caught.value)


@pytest.mark.parametrize("layer", [0, 4, 10])
def test_a_missing_layer_is_an_error(known: Known, real: Real, layer: int) -> None:
    learned, (_, checkpoint) = known("llama"), real("llama")
    with pytest.raises(ForgeError, match=rf"lacks whole layers, such as model\.layers\.{layer}$"):
        bind(learned, checkpoint.config, without(checkpoint.tensors, f"model.layers.{layer}."))


@pytest.mark.parametrize(
    ("model_type", "name", "shape"),
    [
        ("llama", "model.layers.3.mlp.down_proj.weight", (47, 48)),
        ("llama", "model.layers.3.mlp.down_proj.weight", (48, 47)),
        ("llama", "model.layers.3.input_layernorm.weight", (47,)),
        ("llama", "model.embed_tokens.weight", (263, 48)),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.2.w1.weight", (55, 48)),
        ("sarvam_moe", "model.layers.2.attention.query_key_value.weight", (95, 32)),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", (6, 31)),
    ],
)
def test_a_wrong_shape_is_named(known: Known, real: Real, model_type: str, name: str, shape: tuple[int, ...]) -> None:
    learned, (_, checkpoint) = known(model_type), real(model_type)
    with pytest.raises(ForgeError, match="stored as") as caught:
        bind(learned, checkpoint.config, {**checkpoint.tensors, **info(name, *shape)})
    assert name in str(caught.value)


def test_halves_that_are_too_short_together_are_an_error(known: Known, real: Real) -> None:
    learned, (_, checkpoint) = known("mixtral"), real("mixtral")
    short = {
        n: replace(t, shape=(55, 48)) for n, t in checkpoint.tensors.items() if n.endswith(("w1.weight", "w3.weight"))
    }
    with pytest.raises(ForgeError, match="stored as"):
        bind(learned, checkpoint.config, {**checkpoint.tensors, **short})


def test_the_vocabulary_is_that_of_the_table_that_tokens_are_looked_up_in(known: Known, real: Real) -> None:
    """Narrow token embeddings are no matrix of the stream, and other embeddings have other numbers of rows."""
    learned, (_, checkpoint) = known("gpt2"), real("gpt2")
    roles = tuple(
        replace(role, role=Role.EMBEDDING) if role.role is Role.POSITION else role
        for role in learned.roles
        if role.role is not Role.EMBEDDING
    )
    model_map = bind(replace(learned, roles=roles), checkpoint.config, checkpoint.tensors)
    (table,) = (matrix for matrix in model_map.matrices if matrix.role is Role.EMBEDDING)
    assert (table.shape[0], model_map.vocabulary) == (50, 264)


def test_a_tied_embedding_that_is_stored_as_the_head_alone() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    tensors = {n: t for name, p in model.named_parameters() for n, t in info(name, *p.shape).items()}
    stored = renamed(tensors, lambda name: name.replace("model.embed_tokens", "lm_head"))
    model_map = bind(by_hand.learned(model, by_hand.LLAMA), model.config.to_dict(), stored)
    assert model_map.tied
    embedding = by_tensor(model_map)["lm_head.weight"]
    assert (embedding.role, embedding.place.module) == (Role.EMBEDDING, "model.embed_tokens")


def test_a_prefix_of_a_training_wrapper_is_named(known: Known, real: Real) -> None:
    learned, (_, checkpoint) = known("llama"), real("llama")
    with pytest.raises(ForgeError, match="start with 'student\\.'") as caught:
        bind(learned, checkpoint.config, renamed(checkpoint.tensors, lambda name: f"student.{name}"))
    assert "removeprefix" in caught.value.hint


def test_tensors_of_another_architecture_are_refused_with_their_matrices(known: Known, real: Real) -> None:
    with pytest.raises(ForgeError, match=r"transformer\.h\.N\.attn\.c_attn\.weight \(x3\)"):
        bind(known("llama"), real("llama")[1].config, real("gpt2")[1].tensors)


def test_a_head_must_be_stored_or_tied(known: Known, real: Real) -> None:
    learned, (_, checkpoint) = known("llama"), real("llama")
    assert not bind_checkpoint(learned, checkpoint).tied
    with pytest.raises(ForgeError, match=r"lacks lm_head\.weight, and its config does not tie it"):
        bind(learned, checkpoint.config, without(checkpoint.tensors, "lm_head"))


@pytest.mark.parametrize("changed", [False, True])
def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path, changed: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    learned = by_hand.learned(model, by_hand.LLAMA)
    checkpoint = tiny.save(model, tmp_path)
    assert bind_checkpoint(learned, checkpoint).tied
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + changed
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model_map = bind_checkpoint(learned, Checkpoint(tmp_path, "copy", "folder"))
    head = by_tensor(model_map)["lm_head.weight"]
    assert (head.role, head.writes, head.layer, model_map.tied) == (Role.UNEMBEDDING, False, None, False)
    assert model_map.copies == ({} if changed else {"lm_head.weight": "model.embed_tokens.weight"})


def test_a_tensor_that_the_index_names_must_be_there(known: Known, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tiny.save(model, tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        index.read_text()
        .replace('"weight_map": {', '"weight_map": {"mtp.weight": "NAME",')
        .replace("NAME", sorted(tmp_path.glob("*.safetensors"))[0].name)
    )
    with pytest.raises(ForgeError, match=r"lacks 1 tensors that its index names, such as mtp\.weight"):
        bind_checkpoint(known("llama"), Checkpoint(tmp_path, "partial", "folder"))


class Block(nn.Module):
    """Experts as modules of a list, beside a list whose two members differ in what they are for."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(experts)])
        self.pair = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def test_a_bias_that_is_split_on_disk_like_its_weight() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(9, 4), "stack": nn.ModuleList([nn.ModuleDict({"in": nn.Linear(4, 6)})])}
    )
    fused = RoleFound(
        "stack.0.in.weight", "stack.0.in", writes=False, axis=1, block=0, bias="stack.0.in.bias", role=Role.GATE_UP,
        rows=((0, Role.GATE), (2, Role.GATE), (3, Role.UP), (5, Role.UP)),
    )  # fmt: skip
    words = RoleFound("words.weight", "words", writes=True, axis=1, role=Role.EMBEDDING)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = tuple(StoredParameter(name, shape, ()) for name, shape in shapes.items())
    learned = LearnedArchitecture(4, ("stack.0",), (words, fused), stored, ())
    halves, columns = {"gate": range(3), "up": range(3, 6)}, range(4)
    boxes = {
        "words.weight": [whole("words.weight", "words", (9, 4))],
        "stack.0.in.weight": [
            Box("stack.0.in.weight", half, (rows, columns), (range(3), columns), (0, 1), (rows, columns))
            for half, rows in halves.items()
        ],
        "stack.0.in.bias": [
            Box("stack.0.in.bias", f"{half}_bias", (rows,), (range(3),), (0,), (rows,)) for half, rows in halves.items()
        ],
    }
    tensors = {"words": (9, 4), "gate": (3, 4), "up": (3, 4), "gate_bias": (3,), "up_bias": (3,)}
    layout: Any = SimpleNamespace(
        parameters=shapes,
        counterparts=Counterparts(learned, model, shapes),
        boxes=boxes,
        tensors=tensors,
        nowhere=set(),
        head=None,
    )
    builder = MatrixBuilder(learned, layout)
    found = {matrix.tensor: matrix for matrix in builder.matrices()}
    assert builder.gaps == []
    assert {name: (found[name].role, found[name].bias, found[name].place.rows) for name in halves} == {
        "gate": (Role.GATE, "gate_bias", range(3)),
        "up": (Role.UP, "up_bias", range(3, 6)),
    }


def blocks_of(count: int, experts: int) -> nn.Module:
    return nn.ModuleDict({"stack": nn.ModuleList([Block(experts) for _ in range(count)])})


def of_lists(roles: list[tuple[str, bool]]) -> tuple[Counterparts, dict[str, Counterpart]]:
    """The counterparts of three blocks with five experts in a twin of two with two."""
    twin, model = blocks_of(2, 2), blocks_of(3, 5)
    found = tuple(
        RoleFound(f"stack.{block}.{name}.weight", f"stack.{block}.{name}", writes, 0 if writes else 1, role=Role.DOWN)
        for block in range(2)
        for name, writes in roles
    )
    parameters = tuple(StoredParameter(name, tuple(p.shape), ()) for name, p in twin.named_parameters())
    learned = LearnedArchitecture(4, ("stack.0", "stack.1"), found, parameters, ())
    counterparts = Counterparts(learned, model, [name for name, _ in model.named_parameters()])
    return counterparts, counterparts.found


def test_further_experts_of_a_list_are_like_the_first_ones() -> None:
    roles = [("experts.0", True), ("experts.1", True), ("pair.0", False), ("pair.2", True)]
    counterparts, found = of_lists(roles)
    assert counterparts.blocks == ("stack.0", "stack.1", "stack.2")
    assert counterparts.unclear == set()
    last = found["stack.2.experts.4.weight"]
    assert (last.twin, last.number, last.block) == ("stack.0.experts.0.weight", 4, "stack.2")
    assert last.renamed("stack.0.experts.0") == "stack.2.experts.4"
    assert last.renamed("stack.0.pair.2.bias") == "stack.2.pair.2.bias"
    assert last.renamed("stack.1.pair.2.bias") == "stack.3.pair.2.bias"
    assert found["stack.2.pair.2.weight"].twin == "stack.0.pair.2.weight"
    assert found["stack.2.pair.2.weight"].number is None


def test_experts_whose_like_has_no_role_are_not_passed_over() -> None:
    counterparts, found = of_lists([("experts.0", True)])
    assert counterparts.unclear == {f"stack.{block}.experts.{n}.weight" for block in range(3) for n in range(2, 5)}
    assert "stack.2.experts.3.weight" not in found

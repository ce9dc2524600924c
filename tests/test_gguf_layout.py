"""Where GGUF files hold tensors: what is learned without weights, against files that llama.cpp's script has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ollama_forge.architectures.gguf.file_layout import file_layout
from ollama_forge.architectures.gguf.hub_tensors import hub_shapes
from ollama_forge.architectures.gguf.learn_layout import layout_of, learn_layout
from ollama_forge.architectures.gguf.outputs import Output, check_complete
from ollama_forge.architectures.gguf.places import NotMovedError, Program, parts_of
from ollama_forge.architectures.gguf.session import ConverterSession, converter_session
from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf, value_of
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part, Steps, Stored
from ollama_forge.errors import ForgeError
from tests import families, tiny
from tests.converted import convert_all

_Configs = dict[str, Callable[[], PretrainedConfig]]
_SIZES: dict[str, Any] = {
    **families.SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _sized(model_type: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **{**_SIZES, **values})


MODELS: _Configs = {
    "llama": _sized("llama", attention_bias=True, rope_parameters=_SCALING),
    "mistral": _sized("mistral", head_dim=12),
    "qwen2": _sized("qwen2", tie_word_embeddings=True),
    "gpt2": partial(tiny.FAMILIES["gpt2"]),
    "gpt_neox": tiny.FAMILIES["gpt_neox"],
    "falcon": _sized("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "phi3": _sized("phi3"),
    "gemma2": _sized("gemma2", head_dim=8),
    "gemma3_text": _sized("gemma3_text", head_dim=8),
    "cohere2": _sized("cohere2", sliding_window=32),
    "mixtral": _sized("mixtral", num_local_experts=5),
    "qwen3_moe": _sized(
        "qwen3_moe", moe_intermediate_size=20, num_experts=6, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "gpt_oss": tiny.FAMILIES["gpt_oss"],
    "llama4_text": families.FAMILIES["llama4_text"],
    "deepseek_v3": _sized("deepseek_v3", **families.LATENT, **families.ROUTED),
    "qwen3_next": families.FAMILIES["qwen3_next"],
    "mamba": lambda: AutoConfig.for_model(
        "mamba", hidden_size=32, state_size=6, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, eos_token_id=1
    ),
}
_OLD_KEYS = {"gpt2": {"n_ctx": 512}, "gpt_neox": {"rotary_pct": 0.25}, "cohere2": {"rotary_pct": 1.0}}
"""Keys that the converter asks for, and transformers no longer writes."""
_FUNCTIONS: dict[Stored, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    Stored.SAME: lambda x: x,
    Stored.PLUS_ONE: lambda x: x + 1,
    Stored.MINUS_EXP: lambda x: -np.exp(x),
}


@pytest.fixture(scope="module")
def session() -> Iterator[ConverterSession]:
    with converter_session() as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``NAME`` and its conversion ``NAME.gguf`` for each model."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        tiny.save(model, folder / name)
    for name, values in _OLD_KEYS.items():
        content = json.dumps({**_config(folder, name), **values})
        (folder / name / "config.json").write_text(content, encoding="utf-8")
    convert_all({folder / name: folder / f"{name}.gguf" for name in MODELS})
    return folder


def _config(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    return content


def _values(file: Gguf, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in file.tensors if tensor.name == name)
    assert tensor.type.name == "F32"
    data = np.fromfile(file.path, dtype=np.float32, count=tensor.size // 4, offset=tensor.start)
    return data.reshape(tensor.shape[::-1])


def _placed(part: Part, shape: tuple[int, ...], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ``part`` says a GGUF tensor of this shape holds of a Hugging Face tensor."""
    sizes = (part.count, *shape[1:])
    index = []
    for first, steps in zip(part.first, part.steps, strict=True):
        along = np.full(sizes, first, dtype=np.int64)
        for step in steps:
            along += step.indices().reshape(-1, *[1] * (len(sizes) - step.axis - 1))
        index.append(along)
    return values[tuple(index)]


def _check_values(layout: GgufLayout, file: Gguf, checkpoint: dict[str, NDArray[np.float32]]) -> None:
    for name, parts in layout.parts.items():
        stored = _values(file, name)
        assert sum(part.count for part in parts) == (len(stored) if parts else 0)
        for part in parts:
            expected = _FUNCTIONS[part.stored](_placed(part, stored.shape, checkpoint[part.tensor]))
            held = stored[part.start : part.start + part.count]
            assert np.allclose(held, expected, rtol=1e-6, atol=0), (name, part)


@pytest.mark.parametrize("name", MODELS)
def test_every_value_of_the_file_is_where_the_layout_says(name: str, files: Path, session: ConverterSession) -> None:
    file = read_gguf(files / f"{name}.gguf")
    checkpoint = load_file(files / name / "model.safetensors")
    layout = file_layout(learn_layout(_config(files, name), session), file)
    assert dict(layout.shapes) == {tensor: values.shape for tensor, values in checkpoint.items()}
    _check_values(layout, file, checkpoint)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_from_the_config_are_those_that_are_saved(name: str, files: Path) -> None:
    checkpoint = load_file(files / name / "model.safetensors")
    assert hub_shapes(_config(files, name)) == {tensor: values.shape for tensor, values in checkpoint.items()}


def test_rotary_halves_are_digits_of_the_row_number(files: Path, session: ConverterSession) -> None:
    learned = learn_layout(_config(files, "llama"), session)
    (q,) = learned.outputs["blk.1.attn_q.weight"].parts
    (k,) = learned.outputs["blk.1.attn_k.bias"].parts
    assert q.steps == ((Steps(0, (4, 4, 2), (8, 1, 4)),), (Steps(1, (32,), (1,)),))
    assert k.steps == ((Steps(0, (2, 4, 2), (8, 1, 4)),),)
    assert learned.outputs["rope_freqs.weight"].parts == ()


def test_gains_and_decays_are_told_from_plain_values(files: Path, session: ConverterSession) -> None:
    gemma = learn_layout(_config(files, "gemma2"), session).outputs
    assert {part.stored for name in gemma if "norm" in name for part in gemma[name].parts} == {Stored.PLUS_ONE}
    assert {part.stored for name in gemma if "norm" not in name for part in gemma[name].parts} == {Stored.SAME}
    mamba = learn_layout(_config(files, "mamba"), session).outputs
    assert [name for name in mamba if mamba[name].parts[0].stored is Stored.MINUS_EXP] == [
        "blk.0.ssm_a",
        "blk.1.ssm_a",
    ]


def _with(file: Gguf, shapes: dict[str, tuple[int, ...] | None]) -> Gguf:
    """A file's table with tensors of other shapes (row length first), without some (None), or with new ones."""
    old = {tensor.name: tensor for tensor in file.tensors}
    table = {**{name: tensor.shape for name, tensor in old.items()}, **shapes}
    made = [replace(old.get(name, file.tensors[0]), name=name, shape=shape) for name, shape in table.items() if shape]
    return replace(file, tensors=tuple(made))


def test_vocabulary_and_tied_head_are_those_of_the_file(files: Path, session: ConverterSession) -> None:
    learned = learn_layout(_config(files, "qwen2"), session)
    file = read_gguf(files / "qwen2.gguf")
    for rows in (320, 200):
        layout = file_layout(learned, _with(file, {"token_embd.weight": (32, rows), "output.weight": (32, rows)}))
        assert layout.shapes["model.embed_tokens.weight"] == layout.shapes["lm_head.weight"] == (rows, 32)
        (part,) = layout.parts["output.weight"]
        assert part.count == rows
        assert part.steps[0] == (Steps(0, (rows,), (1,)),)
    assert "lm_head.weight" not in file_layout(learned, file).shapes


def test_experts_beyond_those_that_were_asked_about(files: Path, session: ConverterSession) -> None:
    config = {**_config(files, "qwen3_moe"), "num_local_experts": 40}
    output = learn_layout(config, session).outputs["blk.1.ffn_down_exps.weight"]
    assert output.shape == (40, 32, 20)
    assert [part.tensor for part in output.parts] == [
        f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(40)
    ]
    assert [part.start for part in output.parts] == list(range(40))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"blk.0.attn_norm.bias": (32,)}, "it has a tensor blk.0.attn_norm.bias"),
        ({"blk.1.ffn_up.weight": None}, "it has no tensor blk.1.ffn_up.weight"),
        ({"blk.1.ffn_up.weight": (32, 40)}, "blk.1.ffn_up.weight has the shape 40x32 instead of 48x32"),
        ({"token_embd.weight": (36, 261)}, "token_embd.weight has the shape 261x36 instead of 261x32"),
        ({"blk.2.nextn.eh_proj.weight": (64, 32)}, "it has a tensor blk.2.nextn.eh_proj.weight"),
    ],
)
def test_files_of_other_models_are_refused(
    shapes: dict[str, tuple[int, ...] | None], message: str, files: Path, session: ConverterSession
) -> None:
    learned = learn_layout(_config(files, "qwen2"), session)
    with pytest.raises(ForgeError, match=f"is not a file of this model: {message}$"):
        file_layout(learned, _with(read_gguf(files / "qwen2.gguf"), shapes))


def test_old_files_with_a_tensor_for_each_expert_are_refused(files: Path, session: ConverterSession) -> None:
    learned = learn_layout(_config(files, "mixtral"), session)
    old = _with(read_gguf(files / "mixtral.gguf"), {"blk.0.ffn_gate.0.weight": (32, 48)})
    with pytest.raises(ForgeError, match="which stored each expert apart") as error:
        file_layout(learned, old)
    assert error.value.hint.startswith("convert it again")


def test_what_is_not_the_models_own_may_be_there_or_not(files: Path, session: ConverterSession) -> None:
    llama = learn_layout(_config(files, "llama"), session)
    file = read_gguf(files / "llama.gguf")
    assert "rope_freqs.weight" not in file_layout(llama, _with(file, {"rope_freqs.weight": None})).parts
    further = _with(file, {"blk.2.nextn.eh_proj.weight": (64, 32)})
    counted = replace(further, metadata={**file.metadata, "llama.nextn_predict_layers": value_of(1)})
    assert file_layout(llama, counted).parts["blk.2.nextn.eh_proj.weight"] == ()


def test_leading_axes_of_size_1_may_be_dropped(files: Path, session: ConverterSession) -> None:
    learned = learn_layout(_config(files, "qwen3_next"), session)
    file = read_gguf(files / "qwen3_next.gguf")
    name = "blk.0.ffn_gate_inp_shexp.weight"
    (part,) = file_layout(learned, _with(file, {name: (48,)})).parts[name]
    assert (part.shape, part.start, part.count) == ((1, 48), 0, 48)
    assert part.steps == ((), (Steps(0, (48,), (1,)),))


def test_the_language_model_of_a_wrapper(session: ConverterSession) -> None:
    config = AutoConfig.for_model(
        "mistral3",
        text_config={**_SIZES, "model_type": "mistral"},
        vision_config={"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    ).to_dict()
    learned = learn_layout({**config, "architectures": ["Mistral3ForConditionalGeneration"]}, session)
    held = {part.tensor for output in learned.outputs.values() for part in output.parts}
    assert "blk.1.ffn_down.weight" in learned.outputs
    assert {name.partition(".")[0] for name in held} == {"language_model"}


def test_computed_values_are_refused_with_the_reason(files: Path, session: ConverterSession) -> None:
    learned = learn_layout(_config(files, "qwen2"), session)
    computed = replace(learned.outputs["output_norm.weight"], parts=(), computed="its values are computed")
    outputs = {**learned.outputs, "output_norm.weight": computed}
    with pytest.raises(ForgeError, match="holds no Hugging Face tensor as it is: its values are computed"):
        file_layout(replace(learned, outputs=outputs), read_gguf(files / "qwen2.gguf"))


@pytest.mark.parametrize(
    ("parts", "complete"),
    [
        ([(0, 4), (4, 2)], True),
        ([(4, 2), (0, 4)], True),
        ([(0, 4)], False),
        ([(0, 4), (3, 2)], False),
        ([(0, 6), (0, 6)], False),
    ],
)
def test_each_element_is_to_be_held_once(parts: list[tuple[int, int]], complete: bool) -> None:
    outputs = {}
    for number, (first, count) in enumerate(parts):
        steps = ((Steps(0, (count,), (1,)),), (Steps(1, (3,), (1,)),))
        outputs[f"g{number}"] = Output((count, 3), (Part("x", (6, 3), 0, count, (first, 0), steps),))
    with nullcontext() if complete else pytest.raises(ForgeError, match="does not hold each element of x once"):
        check_complete(outputs)


def test_a_layout_is_learned_once(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path))
    config, file = _config(files, "gpt_neox"), read_gguf(files / "gpt_neox.gguf")
    first = layout_of(config, file)
    monkeypatch.setattr("ollama_forge.architectures.cache._FOUND", {})
    monkeypatch.setattr("ollama_forge.architectures.gguf.learn_layout.converter_session", None)
    assert layout_of(config, file) == first


class _Lazy:
    """A lazy tensor as those of ``gguf``: a function of others."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._func, self._args, self._kwargs, self._data = function, args, {}, None

    def to_eager(self) -> None: ...


def _parts(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Part, ...]:
    program = Program()
    output = _Lazy(function, *(_Lazy(program.values, f"t{at}", shape) for at, shape in enumerate(shapes)))
    return parts_of(program, output, program.inputs(output)[1])


def test_parts_are_split_where_the_order_changes() -> None:
    def half_rotated(x: torch.Tensor) -> torch.Tensor:  # the first four of six rows of each head in another order
        heads = x.reshape(3, 6, 5)
        turned = heads[:, :4].reshape(3, 2, 2, 5).transpose(1, 2).reshape(3, 4, 5)
        return torch.cat([turned, heads[:, 4:]], dim=1).reshape(18, 5)

    parts = _parts(half_rotated, (18, 5))
    rows = np.concatenate([part.first[0] + part.steps[0][0].indices() for part in parts])
    assert rows.tolist() == half_rotated(torch.arange(18.0)[:, None].expand(18, 5))[:, 0].tolist()
    assert [part.start for part in parts] == np.cumsum([0, *(part.count for part in parts[:-1])]).tolist()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * 2, "computed"),
        (lambda x: (x[::2] + x[1::2]) / 2, "mixed"),
        (lambda x: torch.cat([x[:3], x[3:] + 1]), "computed in several ways"),
        (lambda x: x[:, [0, 3, 1, 2, 4, 5]], "columns are in no regular order"),
        (lambda x: torch.cat([x, x[:1].expand(2, 6)]), "twice"),
        (lambda x: torch.stack([x.diagonal()] * 6), "no regular order|twice"),
        (lambda x: torch.cat([x[:3], x[3:].flip(1)]), "no regular order"),
    ],
)
def test_values_that_are_not_only_moved_are_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(NotMovedError, match=reason):
        _parts(function, (6, 6))


def test_tensors_side_by_side_are_refused() -> None:
    with pytest.raises(NotMovedError, match="side by side"):
        _parts(lambda x, y: torch.cat([x, y], dim=1), (4, 3), (4, 3))


def test_only_what_is_made_in_the_same_way_is_taken_for_the_same() -> None:
    program = Program()

    def key(function: Callable[..., Any], name: str, shape: tuple[int, ...], *more: Any) -> str:
        return program.inputs(_Lazy(function, _Lazy(program.values, name, shape), *more))[0]

    plain = key(torch.transpose, "a", (4, 6), 0, 1)
    assert key(torch.transpose, "b", (4, 6), 0, 1) == plain
    others = [
        key(torch.transpose, "a", (6, 4), 0, 1),
        key(torch.transpose, "a", (4, 6), 0, 0),
        key(torch.narrow, "a", (4, 6), 0, 1),
        key(torch.transpose, "a", (4, 6), 0, torch.tensor(1)),
    ]
    assert plain not in others
    assert len(set(others)) == 4

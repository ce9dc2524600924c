"""Every element of a parameter is found where ``save_pretrained`` puts it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.architectures.learned import Piece, StoredParameter
from ollama_forge.architectures.names.locate import locate
from ollama_forge.architectures.twin.build import Twin
from tests import tiny
from tests.by_hand import tiny_model


def located(model: nn.Module) -> dict[str, StoredParameter]:
    return {stored.parameter: stored for stored in locate(Twin(model, {}, {}))}


def read_back(stored: StoredParameter, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter put together from its pieces; NaN where no piece has an element."""
    values = torch.full(stored.shape, float("nan"))
    for piece in stored.pieces:
        assert tuple(tensors[piece.tensor].shape) == piece.shape
        box = tensors[piece.tensor][np.ix_(*piece.stored)]
        kept = [axis for axis in piece.axes if axis is not None]
        left = [axis for axis in range(box.ndim) if axis not in kept]
        assert all(box.shape[axis] == 1 for axis in left)
        box = box.permute(*left, *kept).reshape([len(indices) for indices in piece.memory])
        values[np.ix_(*piece.memory)] = box
    return values


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: tiny.build(name)) for name in ("gpt2", "gpt_oss", "phi3", "gemma3", "falcon-new")},
    **{name: (lambda name=name: tiny_model(name)) for name in ("mixtral", "qwen3_moe", "nemotron_h", "sarvam_moe")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_can_be_put_together_from_its_pieces(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = located(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tensors = load_file(tmp_path / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert set(parameters) <= set(found)
    for name, parameter in parameters.items():
        assert found[name].shape == tuple(parameter.shape)
        if all(piece.axes for piece in found[name].pieces):
            assert torch.equal(read_back(found[name], tensors), parameter), name
    reordered = {name for name in parameters if not all(piece.axes for piece in found[name].pieces)}
    assert all("vision" in name or "visual" in name or "audio" in name for name in reordered)


def test_mixtral_is_split_into_a_file_name_for_each_expert_and_half() -> None:
    found = located(tiny_model("mixtral"))
    stored = found["model.layers.1.mlp.experts.gate_up_proj"]
    gate, up = (piece for piece in stored.pieces if piece.memory[0] == range(2, 3))
    name = "model.layers.1.block_sparse_moe.experts.2."
    whole = (range(48), range(32))
    assert gate == Piece(f"{name}w1.weight", (48, 32), (range(2, 3), range(48), range(32)), whole, (None, 0, 1))
    assert up == Piece(f"{name}w3.weight", (48, 32), (range(2, 3), range(48, 96), range(32)), whole, (None, 0, 1))
    assert len(stored.pieces) == 8


def test_parameters_that_one_tensor_holds_have_their_rows() -> None:
    found = located(tiny_model("sarvam_moe"))
    rows = {name: found[f"model.layers.1.self_attn.{name}_proj.weight"].pieces for name in "qkv"}
    assert {name: [piece.stored[0] for piece in pieces] for name, pieces in rows.items()} == {
        "q": [range(32)],
        "k": [range(32, 48)],
        "v": [range(48, 64)],
    }
    assert {piece.tensor for pieces in rows.values() for piece in pieces} == {
        "model.layers.1.attention.query_key_value.weight"
    }


def test_a_tied_head_is_the_embedding() -> None:
    found = located(tiny.build("gpt2"))
    assert "lm_head.weight" not in found
    assert found["transformer.wte.weight"].pieces[0].tensor == "transformer.wte.weight"


class Odd(nn.Module):
    """Its files hold one parameter transposed, one interleaved, one reversed, one twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(5, 5))
        self.woven = nn.Parameter(torch.randn(8, 3))
        self.unwoven = nn.Parameter(torch.randn(8, 3))
        self.reversed = nn.Parameter(torch.randn(6))
        self.twice = nn.Parameter(torch.randn(4))
        self.hidden = nn.Parameter(torch.randn(4))
        self.halved = nn.Parameter(torch.randn(4))
        self.changed = nn.Parameter(torch.randn(4))
        self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("table", torch.full((3,), float("nan")))
        self.register_buffer("working", torch.ones(3), persistent=False)

    def save_pretrained(self, folder: str) -> None:
        woven = torch.stack([self.woven[:4], self.woven[4:]], dim=1).flatten(0, 1)
        tensors = {
            "turned": self.turned.T.contiguous(),
            "woven": woven,
            "even": self.unwoven[0::2].clone(),
            "odd": self.unwoven[1::2].clone(),
            "reversed": self.reversed.flip(0),
            "twice": self.twice.clone(),
            "again": self.twice.clone(),
            "halved": self.halved[:2].clone(),
            "changed": self.changed.exp(),
            "scalar": self.scalar.clone(),
            "table": self.table,
        }
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors")


def test_any_order_on_disk() -> None:
    torch.manual_seed(0)
    model = Odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = located(model)
    assert found["turned"].pieces == (Piece("turned", (5, 5), (range(5),) * 2, (range(5),) * 2, (1, 0)),)
    assert [piece.stored[0] for piece in found["woven"].pieces] == [range(0, 7, 2), range(1, 8, 2)]
    assert [piece.memory[0] for piece in found["woven"].pieces] == [range(4), range(4, 8)]
    assert {piece.tensor: piece.memory[0] for piece in found["unwoven"].pieces} == {
        "even": range(0, 7, 2),
        "odd": range(1, 8, 2),
    }
    assert {piece.tensor for piece in found["twice"].pieces} == {"twice", "again"}
    assert found["hidden"].pieces == ()
    assert found["changed"].pieces == ()
    assert found["halved"].pieces == ()
    assert found["reversed"].pieces == (Piece("reversed", (6,), (), (), ()),)  # no boxes: every element on its own
    assert found["scalar"].pieces[0].tensor == "scalar"
    assert found["table"].pieces[0].tensor == "table"
    assert "working" not in found
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name not in ("hidden", "halved", "changed", "reversed", "scalar"):
            assert torch.equal(read_back(found[name], tensors), parameter), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


def test_a_twin_with_more_elements_than_float32_has_integers_is_numbered_in_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=300, num_attention_heads=2
        )
    )
    at_once = locate(Twin(model, {}, {}))
    monkeypatch.setattr("ollama_forge.architectures.names.locate._ROOM", 1000)  # the embedding alone has 4,800 elements
    assert locate(Twin(model, {}, {})) == at_once
    assert all(stored.pieces for stored in at_once)

"""Readers and writers of tiny models, found by experiment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    PretrainedConfig,
)

from ollama_forge.architectures.learned import NormFound, RoleFound
from ollama_forge.architectures.roles.find import Found, find_roles
from tests.made_up import VOCABULARY, Blurb, D, F, MadeUp, Zed, twin_of

_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": VOCABULARY}
_SIZES: dict[str, Any] = {
    **_IDS,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "gpt2": GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=32, **_IDS),
    "gemma2": Gemma2Config(**_SIZES, head_dim=8),
    "olmo": OlmoConfig(**_SIZES),
    "olmo2": Olmo2Config(**_SIZES),
    "mixtral": MixtralConfig(**_SIZES, **_EXPERTS),
    "gpt_oss": GptOssConfig(**_SIZES, head_dim=8, **_EXPERTS),
    "granite": GraniteConfig(
        **_SIZES, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015, logits_scaling=8.0
    ),
}


def found_in(family: str) -> Found:
    return find_roles(twin_of(AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)))


def role(found: Found, parameter: str, *, writes: bool) -> RoleFound:
    (only,) = [r for r in found.roles if r.parameter == parameter and r.writes == writes]
    return only


def names(found: Found, *, writes: bool, block: int | None) -> set[str]:
    return {r.parameter for r in found.roles if r.writes == writes and r.block == block}


def test_llama() -> None:
    found = found_in("llama")
    assert found.blocks == ("model.layers.0", "model.layers.1")
    assert (found.d_model, found.gaps) == (D, ())
    assert names(found, writes=True, block=None) == {"model.embed_tokens.weight"}
    for block in (0, 1):
        layer = f"model.layers.{block}"
        writers = {f"{layer}.self_attn.o_proj.weight", f"{layer}.mlp.down_proj.weight"}
        assert names(found, writes=True, block=block) == writers
        attention = {f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"}
        mlp = {f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up")}
        assert names(found, writes=False, block=block) == attention | mlp
        for reader in attention | mlp:
            norm = f"{layer}.{'input' if reader in attention else 'post_attention'}_layernorm"
            read = role(found, reader, writes=False)
            assert read.norms == (NormFound(norm, f"{norm}.weight", 0.0, centred=False),)
            assert (read.axis, read.linear, read.stream_at, read.expert_axis) == (1, True, (0,), None)
        for writer in writers:
            wrote = role(found, writer, writes=True)
            assert (wrote.axis, wrote.linear, wrote.norms, wrote.bias) == (0, True, (), None)
            assert wrote.module == writer.removesuffix(".weight")
    embedding = role(found, "model.embed_tokens.weight", writes=True)
    assert (embedding.axis, embedding.linear, embedding.norms) == (1, True, ())


def test_square_matrices_biases_and_positions() -> None:
    found = found_in("gpt2")
    assert found.gaps == ()
    assert names(found, writes=True, block=None) == {"transformer.wte.weight", "transformer.wpe.weight"}
    square = role(found, "transformer.h.0.attn.c_proj.weight", writes=True)  # [d, d], in by out
    assert (square.axis, square.bias, square.linear) == (1, "transformer.h.0.attn.c_proj.bias", True)
    reader = role(found, "transformer.h.1.mlp.c_fc.weight", writes=False)
    norm = NormFound("transformer.h.1.ln_2", "transformer.h.1.ln_2.weight", 0.0, True, "transformer.h.1.ln_2.bias")
    assert (reader.axis, reader.bias, reader.norms) == (0, "transformer.h.1.mlp.c_fc.bias", (norm,))


def test_post_norms_with_an_offset() -> None:
    found = found_in("gemma2")
    assert found.gaps == ()
    assert role(found, "model.embed_tokens.weight", writes=True).linear  # a hook may stand for it: scaled by a constant
    writer, layer = role(found, "model.layers.1.mlp.down_proj.weight", writes=True), "model.layers.1"
    post, pre = f"{layer}.post_feedforward_layernorm", f"{layer}.pre_feedforward_layernorm"
    assert writer.norms == (NormFound(post, f"{post}.weight", 1.0, centred=False),)
    reader = role(found, "model.layers.1.mlp.up_proj.weight", writes=False)
    assert reader.norms == (NormFound(pre, f"{pre}.weight", 1.0, centred=False),)


def test_readers_without_a_norm() -> None:
    found = found_in("olmo2")
    assert found.gaps == ()
    assert all(r.norms == () for r in found.roles if not r.writes)
    norms = role(found, "model.layers.0.self_attn.o_proj.weight", writes=True).norms
    assert [(norm.gain, norm.offset) for norm in norms] == [("model.layers.0.post_attention_layernorm.weight", 0.0)]


def test_a_norm_without_a_weight() -> None:
    found = found_in("olmo")
    assert found.gaps == ()
    (norm,) = role(found, "model.layers.0.self_attn.q_proj.weight", writes=False).norms
    assert norm == NormFound("model.layers.0.input_layernorm", None, 0.0, centred=True)


def test_multipliers() -> None:
    found = found_in("granite")
    assert found.gaps == ()
    assert len(found.roles) == 1 + 2 * 7
    assert all(r.norms == () for r in found.roles if r.writes)


@pytest.mark.parametrize(("family", "axes"), [("mixtral", (1, 2)), ("gpt_oss", (2, 1))])
def test_stacked_experts(family: str, axes: tuple[int, int]) -> None:
    found = found_in(family)
    assert found.gaps == ()
    stack = "model.layers.0.mlp.experts"
    down = role(found, f"{stack}.down_proj", writes=True)
    gate_up = role(found, f"{stack}.gate_up_proj", writes=False)
    assert (down.axis, gate_up.axis) == axes
    assert (down.expert_axis, gate_up.expert_axis) == (0, 0)
    assert not down.linear
    has_bias = family == "gpt_oss"
    assert down.bias == (f"{stack}.down_proj_bias" if has_bias else None)
    assert gate_up.bias == (f"{stack}.gate_up_proj_bias" if has_bias else None)


def test_a_made_up_class() -> None:
    found = find_roles(twin_of(MadeUp()))
    assert found.blocks == ("stones.0", "stones.1")
    assert found.gaps == ()
    assert names(found, writes=True, block=None) == {"bloop.weight", "where"}
    assert names(found, writes=True, block=1) == {"stones.1.snee.weight", "stones.1.omega", "stones.1.speck"}
    assert names(found, writes=False, block=1) == {"stones.1.grob.weight", "stones.1.alpha"}
    snee = role(found, "stones.1.snee.weight", writes=True)
    assert (snee.axis, snee.bias) == (0, "stones.1.snee.bias")
    assert snee.norms == (NormFound("stones.1.post", "stones.1.post.ploy", 1.0, centred=False),)
    grob = role(found, "stones.1.grob.weight", writes=False)
    assert grob.bias == "stones.1.grob.bias"
    assert grob.norms == (NormFound("stones.1.pre", "stones.1.pre.ploy", 0.0, True, "stones.1.pre.quip"),)
    bare = [role(found, "stones.1.alpha", writes=False), role(found, "stones.1.omega", writes=True)]
    assert [(r.axis, r.norms, r.linear, r.module) for r in bare] == [
        (0, (), False, "stones.1"),
        (1, (), False, "stones.1"),
    ]
    assert (role(found, "stones.1.speck", writes=True).axis, role(found, "where", writes=True).axis) == (0, 2)


def test_the_bias_of_a_post_norm_writes() -> None:
    found = find_roles(twin_of(MadeUp(lambda: Blurb(post=Zed(centred=True, bias=True)))))
    assert found.gaps == ()
    assert "stones.0.post.quip" in names(found, writes=True, block=0)
    (norm,) = role(found, "stones.0.snee.weight", writes=True).norms
    assert (norm.centred, norm.bias) == (True, "stones.0.post.quip")


def test_a_looped_block_counts_once() -> None:
    found = find_roles(twin_of(MadeUp(order=(0, 1, 0, 1))))
    assert found.blocks == ("stones.0", "stones.1")
    assert found.gaps == ()


class _Experts(nn.Module):
    """Experts whose stack has two equal axes: features by experts by stream."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(D, 6)
        self.into, self.out = nn.Parameter(torch.ones(D, 6, 6)), nn.Parameter(torch.ones(6, 6, D))

    def forward(self, x: Tensor) -> Tensor:
        best = self.chooser(x).topk(2).indices
        chosen = torch.zeros(*x.shape[:-1], 6).scatter(-1, best, 1.0)
        return x + self.work(x, chosen)

    def work(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("btd,dfe->btfe", x, self.into)) * chosen[:, :, None, :]
        return torch.einsum("btfe,fed->btd", hidden, self.out)


def test_the_axis_of_experts_by_behaviour() -> None:
    found = find_roles(twin_of(MadeUp(_Experts)))
    assert found.gaps == ()
    assert [(r.axis, r.expert_axis) for r in found.roles if r.parameter == "stones.0.out"] == [(2, 1)]


class _Convolved(nn.Module):
    """A block whose writer is behind a short convolution of three tokens and its own skip."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.grob, self.snee = Zed(), nn.Linear(D, F), nn.Linear(F, D, bias=False)
        self.conv = nn.Conv1d(D, D, 3, groups=D, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.snee(torch.tanh(self.grob(self.pre(x))))
        return x + y + self.conv(y.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2)


def test_a_writer_behind_a_short_convolution() -> None:
    found = find_roles(twin_of(MadeUp(_Convolved)))
    assert found.gaps == ()
    norms = role(found, "stones.0.snee.weight", writes=True).norms
    assert {(n.module, n.gain, n.offset, n.column) for n in norms} == {
        ("", "stones.0.conv.weight", 1.0, 2),
        ("", "stones.0.conv.weight", 0.0, 1),
        ("", "stones.0.conv.weight", 0.0, 0),
    }


class _Spare(nn.Linear):
    """A linear layer that also owns a matrix it does not use."""

    def __init__(self) -> None:
        super().__init__(D, F)
        self.spare = nn.Parameter(torch.ones(3, D))


class _WithSpare(Blurb):
    def __init__(self) -> None:
        super().__init__()
        self.grob = _Spare()


def test_an_unused_matrix_of_the_streams_width_is_no_reader() -> None:
    found = find_roles(twin_of(MadeUp(_WithSpare)))
    assert names(found, writes=False, block=0) == {"stones.0.grob.weight", "stones.0.alpha"}


class _Odd(Blurb):
    """A block with one thing more, that the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(D, D)
        self.table = nn.Parameter(torch.ones(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more(x)

    def more(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _Squared(_Odd):
    def more(self, x: Tensor) -> Tensor:
        return self.extra(torch.ones_like(x)).square()


class _Reshaped(_Odd):
    def more(self, x: Tensor) -> Tensor:
        return self.table.reshape(D)


class _Turned(_Odd):
    def more(self, x: Tensor) -> Tensor:
        return 0.1 * x.flip(-1)


class _ReadsATwist(_Odd):
    def more(self, x: Tensor) -> Tensor:
        return self.extra(x.square())


class _Normed(_Odd):
    def __init__(self) -> None:
        super().__init__()
        self.last = Zed()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


class _Idle(_Odd):
    """It calls ``extra`` on another kind of input only."""


@pytest.mark.parametrize(
    ("block", "module", "about"),
    [
        (_Squared, "stones.0.extra", "writers"),
        (_Reshaped, "stones.0", "writers"),
        (_Turned, "stones.0", "stream"),
        (_ReadsATwist, "stones.0.extra", "readers"),
        (_Normed, "stones.0", "stream"),
        (_Idle, "stones.0.extra", "idle"),
        (lambda: Blurb(post=Zed(exp=True)), "stones.0.post", "writers"),
        (lambda: Blurb(pre=Zed(exp=True)), "stones.0.pre", "readers"),
    ],
)
def test_what_cannot_be_proven_is_a_gap(block: Any, module: str, about: str) -> None:
    found = find_roles(twin_of(MadeUp(block)))
    assert (module, about) in {(gap.module, gap.about) for gap in found.gaps}
    assert all(gap.reason and str(gap).startswith(gap.module) for gap in found.gaps)


def test_a_stream_that_changes_between_blocks_is_a_gap() -> None:
    class Between(MadeUp):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            x = self.stones[0](self.bloop(input_ids)).roll(1, dims=-1)
            return self.maw(self.stones[1](x))[None]

    gaps = find_roles(twin_of(Between())).gaps
    assert [(gap.module, gap.about) for gap in gaps] == [("stones.1", "stream")]


def test_a_class_without_blocks_is_a_gap() -> None:
    class Flat(MadeUp):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            return self.maw(self.bloop(input_ids))[None]

    found = find_roles(twin_of(Flat()))
    assert (found.blocks, found.roles, [gap.about for gap in found.gaps]) == ((), (), ["stream"])


def test_the_model_is_left_as_it_was() -> None:
    twin = twin_of(MadeUp(_Odd))
    before = {name: value.clone() for name, value in twin.model.state_dict().items()}
    first = find_roles(twin)
    assert all(torch.equal(value, before[name]) for name, value in twin.model.state_dict().items())
    assert find_roles(twin) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())


def test_an_error_leaves_no_hooks_and_no_nudge() -> None:
    class Fails(Blurb):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Fails.runs += 1
            if Fails.runs > 20:
                raise RuntimeError("broken")
            return super().forward(x)

    twin = twin_of(MadeUp(Fails))
    before = {name: value.clone() for name, value in twin.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"):
        find_roles(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in twin.model.state_dict().items())

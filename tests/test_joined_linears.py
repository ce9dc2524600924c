"""Layers that read the same input are found by running the model, and their joined product gives what each gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ollama_forge.models import joined_linears
from ollama_forge.models.cpu_packing import PackedForward, pack_linears, packed_layers
from ollama_forge.models.joined_linears import JoinedLinears
from ollama_forge.serving.engine.model_runner import difference
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import tiny
from tests.engines import greedy, load, prompt, running, together

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 products"
)

IDS = torch.arange(3, 12).view(1, -1)
ROUNDING = 0.05  # of the logits' spread; another layer's output makes it about 1


def packed(family: str) -> nn.Module:
    module = tiny.build(family).bfloat16()
    pack_linears(module)
    return module


def names(module: nn.Module, joined: JoinedLinears) -> set[tuple[str, ...]]:
    """The names of the layers in each group, without the path of their layer."""
    paths = {id(part): path for path, part in module.named_modules()}
    return {tuple(paths[id(linear)].split(".")[-1] for linear in group) for group in joined.groups}


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", {ATTENTION, MLP}),
        ("qwen2", {ATTENTION, MLP}),  # with biases
        ("gemma2", {ATTENTION, MLP}),
        ("gpt_neox", set()),  # one matrix for queries, keys and values already
    ],
)
@torch.inference_mode()
def test_the_layers_that_share_an_input_are_joined(family: str, groups: set[tuple[str, ...]]) -> None:
    module = packed(family)
    before = module(input_ids=IDS).logits
    joined = JoinedLinears(module, lambda: module(input_ids=IDS))
    assert names(module, joined) == groups
    assert len(joined.groups) == len(groups) * module.config.num_hidden_layers  # type: ignore[union-attr]
    calls: list[tuple[int, ...]] = []
    call = PackedForward.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedForward, "__call__", lambda self, input: calls.append(input.shape) or call(self, input))
        after = module(input_ids=IDS).logits
    assert float(difference(after, before).max()) < ROUNDING
    assert len(calls) == len(packed_layers(module)) - sum(len(group) - 1 for group in joined.groups)
    joined.undo()
    assert torch.equal(module(input_ids=IDS).logits, before)


class Layers(nn.Module):
    """Four layers; what their inputs are is the tests'."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(3))
        self.d = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)


class Changing(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = self.a(x)
        x.view(-1)[:32].add_(1)
        return first + self.b(x) + self.c(x)


class Repeating(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x) + self.a(self.b(x))


class Mixed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.d(x) + self.b(x) + self.c(x.clone())


@pytest.mark.parametrize(("kind", "groups"), [(Changing, ["bc"]), (Repeating, []), (Mixed, ["ab"])])
@torch.inference_mode()
def test_only_layers_that_surely_share_an_input_are_joined(kind: type[Layers], groups: list[str]) -> None:
    module = kind()
    pack_linears(module)
    x = torch.randn(5, 32).bfloat16()
    before = module(x)
    joined = JoinedLinears(module, lambda: module(torch.randn(3, 32).bfloat16()))
    letters = {id(getattr(module, name)): name for name in "abcd"}
    assert ["".join(letters[id(linear)] for linear in group) for group in joined.groups] == groups
    assert torch.allclose(module(x).float(), before.float(), atol=0.05)


@torch.inference_mode()
def test_a_run_that_goes_another_way_gets_the_product_of_its_own_input() -> None:
    module = Mixed()
    pack_linears(module)
    expected = {name: getattr(module, name) for name in "ab"}
    x, y = torch.randn(2, 5, 32).bfloat16().unbind()
    plain = {(name, key): layer(value) for name, layer in expected.items() for key, value in (("x", x), ("y", y))}
    assert JoinedLinears(module, lambda: module(x)).groups
    for name, key in (("b", "x"), ("a", "x"), ("b", "y"), ("b", "x"), ("a", "y"), ("a", "y"), ("b", "y")):
        output = getattr(module, name)(x if key == "x" else y)
        assert torch.allclose(output.float(), plain[name, key].float(), atol=0.05), (name, key)
        assert output.is_contiguous()
    x.add_(1)  # a tensor that is filled anew for each run
    module.a(x)
    assert torch.allclose(
        module.b(x).float(), nn.functional.linear(x, module.b.weight, module.b.bias).float(), atol=0.1
    )


@torch.inference_mode()
def test_without_memory_for_the_weights_twice_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    module = packed("llama")
    monkeypatch.setattr(joined_linears, "memory_available", lambda device: 1000)
    assert not JoinedLinears(module, lambda: module(input_ids=IDS)).groups


def test_the_engine_joins_them_and_gives_up_what_changes_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joined_in(engine: TransformersEngine) -> int:
        forwards = [linear.__dict__["forward"] for linear in packed_layers(engine.model.module)]
        return sum(isinstance(forward, joined_linears._JoinedForward) for forward in forwards)

    requests = [greedy(prompt(length, length), 6) for length in (9, 20, 5)]
    model = load(tmp_path, dtype="bfloat16")
    layers = len(model.model_map.layers)
    with running(model) as engine:
        assert joined_in(engine) == 5 * layers
        assert [len(answer) for answer in together(engine, requests)] == [6, 6, 6]
    output = joined_linears._Product.output
    monkeypatch.setattr(joined_linears._Product, "output", lambda self, index, x: output(self, index, x).flip(-1))
    with running(load(tmp_path, dtype="bfloat16")) as engine:
        assert joined_in(engine) == 0

"""Least squares of experts: the inputs of each one, its key, the budget, and what cannot be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ollama_forge.activations import writer_inputs
from ollama_forge.activations.matrix_inputs import MatrixInputs
from ollama_forge.activations.samples import LAST_POSITIONS, Kind, Samples, harmful_samples, harmless_samples
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.model_map import Matrix, Place
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors
from ollama_forge.edits.least_squares import PRIOR_ROWS, RIDGE, ExpertPool, fit_keys, fit_least_squares
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.matrices import weight_of
from ollama_forge.text.tokenizer import Ids
from tests import moe, tiny

LAYER = 1
Rows = dict[int, list[Tensor]]


@pytest.fixture(scope="module", params=moe.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return moe.load(*moe.saved(family, tmp_path_factory.mktemp(family)))


def prompts(model: ChatModel, seed: int) -> list[Ids]:
    return model.tokenizer.instructions_ids(tiny.lines(7, seed))


def sampled(model: ChatModel) -> tuple[Samples, Samples]:
    answers = [ids[:5] for ids in prompts(model, 3)]
    return harmful_samples(prompts(model, 1)), harmless_samples(prompts(model, 2), answers)


def gathered(model: ChatModel, budget: int = writer_inputs.BUDGET) -> list[dict[str, list[WriterInputs]]]:
    return list(gather_writer_inputs(model, model.model_map.writers, *sampled(model), budget=budget))


def experts_of_layer(model: ChatModel, groups: list[dict[str, list[WriterInputs]]]) -> list[WriterInputs]:
    """The inputs of each routed expert of a layer, in the order of the experts."""
    merged = {name: inputs for group in groups for name, inputs in group.items()}
    writers = [m for m in model.model_map.writers if m.layer == LAYER and m.is_expert]
    return [inputs for writer in writers for inputs in merged[writer.tensor]]


def activated(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The input of an expert's down matrix, as each class computes it."""
    weight = module.gate_up_proj[expert]  # type: ignore[index]
    name = type(module).__name__
    if name == "GptOssExperts":
        return module._apply_gate(x @ weight + module.gate_up_proj_bias[expert])  # type: ignore[index, operator, no-any-return]
    gate, up = (x @ weight if name == "Llama4TextExperts" else functional.linear(x, weight)).chunk(2, dim=-1)
    return functional.silu(gate) * up


@torch.inference_mode()
def wanted_rows(model: ChatModel, prompt: Ids, positions: Sequence[int]) -> Rows:
    """The inputs of a layer's experts at some positions of a prompt, from what its experts' module takes in."""
    seen: list[tuple[Tensor, ...]] = []
    module = next(m for n, m in model.layer(LAYER).named_modules() if n.endswith(".experts"))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    model.module(input_ids=torch.tensor([prompt]))
    handle.remove()
    rows: Rows = {expert: [] for expert in range(moe.EXPERTS)}
    for position in positions:
        if len(seen[0]) == 1:  # every expert takes in all tokens, times a score that is mostly zero
            entering = seen[0][0].view(moe.EXPERTS, len(prompt), -1)[:, position]
            chosen = [(expert, entering[expert]) for expert in range(moe.EXPERTS) if entering[expert].any()]
        else:
            entering, index = seen[0][0].view(len(prompt), -1)[position], seen[0][1].view(len(prompt), -1)
            chosen = [(int(expert), entering) for expert in index[position]]
        for expert, x in chosen:
            rows[expert].append(activated(module, expert, x))
    return rows


def rows_of(model: ChatModel, ids: list[Ids], positions: list[list[int]]) -> Rows:
    """The inputs of a layer's experts at some positions of each prompt."""
    found: Rows = {expert: [] for expert in range(moe.EXPERTS)}
    for prompt, chosen in zip(ids, positions, strict=True):
        for expert, rows in wanted_rows(model, prompt, chosen).items():
            found[expert] += rows
    return found


def last_positions(ids: list[Ids]) -> list[list[int]]:
    return [list(range(len(prompt) - LAST_POSITIONS, len(prompt))) for prompt in ids]


def test_each_expert_is_seen_with_the_rows_routed_to_it(model: ChatModel) -> None:
    harmful = prompts(model, 1)
    wanted = rows_of(model, harmful, last_positions(harmful))
    assert len({len(rows) for rows in wanted.values()}) > 1
    for expert, inputs in enumerate(experts_of_layer(model, gathered(model))):
        assert len(inputs.harmful) == len(wanted[expert])
        rows = torch.stack(wanted[expert])
        torch.testing.assert_close(inputs.harmful.T @ inputs.harmful, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_harmless_rows_of_an_expert_are_an_average(model: ChatModel) -> None:
    """Over the sampled positions that are routed to it, each kind with the same weight over all experts."""
    harmless = sampled(model)[1]
    seen = {kind: rows_of(model, harmless.sequences, harmless.positions[kind]) for kind in Kind}
    last = seen[Kind.LAST]
    for expert, inputs in enumerate(experts_of_layer(model, gathered(model))):
        assert inputs.harmless_last == len(last[expert])
        torch.testing.assert_close(inputs.harmless_last_mean, torch.stack(last[expert]).mean(0), rtol=1e-4, atol=1e-5)
        rows = torch.stack([row for kind in Kind for row in seen[kind][expert]])
        weights = torch.tensor([1 / harmless.counts[kind] for kind in Kind for _ in seen[kind][expert]])
        found = inputs.harmless_rows
        assert found is not None
        torch.testing.assert_close(found.T @ found, (rows.T * weights) @ rows / weights.sum(), rtol=1e-4, atol=1e-5)


def test_a_small_budget_takes_more_passes_to_the_same_rows(model: ChatModel) -> None:
    whole, parts = gathered(model), gathered(model, budget=60_000)
    assert len(whole) == 1
    assert len(parts) > 1
    experts = [w for w in model.model_map.writers if w.is_expert]
    layers = [{w.layer for w in experts if w.tensor in part} for part in parts]
    assert sum(map(len, layers)) == len({w.layer for w in experts})  # the experts of a layer come together
    for inputs, wanted in zip(experts_of_layer(model, parts), experts_of_layer(model, whole), strict=True):
        assert torch.equal(inputs.harmful, wanted.harmful)
        assert torch.equal(inputs.harmless_last_mean, wanted.harmless_last_mean)


def test_groups_fit_the_budget(model: ChatModel) -> None:
    budget = 60_000
    for group in gathered(model, budget=budget):
        tensors = [
            part
            for inputs in group.values()
            for one in inputs
            for part in (one.harmful, one.harmless_last_mean, one.harmless_rows, one.harmless_moment)
            if part is not None
        ]
        assert sum(part.nbytes for part in tensors) < 1.2 * budget or len(group) == 1


def fitted(model: ChatModel) -> dict[str, FixedFactors]:
    values = dict(model.module.state_dict())
    direction = {"r": RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)}
    weight = partial(weight_of, model)
    return fit_least_squares(model.model_map, direction, gathered(model), weight, lambda name: values[name].float())[
        "r"
    ]


def test_each_expert_has_the_key_of_its_rows(model: ChatModel) -> None:
    factors, r = fitted(model), tiny.unit_vector()
    merged = {name: inputs for group in gathered(model) for name, inputs in group.items()}
    writers = [m for m in model.model_map.writers if m.layer == LAYER and m.is_expert]
    pairs = [
        (inputs, r @ weight_of(model, writer, expert if writer.experts else None))
        for writer in writers
        for expert, inputs in enumerate(merged[writer.tensor])
    ]
    pool = ExpertPool.of([(inputs, projection.unsqueeze(0)) for inputs, projection in pairs])
    keys = torch.cat([factors[w.tensor].K if w.experts else factors[w.tensor].K.unsqueeze(0) for w in writers])
    assert len(keys) == moe.EXPERTS
    for key, (inputs, projection) in zip(keys, pairs, strict=True):
        torch.testing.assert_close(key[:, 0], plain_key(inputs, projection, pool), rtol=1e-3, atol=1e-5)


def plain_key(inputs: WriterInputs, projection: Tensor, pool: ExpertPool) -> Tensor:
    """The key by a general solver in float64."""
    harmful, rows = inputs.harmful.double(), inputs.harmless_rows
    assert rows is not None
    moment = harmful.T @ harmful / len(harmful) + rows.double().T @ rows.double()
    rho = RIDGE * moment.diagonal().mean() + PRIOR_ROWS / len(harmful) * pool.mean_square
    own, last = projection.double() @ inputs.harmless_last_mean.double(), inputs.harmless_last
    baseline = (last * own + PRIOR_ROWS * float(pool.baseline)) / (last + PRIOR_ROWS)
    target = harmful @ projection.double() - baseline
    return torch.linalg.solve(moment + rho * torch.eye(len(moment)), harmful.T @ target / len(harmful)).float()


def test_an_expert_shrinks_the_less_it_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    harmful, harmless = (torch.randn(200, 6, generator=generator) for _ in range(2))
    projection = torch.randn(1, 6, generator=generator)
    whole = WriterInputs(harmful, torch.zeros(6), 200, None, harmless / 200**0.5)
    pool = ExpertPool.of([(whole, projection)])
    fewer = [replace(whole, harmful=harmful[:1].expand(count, -1)) for count in (0, 1, 4, 100)]
    sizes = [float(fit_keys(inputs, projection, pool).norm()) for inputs in fewer]
    assert sizes[0] == 0.0
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.6 * sizes[3]


def test_an_expert_without_harmless_prompts_takes_the_mean_of_its_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, projections = torch.randn(2, 50, 6, generator=generator), torch.randn(2, 1, 6, generator=generator)
    seen = WriterInputs(rows[0], torch.ones(6), 50, None, rows[0] / 50**0.5)
    blind = WriterInputs(rows[1], torch.zeros(6), 0, None, torch.zeros(0, 6))
    pool = ExpertPool.of([(seen, projections[0]), (blind, projections[1])])
    torch.testing.assert_close(pool.baseline, projections[0] @ torch.ones(6))
    wanted = plain_key(blind, projections[1][0], pool)
    torch.testing.assert_close(fit_keys(blind, projections[1], pool)[0], wanted, rtol=1e-3, atol=1e-5)
    assert (
        wanted - plain_key(blind, projections[1][0], replace(pool, baseline=torch.zeros(1)))
    ).norm() > 0.05 * wanted.norm()


def test_rows_that_match_no_token_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe.load(*moe.saved("mixtral", tmp_path))
    monkeypatch.setattr(MatrixInputs, "_match", lambda *_: None)
    with pytest.raises(ForgeError, match=r"experts\.\d\.w2\.weight") as caught:
        gathered(model)
    assert "--factors orthogonal" in caught.value.hint


def test_a_writer_that_no_product_shows_is_refused_by_name(tmp_path: Path) -> None:
    source, mapped = moe.saved("jamba", tmp_path)
    hidden = "model.layers.0.mamba.out_proj.weight"
    changed = [
        replace(m, places=(replace(m.place, linear=False),)) if m.tensor == hidden else m for m in mapped.matrices
    ]
    model = moe.load(source, replace(mapped, matrices=tuple(changed)))
    (writer,) = (m for m in model.model_map.writers if m.tensor == hidden)
    seen = next(gather_writer_inputs(model, [writer], *sampled(model)))[hidden][0]
    assert len(seen.harmful) == 7 * LAST_POSITIONS  # in the module's own product
    module = model.submodule(writer.place)
    module.forward = lambda x: functional.linear(x, module.weight.clone())  # type: ignore[method-assign, operator, arg-type, assignment]
    with pytest.raises(ForgeError, match=hidden):
        next(gather_writer_inputs(model, [writer], *sampled(model)))


class SplitExperts(nn.Module):
    """Experts that are linear modules of their own, as in classes from before transformers stacked them."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        names = ("w1", "w3", "w2")
        sizes = ((tiny.D, moe.WIDTH), (tiny.D, moe.WIDTH), (moe.WIDTH, tiny.D))
        self.each = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in zip(names, sizes, strict=True)})
            for _ in range(moe.EXPERTS)
        )
        with torch.no_grad():
            for expert, parts in enumerate(self.each):
                gate, up = stack.gate_up_proj[expert].chunk(2)  # type: ignore[index]
                for name, values in zip(names, (gate, up, stack.down_proj[expert]), strict=True):  # type: ignore[index]
                    parts[name].weight.copy_(values)  # type: ignore[index]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, parts in enumerate(self.each):
            token, place = (index == expert).nonzero(as_tuple=True)
            x = hidden[token]
            y = parts["w2"](functional.silu(parts["w1"](x)) * parts["w3"](x))  # type: ignore[index]
            out.index_add_(0, token, y * weights[token, place, None])
        return out


def test_experts_that_are_modules_of_their_own_are_seen_alike(tmp_path: Path) -> None:
    source, mapped = moe.saved("mixtral", tmp_path)
    stacked, split = moe.load(source, mapped), moe.load(source, mapped)
    for layer in range(moe.LAYERS):
        block = split.layer(layer).mlp
        block.experts = SplitExperts(block.experts)  # type: ignore[union-attr, assignment, arg-type]

    def moved(matrix: Matrix) -> Matrix:
        if not matrix.is_expert:
            return matrix
        name = f"{matrix.place.module}.each.{matrix.expert}.{matrix.tensor.split('.')[-2]}"
        return replace(matrix, places=(Place(name),))

    split._model_map = replace(mapped, matrices=tuple(map(moved, mapped.matrices)))
    for found, wanted in zip(*(experts_of_layer(m, gathered(m)) for m in (split, stacked)), strict=True):
        assert len(found.harmful) > 0
        torch.testing.assert_close(found.harmful, wanted.harmful, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.harmless_rows, wanted.harmless_rows, rtol=1e-4, atol=1e-5)

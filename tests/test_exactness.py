"""Edits are exact in every family, judged by the loaded model's modules and not by the architecture data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import copies, factors, hooks
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny
from tests.first_tokens import first_log_probs

READER = re.compile(
    r"(q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value|gate_proj|up_proj|gate_up_proj|c_fc|h_to_4h)$"
)
WRITER = re.compile(
    r"(self_attn\.o_proj|attn\.c_proj|(?:attention|self_attention)\.dense|down_proj|mlp\.c_proj|4h_to_h)$"
)
FULL = EditSettings(targets=("attention", "mlp"), skip_begin_layers=0, skip_end_layers=0)
R = tiny.unit_vector(7)
TWO = torch.linalg.qr(torch.randn(tiny.D, 2, generator=torch.Generator().manual_seed(3))).Q.T.contiguous()
Edited = tuple[Checkpoint, Checkpoint, EditPlan]


def apply_to(family: str, folder: Path, settings: EditSettings = FULL, vectors: Tensor | None = None) -> Edited:
    source = tiny.save(tiny.build(family), folder / "source")
    direction = RefusalDirection(R.unsqueeze(0) if vectors is None else vectors, layer=2)
    plan = plan_orthogonal(map_checkpoint(source), direction, settings, vector_reader(source.tensors))
    write_checkpoint(
        source,
        map_checkpoint(source),
        plan,
        folder / "edited",
        settings=settings,
        out_dtype="keep",
        direction=direction,
    )
    return source, Checkpoint(folder / "edited", "edited", "folder"), plan


def load(checkpoint: Checkpoint) -> ChatModel:
    return ChatModel.load(checkpoint, LoadSettings(dtype="float32", device="cpu"))


def weight(module: nn.Module, name: str = "weight") -> Tensor:
    """``[..., out, in]``."""
    value: Tensor = getattr(module, name).detach()
    return value.mT if isinstance(module, Conv1D) or value.ndim == 3 else value


def decoder_layers(model: ChatModel) -> nn.ModuleList:
    lists = [m for n, m in model.module.named_modules() if isinstance(m, nn.ModuleList) and "vision" not in n]
    return max(lists, key=len)


def matrices(model: ChatModel, pattern: re.Pattern[str]) -> dict[str, Tensor]:
    """Weights ``[..., out, in]`` in the decoder layers whose module (or stacked parameter) has such a name."""
    out: dict[str, Tensor] = {}
    for name, module in decoder_layers(model).named_modules():
        if pattern.search(name) and isinstance(module, (nn.Linear, Conv1D)):
            out[name] = weight(module)
        for stacked, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and pattern.search(stacked):
                out[f"{name}.{stacked}"] = weight(module, stacked)
    return out


@contextmanager
def spying(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and output of modules, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            seen[name] = (first.detach(), (output[0] if isinstance(output, tuple) else output).detach())

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


def run(model: ChatModel) -> None:
    ids = torch.tensor([model.tokenizer.instruction_ids(tiny.lines(1)[0])])
    with torch.inference_mode():
        model.module(input_ids=ids)


def seen_direction(model: ChatModel, reader: str, vectors: Tensor) -> Tensor:
    """What a reader sees of directions ``[k, d]``: found by watching which norm's output it takes in."""
    named = dict(decoder_layers(model).named_modules())
    holder = reader.rsplit(".", 1)[0] if reader not in named else reader
    norms = {n: m for n, m in named.items() if "norm" in type(m).__name__.lower()}
    with spying({**norms, holder: named[holder]}) as seen:
        run(model)
    taken = seen[holder][0].reshape(-1, tiny.D)
    for name, norm in norms.items():
        if name in seen and torch.equal(seen[name][1].reshape(-1, seen[name][1].shape[-1]), taken):
            with torch.inference_mode():
                return norm(vectors) - norm(torch.zeros_like(vectors))
    return vectors


def assert_exact(family: str, folder: Path, vectors: Tensor | None = None) -> None:
    source, result, _ = apply_to(family, folder, vectors=vectors)
    removed = R.unsqueeze(0) if vectors is None else vectors
    before, after = load(source), load(result)
    layers = decoder_layers(after)
    with spying({str(index): layer for index, layer in enumerate(layers)}) as seen:
        run(after)
    for name, (entering, leaving) in seen.items():
        along = ((leaving - entering) @ removed.T).abs().max()
        assert along <= 1e-5 * (leaving - entering).norm(dim=-1).max(), f"layer {name} still writes the direction"
    old, new = matrices(before, READER), matrices(after, READER)
    assert len(new) >= 4 * 2
    for name, values in new.items():
        blind = seen_direction(after, name, removed)
        assert (values @ blind.T).norm() <= 1e-5 * (old[name] @ blind.T).norm(), f"{name} still reads the direction"
        torch.testing.assert_close(values.norm(dim=-1), old[name].norm(dim=-1), rtol=1e-5, atol=1e-6)
    for name, values in matrices(after, WRITER).items():
        torch.testing.assert_close(
            values.norm(dim=-2), matrices(before, WRITER)[name].norm(dim=-2), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edit_is_exact(family: str, tmp_path: Path) -> None:
    assert_exact(family, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon-new", "gpt_oss"])
def test_two_directions_are_removed_together(family: str, tmp_path: Path) -> None:
    source, result, _ = apply_to(family, tmp_path, replace(FULL, norm_preserving=False), TWO)
    after = load(result)
    layers = decoder_layers(after)
    with spying({str(index): layer for index, layer in enumerate(layers)}) as seen:
        run(after)
    for entering, leaving in seen.values():
        assert ((leaving - entering) @ TWO.T).abs().max() <= 1e-5 * (leaving - entering).norm(dim=-1).max()
    for name, values in matrices(after, READER).items():
        blind = seen_direction(after, name, TWO)
        assert (values @ blind.T).norm() <= 1e-5 * (matrices(load(source), READER)[name] @ blind.T).norm()


def test_a_repeated_direction_removes_one_axis(tmp_path: Path) -> None:
    twice = torch.stack([R, -R])
    plans = [apply_to("gemma2", tmp_path / str(len(rows)), vectors=rows)[2] for rows in (R.unsqueeze(0), twice)]
    for name, edit in plans[0].edits.items():
        assert torch.equal(edit.rule.basis, plans[1].edits[name].rule.basis)  # type: ignore[attr-defined]


def swap_axis(matrix: Matrix) -> Matrix:
    return replace(matrix, transposed=not matrix.transposed) if matrix.role is Role.O else matrix


def swap_expert_axis(matrix: Matrix) -> Matrix:
    wrong = matrix.experts and matrix.role is Role.DOWN
    return replace(matrix, transposed=not matrix.transposed) if wrong else matrix


def drop_gain(matrix: Matrix) -> Matrix:
    return replace(matrix, reads=None, post_norms=()) if matrix.layer is not None else matrix


def wrong_norm(matrix: Matrix) -> Matrix:
    if matrix.reads is None:
        return matrix
    return replace(matrix, reads=replace(matrix.reads, centred=not matrix.reads.centred, offset=0.5))


MUTATIONS: dict[str, Callable[[Matrix], Matrix]] = {
    "swapped axis": swap_axis,
    "swapped expert axis": swap_expert_axis,
    "dropped gain": drop_gain,
    "wrong norm": wrong_norm,
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "skipped layer", "flipped sign"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mutation_is_noticed(family: str, mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "swapped expert axis" and family != "gpt_oss":
        pytest.skip("no stacked experts")
    if mutation == "wrong norm" and family == "olmo2":
        pytest.skip("its norms stand behind writers: 'dropped gain' covers them")
    if mutation in MUTATIONS:
        right = map_checkpoint

        def wrong(checkpoint: Checkpoint) -> ModelMap:
            found = right(checkpoint)
            return replace(found, matrices=tuple(MUTATIONS[mutation](matrix) for matrix in found.matrices))

        monkeypatch.setattr("tests.test_exactness.map_checkpoint", wrong)
    elif mutation == "skipped layer":
        real = EditSettings.reason_to_skip

        def skip(self: EditSettings, matrix: Matrix, n_layers: int) -> str | None:
            return "forgotten" if matrix.layer == 2 else real(self, matrix, n_layers)

        monkeypatch.setattr(EditSettings, "reason_to_skip", skip)
    else:
        output = factors.RemoveFromOutput.factors

        def flipped(self: factors.RemoveFromOutput, weight: Tensor, expert: int | None) -> factors.Factors:
            made = output(self, weight, expert)
            return factors.Factors(made.L, -made.K)

        monkeypatch.setattr(factors.RemoveFromOutput, "factors", flipped)
    with pytest.raises(AssertionError):
        assert_exact(family, tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_not_planned_is_byte_identical(family: str, tmp_path: Path) -> None:
    source, result, plan = apply_to(family, tmp_path, EditSettings())
    changed = {n for n in source.tensors if source.tensors.read_bytes(n) != result.tensors.read_bytes(n)}
    assert set(source.tensors) == set(result.tensors)
    assert changed <= plan.changed_tensors
    assert {re.search(r"\.(\d)\.", name)[1] for name in changed} == {"1", "2"}  # type: ignore[index]
    attention = re.compile(
        r"(q_proj|k_proj|v_proj|qkv_proj|o_proj|c_attn|query_key_value|attn\.c_proj|attention\.dense)"
    )
    assert all(attention.search(name) for name in changed)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (source.folder / name).read_bytes() == (result.folder / name).read_bytes()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooks_do_what_the_weights_will(family: str, tmp_path: Path) -> None:
    settings = EditSettings(targets=("attention", "mlp", "embedding"), strength=0.7, strength_kernel="gaussian")
    source, result, plan = apply_to(family, tmp_path, settings)
    base, written = load(source), load(result)
    ids = base.tokenizer.instructions_ids(tiny.lines(3))
    plain = first_log_probs(base, ids)
    with hooked(base, plan):
        as_hooks = first_log_probs(base, ids)
    torch.testing.assert_close(as_hooks, first_log_probs(written, ids), rtol=1e-4, atol=2e-4)
    assert (as_hooks - plain).abs().max() > 0.05
    assert torch.equal(first_log_probs(base, ids), plain)


@contextmanager
def counted_expert_edits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts how often copies of an expert's matrix are edited."""
    counts: Counter[str] = Counter()
    real = factors.edit_matrix

    def counting(*args: Any) -> factors.EditedMatrix:
        counts["experts"] += len(args) > 4 and args[4] is not None
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(copies, "edit_matrix", counting)
        yield counts


def fail_inside_experts(model: ChatModel, plan: EditPlan, ids: list[list[int]]) -> None:
    """Run with the edit on, and fail inside the experts of an edited layer."""
    experts = decoder_layers(model)[2].mlp.experts  # type: ignore[union-attr]
    works = experts.forward

    def fails(*args: Any) -> Tensor:
        raise LookupError

    try:
        with hooked(model, plan):
            experts.forward = fails  # type: ignore[union-attr, assignment]
            first_log_probs(model, ids)
    finally:
        experts.forward = works  # type: ignore[union-attr, assignment]


EXPERTS = {
    "norms kept": EditSettings(targets=("mlp",), strength=0.7),
    "no norm rule": EditSettings(targets=("mlp",), strength=0.7, norm_preserving=False),
    "negative": EditSettings(targets=("writers",), strength=-0.5, norm_preserving=False),
}
COPIED = 2 * 2 * 4  # two layers' stacks, gate_up and down, of four experts


@pytest.mark.parametrize("free", [None, 100_000, 0])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_edited_once_and_put_back(
    case: str, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, result, plan = apply_to("gpt_oss", tmp_path, EXPERTS[case], TWO)
    base, written = load(source), load(result)
    ids = base.tokenizer.instructions_ids(tiny.lines(3))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in base.module.named_parameters()}
    plain, wanted = first_log_probs(base, ids), first_log_probs(written, ids)
    monkeypatch.setattr(ChatModel, "memory_available", free)
    with counted_expert_edits(monkeypatch) as counts:
        with hooked(base, plan):
            at_first = counts["experts"]
            for _ in range(3):
                as_hooks = first_log_probs(base, ids)
        with pytest.raises(LookupError):
            fail_inside_experts(base, plan, ids)
    torch.testing.assert_close(as_hooks, wanted, rtol=1e-4, atol=2e-4)
    assert (as_hooks - plain).abs().max() > 0.01
    note = capsys.readouterr().err.partition("note: edited copies")[2]
    if case != "norms kept":
        assert counts["experts"] == 0
    elif free is None:
        assert counts["experts"] == 2 * COPIED  # once in each of the two blocks
    else:
        assert at_first == (0 if free == 0 else COPIED // 4)
        assert f"{4 if free == 0 else 3} of 4 stacks" in note
    assert bool(note) == (case == "norms kept" and free is not None)
    for name, parameter in base.module.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert torch.equal(first_log_probs(base, ids), plain)


def test_one_projection_equals_the_edit_of_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, plan = apply_to("gpt_oss", tmp_path, EXPERTS["no norm rule"])
    base = load(source)
    ids = base.tokenizer.instructions_ids(tiny.lines(3))
    answers = []
    for projects in (True, False):
        with monkeypatch.context() as patch:
            if not projects:
                patch.setattr(hooks, "is_one_projection", lambda *_: False)
            with counted_expert_edits(monkeypatch) as counts, hooked(base, plan):
                answers.append(first_log_probs(base, ids))
        assert counts["experts"] == (0 if projects else COPIED)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_strength_zero_is_the_base_model(family: str, tmp_path: Path) -> None:
    settings = EditSettings(targets=("attention", "mlp"), strength=0.0, norm_preserving=False)
    source, result, _ = apply_to(family, tmp_path, settings)
    assert all(source.tensors.read_bytes(name) == result.tensors.read_bytes(name) for name in source.tensors)

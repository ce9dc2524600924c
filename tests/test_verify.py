"""Verification of written checkpoints: correct edits pass in every storage type, and wrong edits fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.read_matrix import read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import edit_file_path, write_checkpoint
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import Rescale, edit_matrix
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, MatrixEdit, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny
from tests.test_apply import packed_gpt_oss

FINITE = "activations and loss are finite"
EDITED = "edited matrices and biases are the planned edit, rounded once"
WRITERS = "writers add nothing along the direction"
READERS = "readers are blind to the direction"
OTHERS = "all other tensors are the source's"
R = RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2)
ALL = EditSettings(targets=("attention", "mlp", "embedding"))
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """An edited checkpoint and what it was made of and by."""

    source: Checkpoint
    result: Checkpoint
    plan: EditPlan
    direction: RefusalDirection
    model: ChatModel

    def checks(self) -> list[Check]:
        return verify(self.source, self.result, self.model, self.plan, self.direction)


def write(
    source: Checkpoint,
    folder: Path,
    settings: EditSettings,
    direction: RefusalDirection = R,
    out_dtype: str = "bf16",
    run_in: str = "float32",
) -> Written:
    described = map_checkpoint(source)
    plan = plan_orthogonal(described, direction, settings, vector_reader(source.tensors))
    write_checkpoint(source, described, plan, folder, settings=settings, out_dtype=out_dtype, direction=direction)
    result = Checkpoint(folder, "edited", "folder")
    model = ChatModel.load(result, LoadSettings(dtype=run_in, device="cpu"))
    return Written(source, result, plan, direction, model)


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


# -- honest edits ---------------------------------------------------------------------------------------------------


def loud_model(family: str, d: int, seed: int, loudness: float, dtype: torch.dtype) -> nn.Module:
    """Two layers of width ``d`` whose coordinate 3 of the residual stream is ``loudness`` times as loud."""
    config = tiny.FAMILIES[family]()
    sizes = {"hidden_size": d, "num_hidden_layers": 2, "intermediate_size": d if family == "gpt_oss" else d * 3 // 2}
    for name, value in ({**sizes, "head_dim": d // 4} if family != "gpt2" else {"n_embd": d, "n_layer": 2}).items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + (1.0 if "norm" in name or "ln_" in name else 0.0))
                continue
            parameter.copy_(torch.randn_like(parameter) * 0.05)
            for axis in range(parameter.ndim):
                if parameter.shape[axis] == d:
                    parameter.select(axis, 3).mul_(loudness)
    model.tie_weights()
    return model.to(dtype)


def loud_direction(d: int, seed: int, share: float, count: int, per_layer: bool) -> RefusalDirection:
    """Directions whose coordinate 3 has the given share of the first one's length."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, d, generator=generator, dtype=torch.float64)
    vectors[0, 3] = 0
    vectors[0] *= (1 - share**2) ** 0.5 / vectors[0].norm()
    vectors[0, 3] = share
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) if per_layer else torch.linalg.qr(vectors.T).Q.T
    return RefusalDirection(vectors.float().contiguous(), per_layer=per_layer, layer=1)


@pytest.mark.parametrize(
    ("family", "d", "dtype"),
    [
        ("llama", 32, torch.float32),
        ("llama", 32, torch.bfloat16),
        ("llama", 256, torch.float16),
        ("llama", 256, torch.bfloat16),
        ("llama-bias", 64, torch.float64),
        ("gemma2", 64, torch.float32),
        ("gemma2", 64, torch.bfloat16),
        ("olmo2", 32, torch.float64),
        ("gpt2", 64, torch.float16),
        ("gpt2", 64, torch.float32),
        ("gpt_oss", 32, torch.bfloat16),
    ],
)
def test_an_honest_edit_passes(family: str, d: int, dtype: torch.dtype, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"loudness": 8, "share": 0.5},
        {"loudness": 64, "share": 0.95, "count": 3, "norm_preserving": False, "run_in": "bfloat16"},
        {"loudness": 1, "share": 0.3, "count": 2, "per_layer": True, "out_dtype": "keep"},
        {"loudness": 8, "share": 0.7, "strength": 0.6, "norm_preserving": False},
        {"loudness": 64, "share": 0.3, "strength": -0.7, "count": 2, "out_dtype": "keep"},
    ]
    for seed, case in enumerate(cases):
        norm = case.get("norm_preserving", True)
        settings = replace(ALL, strength=case.get("strength", 1.0), norm_preserving=norm, skip_begin_layers=0)
        direction = loud_direction(d, seed, case["share"], case.get("count", 1), case.get("per_layer", False))
        source = tiny.save(loud_model(family, d, seed, case["loudness"], dtype), tmp_path / f"source-{seed}")
        for again in range(2):  # the second time, the edit is applied to its own result
            made = write(
                source,
                tmp_path / f"edited-{seed}-{again}",
                replace(settings, skip_end_layers=again),
                direction,
                case.get("out_dtype", "bf16"),
                case.get("run_in", "float32"),
            )
            checks = made.checks()
            assert not failed(checks), (case, again, checks)
            assert len(checks) == (5 if settings.strength == 1.0 else 3)
            source = made.result


def test_an_edit_from_a_file_is_held_to_its_factors_and_bias_shifts(tmp_path: Path) -> None:
    made = write(tiny.save(tiny.build("gpt2"), tmp_path / "source"), tmp_path / "edited", ALL)
    record = EditRecord.load(edit_file_path(made.result.folder))
    given = record.plan(map_checkpoint(made.source), made.source.fingerprint)
    again = replace(made, plan=given)
    assert not failed(verify(made.source, made.result, made.model, given, None))
    name = next(iter(record.bias_shifts))
    wrong = {**record.bias_shifts, name: record.bias_shifts[name] * 1.1}
    other = replace(record, bias_shifts=wrong).plan(map_checkpoint(made.source), made.source.fingerprint)
    assert failed(replace(again, plan=other).checks()) == {EDITED}


# -- wrong checkpoints ----------------------------------------------------------------------------------------------


FAMILIES = ("llama", "llama-bias", "gemma2", "gpt2", "gpt_oss", "packed gpt_oss", "half-edited packed gpt_oss")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """One honest edit of each kind, made when it is first asked for."""
    known: dict[tuple[str, float, str], Written] = {}

    def get(family: str, strength: float = 1.0, out_dtype: str = "bf16") -> Written:
        if (family, strength, out_dtype) not in known:
            folder = tmp_path_factory.mktemp("written")
            packed = family.endswith("packed gpt_oss")
            source = packed_gpt_oss(folder / "s") if packed else tiny.save(tiny.build(family), folder / "s")
            settings = replace(ALL, targets=("attention",)) if family.startswith("half-edited") else ALL
            made = write(source, folder / "edited", replace(settings, strength=strength), out_dtype=out_dtype)
            known[family, strength, out_dtype] = made
        return known[family, strength, out_dtype]

    return get


def damage(made: Written, folder: Path, change: Callable[[Tensors], None]) -> Written:
    """The same, with other tensors on disk (in memory the model stays what it was)."""
    shutil.copytree(made.result.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    owned = {name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
    save_file(owned, folder / "model.safetensors")
    return replace(made, result=Checkpoint(folder, "damaged", "folder"))


def loaded(tensors: Tensors, edit: MatrixEdit) -> list[Tensor]:
    """A matrix of a plain source as float32 ``[out, in]``, one for each expert."""
    stored = tensors[edit.matrix.tensor].float()
    stored = stored if edit.matrix.experts else stored.unsqueeze(0)
    return list(stored.mT if edit.matrix.transposed else stored)


def store(tensors: Tensors, edit: MatrixEdit, values: list[Tensor], through: torch.dtype = torch.float32) -> None:
    stacked = torch.stack(values)
    stacked = stacked.mT if edit.matrix.transposed else stacked
    like = tensors[edit.matrix.tensor]
    tensors[edit.matrix.tensor] = stacked.reshape(like.shape).to(through).to(like.dtype)


def edited(source: Tensors, edit: MatrixEdit) -> list[Tensor]:
    return [
        edit_matrix(weight, edit.rule, edit.strength, edit.rescale, expert).weight
        for expert, weight in enumerate(loaded(source, edit))
    ]


def planned(made: Written, role: Role) -> MatrixEdit:
    """The edit of the first matrix with a role."""
    return next(edit for edit in made.plan.edits.values() if edit.matrix.role is role)


Mutation = Callable[[Tensors, Tensors, MatrixEdit, Written], str]
MUTATIONS: dict[str, Mutation] = {}


def mutation(change: Mutation) -> Mutation:
    """Register a change of an edited matrix in the written tensors, given the source's; it returns the name to find."""
    MUTATIONS[change.__name__.replace("_", " ")] = change
    return change


@mutation
def not_a_number(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor].view(-1)[5] = torch.nan
    return edit.matrix.tensor


@mutation
def infinite(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor].view(-1)[5] = torch.inf
    return edit.matrix.tensor


@mutation
def zeroed(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor].zero_()
    return edit.matrix.tensor


@mutation
def left_unedited(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    store(tensors, edit, loaded(source, edit))
    return edit.matrix.tensor


@mutation
def three_hundredths_of_the_strength_missing(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    store(tensors, edit, edited(source, replace(edit, strength=0.97 * edit.strength)))
    return edit.matrix.tensor


@mutation
def sign_flipped(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    store(tensors, edit, edited(source, replace(edit, strength=-edit.strength)))
    return edit.matrix.tensor


@mutation
def norm_rule_left_out(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    store(tensors, edit, edited(source, replace(edit, rescale=Rescale.NONE)))
    return edit.matrix.tensor


@mutation
def rounded_by_way_of_float16(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    store(tensors, edit, edited(source, edit), through=torch.float16)
    return edit.matrix.tensor


@mutation
def edited_for_another_direction(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    other = RefusalDirection(tiny.unit_vector(8).unsqueeze(0), layer=2)
    plan = plan_orthogonal(map_checkpoint(made.source), other, ALL, vector_reader(made.source.tensors))
    store(tensors, edit, edited(source, replace(plan.edits[edit.matrix.tensor], strength=edit.strength)))
    return edit.matrix.tensor


@mutation
def written_for_another_layer(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    twin = made.plan.edits[edit.matrix.tensor.replace(".1.", ".2.")]
    store(tensors, edit, edited(source, twin))
    return edit.matrix.tensor


@mutation
def one_value_an_eighth_off(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor].view(-1)[7] *= 1.125
    return edit.matrix.tensor


@mutation
def missing(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    del tensors[edit.matrix.tensor]
    return edit.matrix.tensor


@mutation
def of_another_shape(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor] = tensors[edit.matrix.tensor].flatten(0, 1)
    return edit.matrix.tensor


@mutation
def stored_as_float16(source: Tensors, tensors: Tensors, edit: MatrixEdit, made: Written) -> str:
    tensors[edit.matrix.tensor] = tensors[edit.matrix.tensor].half()
    return edit.matrix.tensor


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_edit_fails_and_is_named(
    family: str, name: str, written: Callable[..., Written], tmp_path: Path
) -> None:
    reader = Role.QKV if family == "gpt2" else Role.Q
    for strength, out_dtype, role in [(1.0, "bf16", Role.DOWN), (0.6, "keep", reader)]:
        made = written(family, strength, out_dtype)
        edit = planned(made, role)
        source = load_file(made.source.folder / "model.safetensors")
        names: list[str] = []
        folder = tmp_path / f"{strength}-{out_dtype}"
        wrong = damage(made, folder, lambda tensors: names.append(MUTATIONS[name](source, tensors, edit, made)))  # noqa: B023
        checks = wrong.checks()
        assert EDITED in failed(checks), (strength, out_dtype, role)
        assert names[0] in next(check.where for check in checks if check.name == EDITED)
        assert OTHERS not in failed(checks) or name == "missing"


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    ("family", "role"),
    [("llama-bias", Role.O), ("llama-bias", Role.DOWN), ("gpt2", Role.O), ("gpt2", Role.QKV), ("gpt2", Role.UP),
     ("gpt_oss", Role.DOWN)],
)  # fmt: skip
@pytest.mark.parametrize("shifts", [0.0, 2.0, 0.97, torch.nan])
def test_a_bias_must_be_shifted_as_planned(
    family: str, role: Role, shifts: float, strength: float, written: Callable[..., Written], tmp_path: Path
) -> None:
    made = written(family, strength, "keep")
    bias = planned(made, role).matrix.bias
    assert bias is not None
    before = load_file(made.source.folder / "model.safetensors")[bias]

    def change(tensors: Tensors) -> None:
        tensors[bias] = before + shifts * (tensors[bias] - before)

    checks = damage(made, tmp_path / "wrong", change).checks()
    assert EDITED in failed(checks)
    assert bias in next(check.where for check in checks if check.name == EDITED)


@pytest.mark.parametrize("family", ["gpt_oss", "packed gpt_oss"])
@pytest.mark.parametrize("fault", ["one unedited", "swapped", "one zeroed"])
@pytest.mark.parametrize("role", [Role.GATE_UP, Role.DOWN])
def test_every_edited_expert_is_compared(
    family: str, role: Role, fault: str, written: Callable[..., Written], tmp_path: Path
) -> None:
    made = written(family)
    edit = planned(made, role)
    name = edit.matrix.tensor

    def change(tensors: Tensors) -> None:
        if fault == "one unedited":
            weight, _ = read_matrix(made.source.tensors, edit.matrix, 2)
            tensors[name][2] = weight.T if edit.matrix.transposed else weight
        elif fault == "swapped":
            tensors[name] = tensors[name][[0, 2, 1, 3]]
        else:
            tensors[name][3].zero_()

    checks = damage(made, tmp_path / "wrong", change).checks()
    assert {EDITED, WRITERS if role is Role.DOWN else READERS} <= failed(checks) or fault != "one unedited"
    assert EDITED in failed(checks)
    assert name in next(check.where for check in checks if check.name == EDITED)


def off_by_one_unit(tensors: Tensors, name: str) -> None:
    tensors[name].view(-1)[3:4].view(torch.uint8)[0] ^= 1


def not_a_number_there(tensors: Tensors, name: str) -> None:
    tensors[name].view(-1)[3] = torch.nan


def zeroed_there(tensors: Tensors, name: str) -> None:
    tensors[name].zero_()


def left_out(tensors: Tensors, name: str) -> None:
    del tensors[name]


def reshaped(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(-1, 1)


def as_float16(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].half()


def with_another(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.extra"] = torch.zeros(3)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_second_copy_of_a_tied_head_must_stay_one(strength: float, tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "source")
    tensors = load_file(source.folder / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    save_file({**tensors, head: tensors[embedding].clone()}, source.folder / "model.safetensors", {"format": "pt"})
    source = Checkpoint(source.folder, "source", "folder")
    described, settings = map_checkpoint(source), replace(ALL, strength=strength)
    plan = plan_orthogonal(described, R, settings, vector_reader(source.tensors))
    second = next(matrix for matrix in described.matrices if matrix.tensor == head)
    plan = replace(plan, edits={**plan.edits, head: replace(plan.edits[embedding], matrix=second)})
    write_checkpoint(source, described, plan, tmp_path / "edited", settings=settings, out_dtype="keep", direction=R)
    result = Checkpoint(tmp_path / "edited", "edited", "folder")
    made = Written(source, result, plan, R, ChatModel.load(result, LoadSettings(dtype="float32", device="cpu")))
    assert not failed(made.checks())
    stale = damage(made, tmp_path / "stale", lambda written: written.update({head: tensors[embedding]}))
    assert {EDITED} <= failed(stale.checks())
    apart = damage(made, tmp_path / "apart", lambda written: off_by_one_unit(written, head))
    assert [check.where for check in apart.checks() if not check.passed] == [f"{head} is not {embedding} any more"]


UNEDITED = {
    "llama": ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
    "gemma2": ["model.layers.3.self_attn.o_proj.weight"],
    "gpt2": ["transformer.h.0.attn.c_attn.bias", "transformer.h.3.mlp.c_proj.weight"],
    "gpt_oss": ["model.layers.0.mlp.experts.down_proj", "model.layers.1.self_attn.sinks"],
    "packed gpt_oss": ["model.layers.0.mlp.experts.gate_up_proj"],
    "half-edited packed gpt_oss": ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"],
}


@pytest.mark.parametrize("out_dtype", ["bf16", "keep"])
@pytest.mark.parametrize(
    "fault", [off_by_one_unit, not_a_number_there, zeroed_there, left_out, reshaped, as_float16, with_another]
)
@pytest.mark.parametrize("family", UNEDITED)
def test_what_is_not_edited_must_be_the_source(
    family: str, fault: Callable[[Tensors, str], None], out_dtype: str, written: Callable[..., Written], tmp_path: Path
) -> None:
    made = written(family, 1.0, out_dtype)
    for number, name in enumerate(UNEDITED[family]):
        if name not in made.result.tensors:  # kept packed
            name = f"{name}_blocks"
            if fault in (not_a_number_there, as_float16):
                continue
        assert name not in made.plan.changed_tensors
        checks = damage(made, tmp_path / str(number), lambda tensors: fault(tensors, name)).checks()  # noqa: B023
        assert failed(checks) == {OTHERS}
        where = next(check.where for check in checks if check.name == OTHERS)
        assert where.startswith(name.removesuffix("_blocks"))


def test_a_copied_tensor_that_holds_nan_in_the_source_too_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[2, 3] = torch.nan
    checks = write(tiny.save(model, tmp_path / "source"), tmp_path / "edited", ALL).checks()
    assert {OTHERS, FINITE} <= failed(checks)
    assert "model.layers.0.mlp.up_proj.weight (holds NaN)" in next(c.where for c in checks if c.name == OTHERS)


# -- the running model ----------------------------------------------------------------------------------------------


def without(made: Written, role: Role, norm: str) -> Written:
    """Written by a plan that takes the gain of some norms for 1 more than it is."""

    def wrong(matrix: Any) -> Any:
        if matrix.role is not role:
            return matrix
        known = getattr(matrix, norm)
        if isinstance(known, tuple):
            return replace(matrix, **{norm: tuple(replace(one, offset=one.offset + 1) for one in known)})
        return replace(matrix, **{norm: replace(known, offset=known.offset + 1)})

    described = map_checkpoint(made.source)
    described = replace(described, matrices=tuple(wrong(matrix) for matrix in described.matrices))
    plan = plan_orthogonal(described, R, ALL, vector_reader(made.source.tensors))
    folder = made.result.folder.with_name(f"{made.result.folder.name}-wrong-{role.value}")
    write_checkpoint(made.source, described, plan, folder, settings=ALL, out_dtype="keep", direction=R)
    return replace(made, plan=plan, result=Checkpoint(folder, "wrong", "folder"))


@pytest.mark.parametrize(
    ("family", "role", "norm", "check"),
    [
        ("gemma2", Role.O, "post_norms", WRITERS),
        ("gemma2", Role.DOWN, "post_norms", WRITERS),
        ("gemma2", Role.Q, "reads", READERS),
        ("llama", Role.UP, "reads", READERS),
        ("gpt2", Role.QKV, "reads", READERS),
        ("gpt_oss", Role.GATE_UP, "reads", READERS),
    ],
)
def test_a_plan_with_a_wrong_gain_fails(
    family: str, role: Role, norm: str, check: str, written: Callable[..., Written]
) -> None:
    assert failed(without(written(family, 1.0, "keep"), role, norm).checks()) == {check}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("out_dtype", ["bf16", "keep"])
def test_an_edit_for_another_direction_fails(family: str, out_dtype: str, written: Callable[..., Written]) -> None:
    other = RefusalDirection((R.vectors + 0.05 * tiny.unit_vector(8)), layer=2)
    other = replace(other, vectors=other.vectors / other.vectors.norm())
    made = replace(written(family, 1.0, out_dtype), direction=other)
    assert failed(made.checks()) == {WRITERS, READERS}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_a_check_whose_hooks_never_fired_fails(
    family: str, written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written(family)
    monkeypatch.setattr(made.model, "run_to_layer", lambda *_: None)
    checks = made.checks()
    assert failed(checks) == {FINITE, WRITERS}
    assert "layer 0 did not run" in next(check.where for check in checks if check.name == FINITE)
    assert "did not run" in next(check.where for check in checks if check.name == WRITERS)


def test_a_writer_whose_module_never_ran_fails(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written("llama")
    monkeypatch.setattr(made.model, "submodule", lambda matrix: nn.Identity())
    checks = made.checks()
    assert failed(checks) == {WRITERS}
    assert "o_proj" in next(check.where for check in checks if check.name == WRITERS)


@pytest.mark.parametrize(
    ("parameter", "where"),
    [("model.layers.2.mlp.down_proj.weight", "output of layer 2"), ("lm_head.weight", "loss")],
)
def test_nan_in_the_running_model_is_named(parameter: str, where: str, tmp_path: Path) -> None:
    made = write(tiny.save(tiny.build("llama-bias"), tmp_path / "source"), tmp_path / "edited", ALL)
    with torch.no_grad():
        made.model.module.get_parameter(parameter).fill_(torch.nan)
    finite = made.checks()[0]
    assert (finite.name, finite.passed) == (FINITE, False)
    assert finite.where.startswith(where)
    assert finite.worst is None


def test_a_plan_that_edits_nothing_proves_nothing(written: Callable[..., Written]) -> None:
    made = written("llama")
    checks = replace(made, plan=replace(made.plan, edits={}), result=made.source).checks()
    assert EDITED in failed(checks)

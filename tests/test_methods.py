"""The methods that ``benchmarks/methods.py`` compares: their mathematics, and how one of their candidates is chosen."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from benchmarks.methods import BASELINE, METHODS, PRODUCT
from benchmarks.methods.affine_erasure import ace, erasing, leace
from benchmarks.methods.base import Candidate, Method, NotApplicableError, plan_ablation
from benchmarks.methods.fit_data import FitData, Protected, token_moments
from benchmarks.methods.inlp import FLIP, inlp_directions
from benchmarks.methods.least_squares import Fit, fit_factors, one_layer
from benchmarks.methods.loud_channels import by_variance, is_loud
from benchmarks.methods.measuring import Bench
from benchmarks.methods.neurons import most_different
from benchmarks.methods.opposite_signs import opposite_layers
from benchmarks.methods.page import with_section
from benchmarks.methods.surgical import without_atoms
from benchmarks.methods.whitened import detector

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.edits.least_squares import METHOD, RIDGE
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.prompts.conversation import Conversation, Message
from ollama_forge.prompts.part import Part
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from tests import planted

LAYERS = 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def general(name: str, count: int) -> tuple[Conversation, ...]:
    """Conversations of two kinds, in words that the planted model knows."""
    return tuple(
        Conversation(("facts", "lists")[n % 2], (Message("user", f"{planted.GOOD[n % 8]} word{n} {name}"),))
        for n in range(count)
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatModel, PromptSplit, FitData]:
    folder = tmp_path_factory.mktemp("methods")
    checkpoint = planted.save_model(planted.build(2, LAYERS), folder / "model")
    harmful, harmless = planted.write_lists(folder)
    model = ChatModel.load(checkpoint, LoadSettings(device="cpu", dtype="float32"))
    lists = PromptSettings(harmful=str(harmful), harmless=str(harmless), max_measured=8).load(40)
    fit, select, report = (
        PartPrompts(part.harmful, part.harmless, general(name, 20)[: 20 if name == Part.FIT else 6])
        for name, part in ((Part.FIT, lists.fit), (Part.SELECT, lists.select), (Part.REPORT, lists.report))
    )
    split = PromptSplit(fit, select, report)
    return model, split, FitData(model, fit, vector_reader(checkpoint.tensors))


def test_leace_leaves_equal_means() -> None:
    harmful, harmless = drawn(30, 8) + 2 * drawn(8, seed=1), drawn(30, 8, seed=2)
    eraser = leace(harmful, harmless)
    erased = [eraser(side.float()).mean(0) for side in (harmful, harmless)]
    torch.testing.assert_close(*erased, rtol=1e-4, atol=1e-4)
    middle = (harmful.mean(0) + harmless.mean(0)) / 2
    torch.testing.assert_close(erased[0], middle.float(), rtol=1e-4, atol=1e-4)


def test_ace_sets_the_component_to_the_harmless_mean() -> None:
    direction, mean = torch.nn.functional.normalize(drawn(8), dim=0).float(), drawn(8, seed=1).float()
    stream = drawn(2, 3, 8, seed=2).float()
    changed = ace(direction, mean)(stream)
    torch.testing.assert_close(changed @ direction, (mean @ direction).expand(2, 3), rtol=1e-4, atol=1e-5)
    across = torch.eye(8) - torch.outer(direction, direction)
    torch.testing.assert_close(changed @ across, stream @ across, rtol=1e-4, atol=1e-5)


def test_erasing_changes_the_stream_inside_the_block_alone(loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    model, split, data = loaded
    prompts = model.tokenizer.instructions_ids(split.fit.harmful)
    eraser = leace(data.residuals.harmful[:, 3], data.residuals.harmless[:, 3])
    with erasing(model, {3: eraser}):
        inside = gather_residuals(model, prompts, [3]).of_layer(3)
    middle = (data.residuals.harmful[:, 3].mean(0) + data.residuals.harmless[:, 3].mean(0)) / 2
    torch.testing.assert_close(inside.float(), middle, rtol=1e-3, atol=1e-3)
    after = gather_residuals(model, prompts, [3]).of_layer(3)
    torch.testing.assert_close(after.float(), data.residuals.harmful[:, 3].mean(0), rtol=1e-4, atol=1e-5)


def test_inlp_finds_orthonormal_directions_and_the_separating_one_first() -> None:
    harmful, harmless = drawn(60, 12), drawn(60, 12, seed=1)
    harmful[:, 4] += 6.0
    found = inlp_directions(harmful, harmless, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    assert found[0, 4] > 0.9
    assert found[1:, 4].abs().max() < 0.4


def test_a_flip_reflects_what_a_writer_writes(loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    _, _, data = loaded
    found = inlp_directions(data.residuals.harmful[:, 3], data.residuals.harmless[:, 3], 2)
    edit = next(iter(plan_ablation(data, found, 3, FLIP).edits.values()))
    weight = drawn(planted.D, 5).float()
    flipped = weight
    for _ in range(2):
        factors = edit.rule.factors(flipped, None)
        flipped = flipped - edit.strength * factors.L @ factors.K.T
        torch.testing.assert_close((found @ flipped).abs(), (found @ weight).abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flipped, weight, rtol=1e-4, atol=1e-4)
    assert (found @ weight).norm() > 0.1


def test_surgical_ablation_takes_the_atoms_out_of_the_direction() -> None:
    atoms = torch.nn.functional.normalize(drawn(3, 10), dim=-1)
    direction = torch.nn.functional.normalize(drawn(10, seed=1) + 2 * atoms[0], dim=0)
    shares = [(atoms @ without_atoms(direction, atoms, alpha).double()).norm() for alpha in (1e-8, 0.01, 0.3)]
    assert shares[0] < 1e-6
    assert shares[0] < shares[1] < shares[2] < (atoms @ direction).norm()


def test_the_detector_passes_over_what_ordinary_text_does() -> None:
    difference, loud = drawn(10), drawn(10, seed=1)
    difference = difference + 3 * loud
    moment = 100 * torch.outer(loud, loud) + torch.eye(10)
    u, v = (vector.double() for vector in detector(difference, moment, 0.0))
    torch.testing.assert_close(v @ u, torch.ones(()).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment @ v, difference, rtol=1e-4, atol=1e-4)
    plain = difference / difference.norm()
    assert abs(v @ loud) / v.norm() < 0.1 * abs(plain @ loud)


def test_token_moments_leave_out_padding_and_first_tokens(loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    model, _, _ = loaded
    prompts = model.tokenizer.instructions_ids(["bake word1", "paint word2 word3 word4"])
    rows = torch.cat(
        [
            gather_residuals(model, [ids], [3], position=-place, keep_samples=True).samples[0]
            for ids in prompts
            for place in range(1, len(ids))
        ]
    ).double()
    torch.testing.assert_close(token_moments(model, prompts, [3])[3], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_loud_channels_are_those_far_above_the_median() -> None:
    mean = torch.tensor([1.0, -1.0, 2.0, -99.0, 101.0, 1.0, 2.0, -2.0, 2.0])  # the median size is 2
    assert is_loud(mean).nonzero().flatten().tolist() == [4]
    scaled = by_variance(torch.ones(3), torch.tensor([1.0, 4.0, 10.0]))
    torch.testing.assert_close(scaled, 1 / torch.tensor([1.05, 4.05, 10.05]))


def test_opposite_layers_have_means_on_both_sides_of_zero() -> None:
    axis = torch.tensor([1.0, 0.0])
    harmful = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [-1.0, 5.0]]])
    harmless = torch.tensor([[[-3.0, 1.0], [1.0, 1.0], [4.0, 1.0]]])
    assert opposite_layers(harmful, harmless, axis) == [0, 2]
    # two short prompts outweigh a long one, because each is scaled to length 1
    harmful = torch.tensor([[[-9.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    assert opposite_layers(harmful, harmless[:, :1], axis) == [0]


def test_the_most_different_neurons_are_counted_over_all_layers() -> None:
    differences = {"a": torch.tensor([0.1, -9.0, 0.2, 0.3]), "b": torch.tensor([5.0, 0.0, 0.4, -0.5])}
    assert most_different(differences, 0.25) == {"a": [1], "b": [0]}
    assert most_different(differences, 0.01) == {"a": [1]}


def test_least_squares_is_that_of_the_product(loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    model, split, data = loaded
    directions = one_layer(data)
    settings = EditSettings("least-squares", targets=("writers",), norm_preserving=False)
    wanted = METHOD.fit(FitContext(model, split.fit, data.read, 0), settings, directions)
    found = fit_factors(data, directions, Fit())
    assert found.keys() == wanted.keys()
    for name, factors in found.items():
        assert factors.keys() == wanted[name].by_tensor.keys()
        for tensor, side in factors.items():
            for mine, theirs in (
                (side.L, wanted[name].by_tensor[tensor].L),
                (side.K, wanted[name].by_tensor[tensor].K),
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_a_fit_protects_and_its_ridge_change_the_keys(loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    _, _, data = loaded
    directions = dict([next(iter(one_layer(data).items()))])
    fits = [Fit(), Fit(Protected.PROMPTS), Fit(Protected.PAIRS), Fit(ridge=10 * RIDGE), Fit(harmless_weight=3.0)]
    keys = [
        torch.cat([f.K.flatten() for found in fit_factors(data, directions, fit).values() for f in found.values()])
        for fit in fits
    ]
    for number, key in enumerate(keys):
        assert all((key - other).norm() > 1e-4 * key.norm() for other in keys[:number])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_proposes_edits_that_act(method: Method, loaded: tuple[ChatModel, PromptSplit, FitData]) -> None:
    model, split, data = loaded
    prompts = model.tokenizer.instructions_ids(split.select.harmful)
    before = gather_residuals(model, prompts, [LAYERS - 1]).mean
    try:
        candidates = list(method.candidates(data))
    except NotApplicableError:
        assert method.name in ("loud channels masked", "opposite-sign layers")
        return
    assert 1 <= len(candidates) <= 6
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    for candidate in candidates[:: max(1, len(candidates) - 1)]:
        with candidate.applied(model):
            assert (gather_residuals(model, prompts, [LAYERS - 1]).mean - before).norm() > 1e-5
    torch.testing.assert_close(gather_residuals(model, prompts, [LAYERS - 1]).mean, before)


def test_the_choice_is_made_on_select_prompts_and_the_row_is_of_report_prompts(
    loaded: tuple[ChatModel, PromptSplit, FitData],
) -> None:
    model, split, data = loaded
    bench = Bench(model, split, data)
    assert bench.base.harmful.refusal == len(split.report.harmful) == 8
    data.used.clear()
    row = bench.row(BASELINE)
    assert row.harmful.refusal == 0
    assert row.harmful.total == 8
    assert len(row.answer_kl) == len(split.report.general)
    assert row.damage.answer_kl.value == pytest.approx(sum(row.answer_kl) / len(row.answer_kl))
    harmless = split.fit.harmless  # a select part whose prompts are not refused leaves nothing to gain: damage decides
    other = Bench(
        model, PromptSplit(split.fit, PartPrompts(harmless, harmless, split.select.general), split.report), data
    )
    nothing = Candidate("nothing", lambda model: nullcontext())
    plan = plan_ablation(data, data.difference(3).unsqueeze(0), 3)
    both = Method("both", "", lambda data: [Candidate("ablation", plan), nothing])
    assert bench.row(both).choice == "ablation"
    assert other.row(both).choice == "nothing"


def test_seconds_count_the_statistics_that_a_method_uses(
    loaded: tuple[ChatModel, PromptSplit, FitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split, data = loaded
    bench = Bench(model, split, data)
    list(PRODUCT.candidates(data)), list(BASELINE.candidates(data))
    monkeypatch.setattr(data, "seconds", {**data.seconds, "residuals": 1000.0, "answers": 5000.0})
    assert 1000 <= bench.row(BASELINE).seconds < 1100
    assert 6000 <= bench.row(PRODUCT).seconds < 6100


def test_a_section_of_the_page_is_replaced_and_the_text_kept() -> None:
    page = with_section(with_section("# Methods\n\ntext\n", "a", "1"), "b", "2")
    again = with_section(page, "a", "3\\n")
    assert again.count("benchmarks/methods.py") == 2
    assert again == page.replace("\n1\n", "\n3\\n\n")
    assert again.startswith("# Methods\n\ntext\n")

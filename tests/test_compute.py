"""Activations and directions, compared with transformers on one prompt at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.directions.compute import compute_direction, random_direction
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.registry import METHODS
from ollama_forge.directions.selection import d_prime, largest_gap
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.prompts.split import PartPrompts
from tests import tiny
from tests.first_tokens import first_log_probs

FIT = PartPrompts(tuple(tiny.lines(9, 1)), tuple(tiny.lines(9, 2)))


def load(folder: Path, family: str = "llama", **settings: object) -> ChatModel:
    if not folder.exists():
        tiny.save(tiny.build(family), folder)
    from ollama_forge.checkpoints.checkpoint import Checkpoint

    options = {"dtype": "float32", "device": "cpu", "batch_size": 4, **settings}
    return ChatModel.load(Checkpoint(folder, "tiny", "folder"), LoadSettings(**options))  # type: ignore[arg-type]


def one_by_one(model: ChatModel, prompts: tuple[str, ...], layer: int, position: int = -1) -> torch.Tensor:
    """``[prompts, d]`` outputs of a layer that is not the last (whose hidden state transformers norms)."""
    out = []
    for prompt in prompts:
        with torch.inference_mode():
            states = model.module(
                input_ids=torch.tensor([model.tokenizer.instruction_ids(prompt)]), output_hidden_states=True
            ).hidden_states
        out.append(states[layer + 1][0, position].double())
    return torch.stack(out)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon-rw", "gpt_oss", "olmo2"])
def test_batched_statistics_equal_those_one_by_one(family: str, tmp_path: Path) -> None:
    model = load(tmp_path / "model", family)
    ids = model.tokenizer.instructions_ids(FIT.harmful)
    stats = gather_residuals(model, ids, [0, 2], keep_samples=True, position=-2)
    assert stats.mean.dtype == torch.float64
    assert stats.samples is not None
    for place, layer in enumerate((0, 2)):
        wanted = one_by_one(model, FIT.harmful, layer, -2)
        torch.testing.assert_close(stats.samples[:, place].double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.mean[place], wanted.mean(0), rtol=1e-4, atol=1e-4)


def test_an_automatic_batch_on_a_cpu_stays_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5] * 100] * 8

    def sizes(**settings: object) -> list[int]:
        return [len(batch.rows) for batch in load(tmp_path / "model", **settings).batches(prompts)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert sizes(batch_size="auto") == [3, 3, 2]
    assert sizes(batch_size="auto", dtype="bfloat16") == [7, 1]
    assert sizes(batch_size=8) == [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert sizes(batch_size="auto") == [7, 1]


def test_the_largest_gap_wins_and_candidates_are_kept(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    found = compute_direction(model, FIT, DirectionSettings(), fingerprint="f")
    gaps = {}
    for layer in (1, 2):
        gap = one_by_one(model, FIT.harmful, layer).mean(0) - one_by_one(model, FIT.harmless, layer).mean(0)
        gaps[layer] = gap
    best = max(gaps, key=lambda layer: float(gaps[layer].norm()))
    assert found.layer == best
    torch.testing.assert_close(found.vectors[0].double(), gaps[best] / gaps[best].norm(), rtol=1e-4, atol=1e-5)
    assert [c["layer"] for c in found.details["candidates"]] == [1, 2, 2]
    assert found.vectors.shape == (1, tiny.D)


def test_per_layer_directions_and_positions(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    found = compute_direction(model, FIT, DirectionSettings(per_layer=True, position=-3), fingerprint="f")
    assert found.vectors.shape == (4, tiny.D)
    gap = one_by_one(model, FIT.harmful, 1, -3).mean(0) - one_by_one(model, FIT.harmless, 1, -3).mean(0)
    torch.testing.assert_close(found.for_layer(1)[0].double(), gap / gap.norm(), rtol=1e-4, atol=1e-5)
    found.save(tmp_path / "r.pt")
    assert RefusalDirection.load(tmp_path / "r.pt", tiny.D, 4).per_layer


def test_several_directions_are_singular_vectors(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    settings = DirectionSettings(num_directions=3, layer_fracs=(0.5,))
    found = compute_direction(model, FIT, settings, fingerprint="f").vectors
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=1e-4, atol=1e-4)
    centred = one_by_one(model, FIT.harmful, 2) - one_by_one(model, FIT.harmless, 2).mean(0)
    wanted = torch.linalg.svd(centred, full_matrices=False).Vh[:3].float()
    torch.testing.assert_close((found * wanted).sum(-1).abs(), torch.ones(3), rtol=1e-3, atol=1e-3)
    assert ((centred.float() @ found.T).mean(0) > 0).all()


def test_projected_is_orthogonal_to_the_harmless_mean() -> None:
    torch.manual_seed(0)
    bad, good = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    found = METHODS["projected"](bad, good)
    assert (found.double() * good).sum(-1).abs().max() < 1e-5
    plain = METHODS["difference-of-means"](bad, good)
    assert ((found * plain).sum(-1) > 0).all()


def test_equal_lists_have_no_direction(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    same = PartPrompts(FIT.harmful, FIT.harmful)
    with pytest.raises(ForgeError, match="same residual stream"):
        compute_direction(model, same, DirectionSettings(), fingerprint="f")


def test_scores() -> None:
    high, low = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 2.0])
    assert d_prime(high, low) == pytest.approx(2.0)
    best, candidates = largest_gap(torch.eye(3) * torch.tensor([1.0, 5.0, 2.0]), torch.zeros(3, 3), (0.0, 0.4, 0.9))
    assert (best.layer, len(candidates)) == (1, 3)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for wrong in (
        {"layer_fracs": (1.5,)},
        {"num_directions": 4},
        {"num_directions": 2, "per_layer": True},
        {"method": "guess"},
    ):
        with pytest.raises(UsageError):
            DirectionSettings(**wrong)  # type: ignore[arg-type]
    model = load(tmp_path / "model")
    with pytest.raises(UsageError, match="position"):
        compute_direction(model, FIT, DirectionSettings(position=-999), fingerprint="f")


def test_a_control_is_another_direction_of_the_same_shape(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    found = compute_direction(model, FIT, DirectionSettings(), fingerprint="f")
    control = random_direction(found)
    assert control.vectors.shape == found.vectors.shape
    assert float(control.vectors.norm()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(control.vectors, random_direction(found).vectors)
    assert abs(float((control.vectors * found.vectors).sum())) < 0.9


@pytest.mark.parametrize(("count", "per_layer"), [(1, False), (3, False), (4, True)])
def test_a_control_has_as_many_directions_of_the_same_kind(count: int, per_layer: bool) -> None:
    vectors = torch.linalg.qr(torch.randn(tiny.D, count, generator=torch.Generator().manual_seed(1))).Q.T
    found = RefusalDirection(vectors.contiguous(), per_layer, None if per_layer else 2, -3)
    control, other = random_direction(found, 5), random_direction(found, 6)
    assert (control.per_layer, control.layer, control.position) == (found.per_layer, found.layer, found.position)
    assert torch.equal(control.vectors, random_direction(found, 5).vectors)
    assert not torch.allclose(control.vectors, other.vectors, atol=0.1)
    products = control.vectors @ control.vectors.T
    torch.testing.assert_close(products.diagonal(), torch.ones(count), rtol=0, atol=1e-6)
    if not per_layer:
        torch.testing.assert_close(products, torch.eye(count), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(control.vectors) == count


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "falcon-rw", "gpt_oss"])
def test_batched_answers_equal_those_alone(family: str, tmp_path: Path) -> None:
    model = load(tmp_path / "model", family, batch_size=8)
    ids = model.tokenizer.instructions_ids(tiny.lines(8, 5))
    together, first = model.answer(ids, 12), first_log_probs(model, ids)
    for place, prompt in enumerate(ids):
        with torch.inference_mode():
            logits = model.module(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            whole = model.module.generate(  # type: ignore[operator]
                torch.tensor([prompt]),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(model.tokenizer.end_ids),
            )
        wanted = [token for token in whole[0, len(prompt) :].tolist() if token not in model.tokenizer.end_ids]
        assert together[place] == wanted
        torch.testing.assert_close(first[place], logits, rtol=1e-3, atol=1e-3)


def test_an_answer_ends_when_it_is_decided(tmp_path: Path) -> None:
    model = load(tmp_path / "model")
    ids = model.tokenizer.instructions_ids(tiny.lines(3))
    whole = model.answer(ids, 9)
    assert model.answer(ids, 9, decided=lambda row: len(row) == 2) == [row[:2] for row in whole]


def test_a_base_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ForgeError, match="no chat template"):
        load(tmp_path / "model")
    model = load(tmp_path / "model", allow_base_model=True)
    assert model.tokenizer.decode(model.tokenizer.instruction_ids("paint a boat")) == "paint a boat"


def test_system_prompt_and_template_arguments_reach_the_template(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text(tiny.TEMPLATE + "{{ mood }}{% if enable_thinking %}<think>{% endif %}", encoding="utf-8")
    model = load(tmp_path / "model", system="Be brief.", template_kwargs={"mood": "calm"})
    text = model.tokenizer.backend.decode(model.tokenizer.instruction_ids("hello"))
    assert text == "<|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>calm"
    thinking = load(tmp_path / "model", template_kwargs={"enable_thinking": True})
    assert thinking.tokenizer.decode(thinking.tokenizer.instruction_ids("hello")).endswith("<think>")


def test_nan_in_weights_is_one_line(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    tiny.save(model, tmp_path / "model")
    with pytest.raises(ForgeError, match="NaN"):
        compute_direction(load(tmp_path / "model"), FIT, DirectionSettings(), fingerprint="f")

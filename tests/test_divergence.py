"""Forced decoding, and the divergence from a base on its own answers, against whole distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation import divergence as diverging
from ollama_forge.evaluation.divergence import Reference, answer_nll, divergence
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.protocol import Forced
from ollama_forge.text.tokenizer import Ids, Tokenizer
from tests import tiny

LIMIT = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[ChatModel]:
    folder = tmp_path_factory.mktemp("pair")
    settings = LoadSettings(device="cpu", dtype="float32", batch_size=3)
    return [ChatModel.load(tiny.save(tiny.build("llama", seed), folder / str(seed)), settings) for seed in (1, 2)]


def prompts_of(model: ChatModel, count: int = 7) -> list[Ids]:
    return model.tokenizer.instructions_ids([line[: 5 + 7 * n] for n, line in enumerate(tiny.lines(count))])


@torch.inference_mode()
def whole_scores(model: ChatModel, prompt: Ids, answer: Ids, count: int) -> torch.Tensor:
    """The log-probabilities ``[count, vocabulary]`` of one unpadded pass."""
    logits = model.module(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
    return logits[:count].double().log_softmax(-1)


def test_forced_predictions_are_those_of_one_unpadded_pass(pair: list[ChatModel]) -> None:
    model = pair[0]
    prompts = prompts_of(model)
    answers = [prompts[0][: row % (LIMIT + 1)] for row in range(len(prompts))]  # also none, and as long as may be
    seen = []
    for batch in model.forced(prompts, answers, LIMIT):
        for place, row in enumerate(batch.rows):
            count = min(len(answers[row]) + 1, LIMIT)
            found = batch.of_row(place)
            assert len(found) == count == batch.counts[place]
            wanted = whole_scores(model, prompts[row], answers[row], count)
            assert torch.allclose(found.double().log_softmax(-1), wanted, atol=1e-4)
            seen.append(row)
    assert sorted(seen) == list(range(len(prompts)))


@pytest.mark.parametrize("top", [512, 20])
def test_the_divergence_is_that_of_whole_distributions(
    pair: list[ChatModel], monkeypatch: pytest.MonkeyPatch, top: int
) -> None:
    base, other = pair
    monkeypatch.setattr(diverging, "TOP", top)
    reference = Reference.of(base, prompts_of(base), LIMIT)
    found = divergence(other, reference)
    for row, (prompt, answer) in enumerate(zip(reference.prompts, reference.answers, strict=True)):
        p, q = (whole_scores(model, prompt, answer, int(reference.counts[row])) for model in pair)
        kl = (p.exp() * (p - q)).sum(-1)
        if top == 512:  # the whole vocabulary
            assert found.answer[row] == pytest.approx(float(kl.mean()), rel=1e-3)
            assert found.first[row] == pytest.approx(float(kl[0]), rel=1e-3)
        else:
            assert 0 < found.answer[row] <= float(kl.mean()) + 1e-6
    assert found.answer_kl.low < found.answer_kl.value < found.answer_kl.high <= found.answer_kl_p95 * 10
    assert found.answer_kl_p95 == pytest.approx(float(found.answer.quantile(0.95)))


def test_a_model_does_not_diverge_from_itself(pair: list[ChatModel], tmp_path: Path) -> None:
    reference = Reference.of(pair[0], prompts_of(pair[0]), LIMIT)
    reference.save(tmp_path / "reference.safetensors")
    loaded = Reference.load(tmp_path / "reference.safetensors")
    assert (loaded.prompts, loaded.answers, loaded.max_new_tokens) == (reference.prompts, reference.answers, LIMIT)
    found = divergence(pair[0], loaded)
    assert found.answer.tolist() == found.first.tolist() == [0.0] * len(reference.prompts)
    assert divergence(pair[1], reference.first(2)).answer.tolist() == pytest.approx(
        divergence(pair[1], loaded).answer[:2].tolist(), rel=1e-3
    )


def test_no_prompts_diverge_nowhere(pair: list[ChatModel]) -> None:
    nothing = Reference.of(pair[0], [], LIMIT)
    assert divergence(pair[1], nothing).answer.tolist() == []


def test_other_vocabularies_and_broken_models_are_told(pair: list[ChatModel], tmp_path: Path) -> None:
    reference = Reference.of(pair[0], prompts_of(pair[0], 2), LIMIT)
    with pytest.raises(ForgeError, match="different vocabularies"):
        divergence(pair[1], replace(reference, top=reference.top + 10_000))
    broken = ChatModel.load(tiny.save(tiny.build("llama", 3), tmp_path), LoadSettings(device="cpu", dtype="float32"))
    with torch.no_grad():
        broken.layer(1).mlp.down_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(ForgeError, match="NaN or infinite"):
        divergence(broken, reference)


class Certain:
    """Gives every token of an answer the same probability, whatever came before."""

    def __init__(self, probability: float) -> None:
        self.tokenizer, self.probability = Tokenizer(tiny.tokenizer()), probability

    def forced(
        self,
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        max_new_tokens: int,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Forced]:
        for row, answer in enumerate(answers):
            count = min(len(answer) + 1, max_new_tokens)
            logits = torch.full((1, count, 10), (1 - self.probability) / 9).log()
            for place, token in enumerate(answer):
                logits[0, place, token] = torch.tensor(self.probability).log()
            yield Forced([row], logits, [count])

    def answer(self, prompts: Sequence[Ids], max_new_tokens: int, **options: object) -> list[Ids]:
        return [[1, 2, 3] for _ in prompts]

    def loss(self, text: str) -> float:
        return 0.0


def test_the_likelihood_of_answers_leaves_out_their_ends_and_empty_ones() -> None:
    found = answer_nll(Certain(0.25), [[1], [2], [3]], [[4, 5], [], [6, 7, 8, 9]], 4)
    assert found.value == found.low == found.high == pytest.approx(1.386294, abs=1e-5)

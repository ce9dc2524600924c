"""Models with a recurrent state, sliding windows or latent attention: batches give what each prompt gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.models.batch_support import BatchSupport
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import families, tiny
from tests.first_tokens import first_log_probs

RECURRENT = ["qwen3_next", "jamba", "lfm2", "nemotron_h", "granitemoehybrid"]
ATTENTION = ["deepseek_v3", "cohere2", "exaone4"]
WRAPPERS = ["llava", "qwen2_5_vl"]


def load(family: str, folder: Path) -> ChatModel:
    return ChatModel.load(families.save(family, folder), LoadSettings(dtype="float32", device="cpu", batch_size=8))


@pytest.mark.parametrize("family", [*RECURRENT, *ATTENTION, *WRAPPERS])
def test_batches_give_what_each_prompt_gives_alone(family: str, tmp_path: Path) -> None:
    model = load(family, tmp_path / "model")
    assert model.batch_support.caches
    prompts = model.tokenizer.instructions_ids(tiny.lines(6, 3))
    together, first = model.answer(prompts, 8), first_log_probs(model, prompts)
    for place, prompt in enumerate(prompts):
        ids = list(prompt)
        with torch.inference_mode():
            logits = model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(first[place], logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
            for _ in range(8):
                ids.append(int(model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        wanted = ids[len(prompt) :]
        ended = next((n for n, token in enumerate(wanted) if token in model.tokenizer.end_ids), len(wanted))
        assert together[place] == wanted[:ended]
    layers = range(model.model_map.n_layers)
    means = torch.stack([gather_residuals(model, [prompt], layers).mean for prompt in prompts]).mean(0)
    torch.testing.assert_close(gather_residuals(model, prompts, layers).mean, means, rtol=1e-4, atol=1e-4)


def test_a_state_is_not_continued_with_prompts_of_several_lengths(tmp_path: Path) -> None:
    assert load("llama-bias", tmp_path / "full").batch_support == BatchSupport(True, True, True)
    assert not load("qwen3_next", tmp_path / "linear").batch_support.shares_prefix


def test_a_model_without_a_usable_cache_still_answers(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=tiny.VOCABULARY, hidden_size=48, num_hidden_layers=3, state_size=8, eos_token_id=1
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = ChatModel.load(tiny.save(module, tmp_path / "mamba"), LoadSettings(dtype="float32", device="cpu"))
    assert not model.batch_support.caches
    prompts = model.tokenizer.instructions_ids(tiny.lines(3, 4))
    for prompt, answer in zip(prompts, model.answer(prompts, 5), strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(5):
                ids.append(int(model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :][: len(answer)]

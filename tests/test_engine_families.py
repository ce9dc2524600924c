"""Tiny models of many families equal ``generate``: alone, ragged, late, beside a cancelled one, in a second turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.model_runner import StateSupport, chunk_of
from ollama_forge.serving.engine.transformers import TransformersEngine
from ollama_forge.text.tokenizer import Tokenizer
from tests import families, tiny
from tests.engines import by_generate, greedy, ids_of, prompt, running, together, wait

SIZES = families.SIZES
HEADS = {**SIZES, "head_dim": 12}
WINDOW = {"sliding_window": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
MAMBA = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 6}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}


def config(model_type: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **values)


# caches, batches, splits, reuses, as the self-test must find them
ALL, ONE, WHOLE, NO_CACHE = "cbsr", "c.sr", "c...", "...."
FAMILIES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    # full attention: rotary, learned and ALiBi positions, parallel blocks
    "llama": (ALL, tiny.FAMILIES["llama"]),
    "gpt2": (ALL, tiny.FAMILIES["gpt2"]),
    "gpt_neox": (ALL, tiny.FAMILIES["gpt_neox"]),
    "falcon-rw": (ALL, tiny.FAMILIES["falcon-rw"]),
    "bloom": (ALL, families.FAMILIES["bloom"]),
    "opt": (ALL, families.FAMILIES["opt"]),
    "glm4": (ALL, config("glm4", **HEADS)),
    "granite": (ALL, config("granite", **SIZES)),
    "smollm3": (ALL, tiny.FAMILIES["smollm3"]),
    # windows, sinks and shared caches
    "mistral": (ALL, config("mistral", **HEADS, **WINDOW)),
    "gemma2": (ALL, config("gemma2", **HEADS, **WINDOW)),
    "gemma3_text": (ALL, config("gemma3_text", **HEADS, **WINDOW)),
    "gemma4_text": (
        ALL,
        config(
            "gemma4_text",
            **HEADS,
            **WINDOW,
            vocab_size_per_layer_input=tiny.VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
    ),
    "gemma3n_text": (
        ALL,
        config(
            "gemma3n_text",
            **{**HEADS, "intermediate_size": [80] * 5},
            **WINDOW,
            layer_types=ALTERNATING,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=tiny.VOCABULARY,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 5,
        ),
    ),
    "gpt_oss": (
        ALL,
        config(
            "gpt_oss", **{**HEADS, "intermediate_size": 32}, **WINDOW, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    "olmo3": (ALL, config("olmo3", **SIZES, **WINDOW)),
    "cohere2": (ALL, config("cohere2", **HEADS, **WINDOW, layer_types=ALTERNATING)),
    "llama4_text": (ALL, families.FAMILIES["llama4_text"]),
    # experts and compressed keys and values
    "qwen3_moe": (ALL, families.FAMILIES["qwen3_moe"]),
    "deepseek_v3": (ALL, families.FAMILIES["deepseek_v3"]),
    "minicpm3": (ALL, config("minicpm3", **{**SIZES, **families.LATENT})),
    "deepseek_v32": (
        ONE,
        config(
            "deepseek_v32",
            **{**SIZES, **families.LATENT},
            **families.ROUTED,
            index_n_heads=4,
            index_head_dim=16,
            index_topk=128,
        ),
    ),
    # state spaces, linear attention, and both beside attention
    "mamba": (WHOLE, config("mamba", **MAMBA)),
    "falcon_mamba": (WHOLE, config("falcon_mamba", **MAMBA)),
    "mamba2": (ONE, config("mamba2", **MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)),
    "jamba": (WHOLE, families.FAMILIES["jamba"]),
    "bamba": (
        ONE,
        config(
            "bamba",
            **SIZES,
            attn_layer_indices=[1, 3],
            mamba_n_heads=8,
            mamba_d_head=12,
            mamba_d_state=10,
            mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
    ),
    "granitemoehybrid": (ONE, families.FAMILIES["granitemoehybrid"]),
    "lfm2": (ONE, families.FAMILIES["lfm2"]),
    "qwen3_next": (ONE, families.FAMILIES["qwen3_next"]),
    "qwen3_5_text": (
        ONE,
        config(
            "qwen3_5_text",
            **HEADS,
            **LINEAR,
            layer_types=["linear_attention", "full_attention"] * 2 + ["full_attention"],
        ),
    ),
    "minimax": (ONE, config("minimax", **HEADS, num_local_experts=4, num_experts_per_tok=2, block_size=8)),
    "rwkv": (
        ONE,
        config(
            "rwkv",
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            num_hidden_layers=3,
            attention_hidden_size=32,
            context_length=256,
        ),
    ),
    "recurrent_gemma": (
        NO_CACHE,
        config("recurrent_gemma", **{**HEADS, "num_hidden_layers": 4}, lru_width=48, attention_window_size=16),
    ),
    "qwen2_5_vl": (ALL, families.WRAPPERS["qwen2_5_vl"]),
}  # fmt: skip


def build(family: str) -> ChatModel:
    """A random float32 model at scale 0.3, at which a wrong state changes the answer."""
    made = FAMILIES[family][1]()
    auto = AutoModelForImageTextToText if family in families.WRAPPERS else AutoModelForCausalLM
    torch.manual_seed(1)
    module = auto.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = parameter.ndim == 1 and ("norm" in name or "ln" in name)
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if gain else 0.0))
    module.tie_weights()
    return wrapped(module)


def wrapped(module: torch.nn.Module) -> ChatModel:
    tokenizer = Tokenizer(tiny.tokenizer(), end_ids=(1,), vocabulary=tiny.VOCABULARY)
    return ChatModel(module, tokenizer, None, LoadSettings(dtype="float32", device="cpu"))


@torch.inference_mode()
def by_whole_passes(model: ChatModel, ids: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer without a cache, where ``generate`` cannot use the model's."""
    said = list(ids)
    for _ in range(count):
        text = torch.tensor([said], device=model.device)
        said.append(int(model.forward(input_ids=text, use_cache=False).logits[0, -1].argmax()))
    return said[len(ids) :]


def letters(support: StateSupport) -> str:
    return "".join(name[0] if getattr(support, name) else "." for name in ("caches", "batches", "splits", "reuses"))


async def beside_others(engine: TransformersEngine, requests: list[Any]) -> list[list[int]]:
    """The first request alone, the second beside one that is cancelled, the third later."""
    first, second, third = requests
    started = asyncio.Event()

    async def early() -> list[int]:
        said = []
        async for token in engine.generate(first):
            said.append(token.id)
            started.set()
        return said

    async def cancelled() -> None:
        await started.wait()
        answer = engine.generate(greedy(prompt(13, 5), 100))
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]

    async def later(request: Any, pause: float) -> list[int]:
        await started.wait()
        await asyncio.sleep(pause)
        return await ids_of(engine, request)

    said, _, *others = await asyncio.gather(early(), cancelled(), later(second, 0.0), later(third, 0.005))
    return [said, *others]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_generate(family: str) -> None:
    model, expected = build(family), FAMILIES[family][0]
    answer = by_whole_passes if expected == NO_CACHE else by_generate
    requests = [greedy(prompt(22, 1), 12), greedy(prompt(5, 2), 6), greedy(prompt(31, 3), 6)]
    alone = [answer(model, request.ids, request.max_tokens) for request in requests]
    with running(model, slots=4) as engine:
        assert letters(engine.support) == expected
        assert engine.slots == (4 if engine.support.batches else 1)
        assert bool(engine.limits) == (expected != ALL)
        assert wait(lambda: beside_others(engine, requests)) == alone
        first = requests[0]
        assert together(engine, [first]) == alone[:1]
        turn = (*first.ids, *alone[0], *prompt(7, 9))
        before = engine.stats.prefilled_tokens
        assert together(engine, [greedy(turn, 6)]) == [answer(model, turn, 6)]
        new = engine.stats.prefilled_tokens - before
        assert new == (1 + 7 if engine.support.reuses else len(turn))


def with_image(text: tuple[int, ...], height: int, width: int) -> EngineRequest:
    """A request with an image of ``height * width`` patches behind the first tokens; four patches are a token."""
    tokens = [families.IMAGE_TOKEN] * (height * width // 4)
    text = tuple(0 if id_ == families.IMAGE_TOKEN else id_ for id_ in text)
    ids = (*text[:5], *tokens, *text[5:])
    media = {
        "pixel_values": torch.randn(height * width, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(height)),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "mm_token_type_ids": torch.tensor([[int(id_ == families.IMAGE_TOKEN) for id_ in ids]]),
    }
    return replace(greedy(ids, 10), media=media)


@pytest.mark.filterwarnings("ignore")
def test_prompts_with_images_of_different_sizes_are_answered_together() -> None:
    """The positions behind an image depend on its size, so that each row has others."""
    model = build("qwen2_5_vl")
    requests = [with_image(prompt(15, 1), 8, 8), greedy(prompt(22, 2), 10), with_image(prompt(9, 3), 4, 12)]
    alone = [by_generate(model, request.ids, 10, **(request.media or {})) for request in requests]
    assert alone[0] != by_generate(model, requests[0].ids, 10)
    with running(model, slots=4) as engine:
        assert together(engine, requests) == alone
        assert together(engine, requests[2:]) == alone[2:]
        assert together(engine, [requests[1]]) == [alone[1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["recurrent_gemma", "jamba", "qwen3_next", "llama"])
def test_texts_are_embedded_between_the_tokens_of_an_answer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = build(family), 12
    request = greedy(prompt(22, 1), count)
    alone = (by_whole_passes if FAMILIES[family][0] == NO_CACHE else by_generate)(model, request.ids, count)
    texts = [prompt(length, length) for length in (100, 5, 200, 100, 9, 100)]
    base: Any = model.module.base_model
    sizes, forward = [], base.forward

    def noted(*args: Any, **inputs: Any) -> Any:
        if not inputs.get("use_cache") and "attention_mask" in inputs:
            sizes.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    async def both(engine: TransformersEngine) -> Any:
        return await asyncio.gather(ids_of(engine, request), engine.embed(texts))

    with running(model) as engine:
        monkeypatch.setattr(base, "forward", noted)
        answer, vectors = wait(lambda: both(engine))
        monkeypatch.undo()
    assert answer == alone
    assert sizes
    assert all(rows * width <= chunk_of(model.device) for rows, width in sizes if rows > 1)
    for ids, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            mean = base(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(vector), mean / mean.norm(), rtol=0, atol=1e-3)


# -- broken states ----------------------------------------------------------------------------------------------------


def past(inputs: dict[str, Any]) -> int:
    cache = inputs.get("cache")
    return 0 if cache is None else cache.get_seq_length()


def late_positions(inputs: dict[str, Any]) -> None:
    if past(inputs) and inputs["input_ids"].shape[1] == 1:
        inputs["position_ids"] = inputs["position_ids"] + 1


def no_mask(inputs: dict[str, Any]) -> None:
    inputs.pop("attention_mask", None)


def no_rows(inputs: dict[str, Any]) -> None:
    if inputs.get("use_cache") and len(inputs["input_ids"]) > 1:
        raise ValueError("a state of one row")


def early_positions(inputs: dict[str, Any]) -> None:
    if past(inputs) and inputs["input_ids"].shape[1] > 1:
        inputs["position_ids"] = inputs["position_ids"] - past(inputs)


class KeepsState:
    """A module that counts the positions itself, from the last pass that began a text."""

    def __init__(self) -> None:
        self.length = 0

    def __call__(self, inputs: dict[str, Any]) -> None:
        rows, count = inputs["input_ids"].shape
        if not past(inputs):
            self.length = 0
        inputs["position_ids"] = torch.arange(self.length, self.length + count).expand(rows, -1)
        self.length += count


BROKEN = [
    (late_positions, NO_CACHE, "without a cache"),
    (no_mask, ONE, "one answer at a time"),
    (no_rows, ONE, "one answer at a time"),
    (early_positions, "cb..", "prompts in one pass, each turn from its beginning"),
    (KeepsState(), NO_CACHE, "without a cache"),
]


@pytest.mark.parametrize(("change", "found", "says"), BROKEN)
def test_a_broken_state_is_found_and_not_used(change: Any, found: str, says: str) -> None:
    model = build("llama")
    forward = model.forward

    def broken(**inputs: Any) -> Any:
        change(inputs)
        return forward(**inputs)

    requests = [greedy(prompt(22, 1), 8), greedy(prompt(5, 2), 6), greedy(prompt(31, 3), 6)]
    alone = [by_generate(model, request.ids, request.max_tokens) for request in requests]
    model.forward = broken  # type: ignore[method-assign]
    with running(model, slots=4) as engine:
        assert letters(engine.support) == found
        assert says in engine.limits
        assert together(engine, requests) == alone
        turn = (*requests[0].ids, *alone[0], *prompt(7, 9))
        assert together(engine, [greedy(turn, 6)]) == [by_generate(model, turn, 6)]


def test_rounding_is_no_broken_state() -> None:
    model = build("llama")
    model.module = model.module.to(torch.bfloat16)
    with running(model) as engine:
        assert letters(engine.support) == ALL


def test_a_model_that_does_not_run_is_refused() -> None:
    model = build("llama")

    def fails(**inputs: Any) -> Any:
        raise RuntimeError("a kernel is missing")

    model.forward = fails  # type: ignore[method-assign]
    with pytest.raises(ForgeError, match="LlamaForCausalLM does not run on text: a kernel is missing"):
        TransformersEngine(model)


def test_the_context_length_is_bounded() -> None:
    model = build("llama")
    engine = TransformersEngine(model, num_ctx=32)
    try:
        assert engine.context_length == 32
        assert [len(answer) for answer in together(engine, [greedy(prompt(30), 100)])] == [3]
    finally:
        engine.close()

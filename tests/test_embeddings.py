"""Embedding models: their modules.json, pooling, batches, and the APIs that embed or refuse."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import is_companion
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import EngineError, EngineSettings
from ollama_forge.serving.engine.encoder import pooled
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest
from ollama_forge.serving.sentence_modules import SentenceModules
from tests import engines, tiny
from tests.loopback import loopback

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def bert(at: Path, *, pooling: dict[str, Any] | None = MEAN, module: Any = None, **files: Any) -> Checkpoint:
    """A tiny random BERT that embeds, with more ``files``."""
    torch.manual_seed(0)
    checkpoint = tiny.save((module or BertModel(BertConfig(**_SIZES))).eval(), at / "bert")
    if pooling is not None:
        write(checkpoint.folder / "modules.json", _MODULES)
        write(checkpoint.folder / "1_Pooling" / "config.json", pooling)
    for name, value in files.items():
        write(checkpoint.folder / f"{name}.json", value)
    return checkpoint


def load(checkpoint: Checkpoint, dtype: str = "auto") -> ServedModel:
    return unloaded_model(checkpoint, "wire", load=LoadSettings(device="cpu", dtype=dtype), max_queue=8).load()


def embed(model: ServedModel, texts: Sequence[str], **options: Any) -> torch.Tensor:
    return torch.tensor(asyncio.run(model.embed(texts, **options))[0])


@torch.inference_mode()
def states(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    """The last hidden states of a text, by transformers alone."""
    ids = torch.tensor([tiny.tokenizer()(text).input_ids])
    module = BertModel.from_pretrained(checkpoint.folder).eval()
    return module(ids).last_hidden_state[0]  # type: ignore[no-any-return]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


# -- modules.json -----------------------------------------------------------------------------------------------------


def test_only_embedding_models_have_modules(tmp_path: Path) -> None:
    assert SentenceModules.of(bert(tmp_path)) == SentenceModules()
    assert SentenceModules.of(tiny.save(tiny.build("llama"), tmp_path / "llama")) is None
    assert SentenceModules.of(bert(tmp_path / "masked", pooling=None, module=BertForMaskedLM(BertConfig(**_SIZES))))


def test_what_the_files_say(tmp_path: Path) -> None:
    checkpoint = bert(
        tmp_path,
        pooling={"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True, "include_prompt": False},
        sentence_bert_config={"max_seq_length": 12, "do_lower_case": True},
        config_sentence_transformers={"prompts": {"query": "Find: "}, "default_prompt_name": "query"},
    )
    modules = SentenceModules.of(checkpoint)
    assert modules is not None
    assert (modules.poolings, modules.max_length, modules.pools_prompt) == (("cls", "lasttoken"), 12, False)
    assert modules.text(" A Boat ") == "find:  a boat"
    assert modules.gguf_pooling is None


def test_newer_files_name_the_pooling(tmp_path: Path) -> None:
    modules = SentenceModules.of(bert(tmp_path, pooling={"pooling_mode": "cls"}))
    assert modules is not None
    assert (modules.poolings, modules.gguf_pooling) == (("cls",), 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("1_Pooling/config", {"pooling_mode_median": True}, "pooling_mode_median"),
        ("1_Pooling/config", {"pooling_mode_cls_token": False}, "pooling of the model"),
        ("modules", [{"path": "0_LSTM", "type": "sentence_transformers.models.LSTM"}], "LSTM"),
    ],
)
def test_unknown_modules_are_refused(tmp_path: Path, name: str, value: Any, words: str) -> None:
    checkpoint = bert(tmp_path, **{name: value})
    with pytest.raises(ForgeError, match=words):
        SentenceModules.of(checkpoint)


def test_files_of_modules_are_fetched() -> None:
    names = [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "onnx/config.json",
        "model.safetensors",
    ]
    assert [is_companion(name) for name in names] == [True, True, True, False, False]


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_poolings() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [6.0], [50.0]], [[8.0], [90.0], [90.0], [90.0]]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = {name: pooled(hidden, mask, name).flatten().tolist() for name in ("cls", "lasttoken", "max", "mean")}
    assert found == {"cls": [1, 8], "lasttoken": [6, 8], "max": [6, 8], "mean": [3, 8]}
    assert pooled(hidden, mask, "weightedmean").flatten().tolist() == pytest.approx([23 / 6, 8])
    assert pooled(hidden, mask, "mean_sqrt_len").flatten().tolist() == pytest.approx([9 / 3**0.5, 8])
    late = torch.tensor([[False, True, True, False]])  # a prompt that is not pooled
    assert (pooled(hidden[:1], late, "cls").item(), pooled(hidden[:1], late, "mean").item()) == (2, 4)


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_vectors_are_the_pooled_states(tmp_path: Path, pooling: str) -> None:
    checkpoint = bert(tmp_path, pooling={f"pooling_mode_{pooling}": True})
    model = load(checkpoint)
    found = embed(model, ["A boat.", "A green boat"])
    for text, vector in zip(["A boat.", "A green boat"], found, strict=True):
        token_vectors = states(checkpoint, text)
        parts = {"mean_tokens": token_vectors.mean(0), "cls_token": token_vectors[0], "lasttoken": token_vectors[-1]}
        torch.testing.assert_close(vector, unit(parts[pooling]), atol=1e-5, rtol=0)
    asyncio.run(model.close())


def test_dense_layers_and_a_prompt_that_is_not_pooled(tmp_path: Path) -> None:
    prompts = {"prompts": {"any": "Say: "}, "default_prompt_name": "any"}
    modules = [*_MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    checkpoint = bert(
        tmp_path, pooling={**MEAN, "include_prompt": False}, config_sentence_transformers=prompts, modules=modules
    )
    weight, bias = torch.randn(5, 16), torch.randn(5)
    write(checkpoint.folder / "2_Dense" / "config.json", {"activation_function": "torch.nn.modules.activation.Tanh"})
    save_file({"linear.weight": weight, "linear.bias": bias}, checkpoint.folder / "2_Dense" / "model.safetensors")
    model = load(checkpoint)
    mean = states(checkpoint, "Say: boat")[len("Say: ") :].mean(0)  # a token is a byte
    torch.testing.assert_close(embed(model, ["boat"])[0], unit(torch.tanh(weight @ mean + bias)), atol=1e-5, rtol=0)
    asyncio.run(model.close())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gemma3_text", "gpt2"])
def test_a_batch_equals_each_alone(tmp_path: Path, family: str, dtype: str) -> None:
    inputs = [engines.prompt(length, seed=length) for length in (1, 40, 3, 17, 18, 5, 29, 2, 40)]
    if family in ("bert", "roberta"):
        kind = (BertConfig, BertModel) if family == "bert" else (RobertaConfig, RobertaModel)
        module = kind[1](kind[0](**_SIZES))
        model = load(bert(tmp_path, module=module), dtype)
        engine: Any = model.engine
        assert engine.context_length == (64 if family == "bert" else 63)  # RoBERTa's begin behind the padding
    else:
        settings = LoadSettings(dtype=dtype, device="cpu")
        engine = engines.TransformersEngine(ChatModel.load(tiny.save(tiny.build(family), tmp_path), settings))
    together = torch.tensor(engines.wait(lambda: engine.embed(inputs)))
    alone = torch.tensor([engines.wait(lambda ids=ids: engine.embed([ids]))[0] for ids in inputs])  # type: ignore[misc]
    engine.close()
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * len(inputs), abs=1e-4)
    assert (together[1] - together[8]).abs().max() < 1e-3 < (together[1] - together[3]).abs().max()


def test_long_texts_keep_the_end_token(tmp_path: Path) -> None:
    model = load(bert(tmp_path, sentence_bert_config={"max_seq_length": 12}))
    assert model.engine.context_length == 12
    backend = model.tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 1)])
    vectors, tokens = asyncio.run(model.embed(["boat" * 9]))
    assert tokens == 12
    assert backend.truncation is None  # a setting of the tokenizer, which encodes prompts in other threads too
    engine: Any = model.engine
    ids = [*model.tokenizer("boatboatboa", add_special_tokens=False).input_ids, 1]
    assert vectors[0] == pytest.approx(engines.wait(lambda: engine.embed([ids]))[0], abs=1e-5)
    asyncio.run(model.close())


def test_the_context_length_is_bounded(tmp_path: Path) -> None:
    settings = LoadSettings(device="cpu")
    model = unloaded_model(bert(tmp_path), "wire", load=settings, max_queue=8, engine=EngineSettings(num_ctx=5)).load()
    assert (model.engine.context_length, model.metadata.context_length) == (5, 5)
    with pytest.raises(BadRequest, match="exceeds the context length"):
        asyncio.run(model.embed(["a text of more than five tokens"], truncate=False))


def test_the_engine_refuses_what_it_cannot_embed(tmp_path: Path) -> None:
    engine: Any = load(bert(tmp_path)).engine
    for ids, words in (([], "0 tokens"), ([5] * 65, "65 tokens"), ([-1], "does not know"), ([9999], "does not know")):
        with pytest.raises(EngineError, match=words):
            engines.wait(lambda ids=ids: engine.embed([ids]))  # type: ignore[misc]
    assert engine.healthy
    engine.close()
    assert not engine.healthy
    with pytest.raises(EngineError, match="unloaded"):
        engines.wait(lambda: engine.embed([[5]]))


def test_closing_ends_what_waits_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = load(bert(tmp_path)).engine
    begun, go_on, embedded = threading.Event(), threading.Event(), engine._embed

    def held(inputs: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return embedded(inputs)

    monkeypatch.setattr(engine, "_embed", held)

    async def run() -> list[Any]:
        asked = [asyncio.create_task(engine.embed([[5, number]])) for number in (6, 7)]
        await asyncio.to_thread(begun.wait, 30)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while engine.healthy:
            await asyncio.sleep(0.01)
        go_on.set()
        await closing
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second = engines.wait(run)
    assert len(first) == 1
    assert isinstance(second, EngineError)
    assert "unloaded" in str(second)


# -- the APIs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with loopback(load(bert(tmp_path_factory.mktemp("served")))) as url:
        yield url


def test_embeddings_over_http(url: str) -> None:
    def vectors(path: str, **body: Any) -> Any:
        return httpx.post(url + path, json={"model": "wire", **body}).raise_for_status().json()

    texts = ["A boat.", "A green boat in the harbour"]
    both = vectors("/api/embed", input=texts)
    assert both["prompt_eval_count"] == sum(map(len, texts))
    assert vectors("/api/embeddings", prompt=texts[0])["embedding"] == pytest.approx(both["embeddings"][0], abs=1e-5)
    data = vectors("/v1/embeddings", input=texts, encoding_format="base64")["data"]
    for entry, vector in zip(data, both["embeddings"], strict=True):
        raw = base64.b64decode(entry["embedding"])
        assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(vector, abs=1e-5)
    short = vectors("/api/embed", input=texts[0], dimensions=4)["embeddings"][0]
    assert torch.tensor(short).tolist() == pytest.approx(
        unit(torch.tensor(both["embeddings"][0][:4])).tolist(), abs=1e-5
    )


def test_show_names_the_capability(url: str) -> None:
    shown = httpx.post(f"{url}/api/show", json={"model": "wire"}).json()
    assert shown["capabilities"] == ["embedding"]
    info = shown["model_info"]
    assert (info["general.architecture"], info["bert.pooling_type"], info["bert.context_length"]) == ("bert", 1, 64)
    assert httpx.get(f"{url}/api/tags").json()["models"][0]["capabilities"] == ["embedding"]


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "task"),
    [
        ("/api/chat", {"messages": MESSAGES}, "chat"),
        ("/api/chat", {}, "chat"),
        ("/api/generate", {"prompt": "hi"}, "generate"),
        ("/api/generate", {}, "generate"),
        ("/v1/chat/completions", {"messages": MESSAGES}, "chat"),
        ("/v1/completions", {"prompt": "hi"}, "generate"),
        ("/v1/responses", {"input": "hi"}, "chat"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}, "chat"),
    ],
)
def test_it_does_not_chat(url: str, path: str, body: dict[str, Any], task: str) -> None:
    response = httpx.post(url + path, json={"model": "wire", **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error if isinstance(error, str) else error["message"]) == f'"wire" does not support {task}'

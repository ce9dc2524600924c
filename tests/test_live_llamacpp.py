"""``serve --live`` with llama.cpp: a GGUF file and an adapter, which each request applies at a strength of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.gguf import write_gguf_adapter
from ollama_forge.export.edited_gguf import GgufEdit, write_edited_file
from ollama_forge.models import gguf_model
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.serving.engine.base import EngineRequest, EngineSettings, SamplingParams
from ollama_forge.serving.engine.choice import load_engine
from ollama_forge.serving.live_source import LiveSource
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.serving.run_facts import LIVE_KEY
from ollama_forge.text.tokenizer import Tokenizer
from tests.engines import by_generate, greedy, prompt, running, together, wait
from tests.gguf_models import Model
from tests.test_adapters import edit_of, not_tables
from tests.test_live import F32, edited, orthogonal

if not llamacpp_is_installed():
    pytest.skip("the extra llamacpp is not installed", allow_module_level=True)

from ollama_forge.serving.engine.llamacpp import LlamaCppEngine

STRENGTHS = (0.0, 1.0, -0.5, 0.25)


def edit(base: GgufCheckpoint) -> EditRecord:
    return edit_of(base, map_checkpoint(base), lambda matrix: not_tables(matrix) and not matrix.is_expert)


@contextmanager
def live(model: Model, record: EditRecord | None, slots: int = 2, path: Path | None = None) -> Iterator[Any]:
    """The engine on the model's file, or on another file of it; without a record, without an adapter."""
    base = model.opened(path or model.path)

    def write(path: Path) -> object:
        assert record is not None
        return write_gguf_adapter(record, map_checkpoint(base), base.layout, base.file.architecture, path)

    engine = LlamaCppEngine(
        path or model.path,
        Tokenizer.load(base.folder),
        base.config,
        slots=slots,
        write_adapter=None if record is None else write,
        threads=1,
    )
    try:
        yield engine
    finally:
        engine.close()


def answers(engine: Any, *asked: tuple[tuple[int, ...], float]) -> list[list[int]]:
    """Answers one after the other."""
    return [together(engine, [greedy(ids, 16, strength=strength)])[0] for ids, strength in asked]


def test_every_strength_is_the_model_edited_at_it(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    model = gguf_models["gemma2"]
    record = edit(model.opened(model.path))
    requests = [
        greedy(prompt(20 + 5 * place, place), 32, strength=strength) for place, strength in enumerate(STRENGTHS)
    ]
    with live(model, record, slots=4) as engine:
        mixed = together(engine, requests)
        assert mixed == [together(engine, [request])[0] for request in requests]
    with live(model, None, slots=4) as engine:
        assert mixed[0] == together(engine, requests)[0]
    assert mixed[0] == by_generate(ChatModel.load(model.checkpoint, F32), requests[0].ids, 32)
    of_folder = replace(record, fingerprint=model.checkpoint.fingerprint)
    expected = by_generate(edited(model.checkpoint, of_folder, tmp_path / "edited"), requests[1].ids, 32)
    assert mixed[1] == expected
    assert mixed[1] != by_generate(ChatModel.load(model.checkpoint, F32), requests[1].ids, 32)


def test_on_an_f16_file_strength_one_is_the_edited_file(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    model = gguf_models["gemma2"]
    base = model.with_types(tmp_path / "f16.gguf", lambda tensor: Type.F16 if len(tensor.shape) > 1 else tensor.type)
    assert Counter(tensor.type for tensor in base.file.tensors)[Type.F16] > 10
    record, mapped = edit(base), map_checkpoint(base)
    plan = record.plan(mapped, base.fingerprint)
    write_edited_file(GgufEdit(base, mapped, plan, None), tmp_path / "edited.gguf")
    requests = [greedy(prompt(20 + seed, seed), 32, strength=seed % 2) for seed in range(4)]
    with live(model, record, slots=4, path=base.path) as engine:
        mixed = together(engine, requests)
        assert mixed == [together(engine, [request])[0] for request in requests]
    with live(model, None, path=base.path) as engine:
        unedited = [together(engine, [request])[0] for request in requests]
    with live(model, None, path=tmp_path / "edited.gguf") as engine:
        changed = [together(engine, [request])[0] for request in requests]
    assert mixed == [unedited[0], changed[1], unedited[2], changed[3]]
    assert all(one != other for one, other in zip(unedited, changed, strict=True))


@pytest.mark.parametrize(("family", "slots", "length"), [("llama", 1, 60), ("gpt_oss", 1, 160), ("gpt_oss", 2, 60)])
def test_caches_keep_strengths_apart(gguf_models: Mapping[str, Model], family: str, slots: int, length: int) -> None:
    """In a slot, in llama.cpp's cache of prompts, and in its checkpoints of a sliding window."""
    model = gguf_models[family]
    record = edit(model.opened(model.path))
    prompts = [prompt(length, seed) for seed in range(4)]
    expected = {}
    for strength in STRENGTHS:
        with live(model, record, slots=1) as engine:  # it never hears of another strength
            for number, ids in enumerate(prompts):
                (answer,) = answers(engine, (ids, strength))
                turn = (*ids, *answer, *prompt(5, 9))
                expected[number, strength] = [(ids, answer), (turn, *answers(engine, (turn, strength)))]
    assert len({str(found) for found in expected.values()}) > len(expected) // 2
    with live(model, record, slots=slots) as engine:
        for strengths in ((0.0, 1.0, 0.25, 1.0, 0.0, -0.5, 1.0), (1.0, 0.0)):
            for number in (0, 1, 2, 3, 0):
                for strength in strengths:
                    for ids, answer in expected[number, strength]:
                        assert answers(engine, (ids, strength)) == [answer]
        for strength in (1.0, 0.0, 0.25, 1.0):
            for number in range(len(prompts)):
                for ids, answer in expected[number, strength]:
                    assert answers(engine, (ids, strength)) == [answer]


def test_a_conversation_is_continued_at_its_own_strength_alone(gguf_models: Mapping[str, Model]) -> None:
    model = gguf_models["gemma2"]
    computed: list[int] = []  # tokens of the prompt

    class Watched:
        def handle_completions(self, body: dict[str, Any], take: Callable[[Any], Any]) -> None:
            def watched(chunk: Any) -> Any:
                progress = chunk["__verbose"].get("prompt_progress")
                if progress is not None and progress["processed"] == progress["total"]:
                    computed.append(progress["total"] - progress["cache"])
                return take(chunk)

            server.handle_completions(body, watched)

    def ask(engine: Any, ids: tuple[int, ...], strength: float) -> None:
        best = SamplingParams(temperature=1.0, top_k=1)  # llama.cpp is not asked again for what it left out
        together(engine, [EngineRequest(ids, 4, best, strength=strength)])

    first = prompt(40)
    turn = (*first, *prompt(6, 3))
    with live(model, edit(model.opened(model.path)), slots=3) as engine:
        server, engine._server = engine._server, Watched()
        for ids, strength in ((first, 1.0), (prompt(40, 5), 1.0), (turn, 0.5), (turn, 1.0), (turn, 0.5), (turn, 0.0)):
            ask(engine, ids, strength)
    assert computed == [40, 40, 46, 6, 1, 46]


def test_embeddings_are_those_of_the_edited_model(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    model = gguf_models["gemma2"]
    record = edit(model.opened(model.path))
    inputs = [prompt(7), prompt(12, 1)]
    with live(model, record) as engine:
        answers(engine, (inputs[0], 0.0))
        found = torch.tensor(wait(lambda: engine.embed(inputs)))
    of_folder = replace(record, fingerprint=model.checkpoint.fingerprint)
    with running(edited(model.checkpoint, of_folder, tmp_path / "edited")) as other:
        expected = torch.tensor(wait(lambda: other.embed(inputs)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_a_file_is_served_with_its_edit(
    gguf_models: Mapping[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf_models["gemma2"]
    base = model.opened(model.path)
    record = edit(base)
    monkeypatch.setattr(gguf_model, "usable_threads", lambda: 1)
    monkeypatch.setattr("ollama_forge.serving.engine.llamacpp.usable_threads", lambda: 1)
    source = LiveSource(base, record, tmp_path / "edited.gguf")
    served = unloaded_model(
        base, "mine", load=F32, max_queue=5, engine=EngineSettings("llamacpp", slots=2), live=source
    ).load()
    assert isinstance(served.engine, LlamaCppEngine)
    with live(model, record) as engine:
        asked = (prompt(20), 1.0), (prompt(20), 0.0)
        assert answers(served.engine, *asked) == answers(engine, *asked)
    adapter = served.engine._adapter
    assert adapter.is_file()
    wait(served.close)
    assert not adapter.parent.exists()
    assert served.live
    assert served.metadata.model_info[LIVE_KEY] == 1.0
    assert served.engine_reason.startswith("engine: llama.cpp on gemma2.gguf")


def test_edits_without_an_adapter_are_refused_or_left_to_transformers(gguf_models: Mapping[str, Model]) -> None:
    base = gguf_models["gemma2"].opened(gguf_models["gemma2"].path)
    record = edit(base)
    name, entry = next(iter(record.matrices.items()))
    normed = replace(record, matrices={name: replace(entry, rescale=Rescale.COLUMNS)})
    for wanted in ("llamacpp", "auto"):
        with pytest.raises(ForgeError, match="norm rule scales the columns"):
            load_engine(base, F32, EngineSettings(wanted, slots=2), edit=normed)
    biased = gguf_models["gpt2"].opened(gguf_models["gpt2"].path)
    shifting = orthogonal(biased, targets=("writers",))
    with pytest.raises(ForgeError, match="adapters change matrices alone"):
        load_engine(biased, F32, EngineSettings("llamacpp", slots=2), edit=shifting)
    loaded = load_engine(biased, F32, EngineSettings(slots=2), edit=shifting)
    loaded.engine.close()
    assert loaded.reason.startswith("engine: transformers (the edit changes")

"""A model whose layers are on several devices computes what it computes on one.

There are no GPUs here: the devices are pretended ones (``pretended_devices.py``), whose tensors no operation mixes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.registry import method, settings_of
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import DEVICE_MAPS, devices_for
from ollama_forge.models.holder import for_cluster
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.serving.engine.live import LiveEdit
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import tiny
from tests.engines import greedy, prompt, running, together, wait
from tests.pretended_devices import DEVICES, pretended
from tests.split_models import split

SETTINGS = LoadSettings(dtype="float32", device="cpu", batch_size=4)
FIT = PartPrompts(tuple(tiny.lines(8, 1)), tuple(tiny.lines(8, 2)))


def found_by(model: ChatModel, source: Checkpoint) -> dict[str, Any]:
    """The direction, fitted keys, and answers and divergences of two edits."""
    read = vector_reader(source.tensors)
    direction = compute_direction(model, FIT, DirectionSettings(), fingerprint=source.fingerprint)
    settings = settings_of("least-squares", {})
    fitted = method("least-squares").fit(FitContext(model, FIT, read, 0), settings, {"direction": direction})
    keys = fitted["direction"]
    prompts = model.tokenizer.instructions_ids(list(FIT.harmless[:4]))
    reference = Reference.of(model, prompts, 6)
    moved = []
    for plan in (
        method("least-squares").plan(model.model_map, direction, keys, settings, read),
        method("orthogonal").plan(model.model_map, direction, FittedFactors(), settings_of("orthogonal", {}), read),
    ):
        with hooked(model, plan) as edited:
            found = divergence(edited, reference)
        moved += [found.answer_kl.value, found.first_token_kl.value]
    return {
        "direction": direction.vectors,
        "keys": {name: factors.K for name, factors in keys.by_tensor.items()},
        "answers": reference.answers,
        "KL": moved,
        "loss": model.loss("one two three"),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "falcon"])
def test_measures_as_on_one_device(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build(family), tmp_path / "model")
    model_map = map_checkpoint(source)
    expected = found_by(ChatModel.load(source, SETTINGS, model_map), source)
    whole = ChatModel.load(source, SETTINGS, model_map)
    with pretended():
        model = split(whole, model_map.layers, DEVICES)
        assert set(model.devices) >= set(DEVICES)  # a buffer that no layer owns stays on the CPU
        assert model.device_of(model.layer(model_map.n_layers - 1)) == DEVICES[1]
        found = found_by(model, source)
    assert found.pop("answers") == expected.pop("answers")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_serves_as_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers together, a second turn, embeddings, and an edit at each request's strength."""
    work = TransformersEngine._work

    def work_on_pretended(engine: TransformersEngine) -> None:
        with pretended():
            work(engine)

    source = tiny.save(tiny.build("mistral"), tmp_path / "model")
    model_map = map_checkpoint(source)
    direction = compute_direction(
        ChatModel.load(source, SETTINGS, model_map), FIT, DirectionSettings(), fingerprint=source.fingerprint
    )
    settings = EditSettings(norm_preserving=False, skip_begin_layers=0, skip_end_layers=0, strength=2.0)
    plan = method("orthogonal").plan(model_map, direction, FittedFactors(), settings, vector_reader(source.tensors))
    record = planned_record(source, plan, {})
    requests = [greedy(prompt(9 + 20 * each, each), 12) for each in range(3)]
    mixed = [greedy(prompt(11, 7), 12, strength=strength) for strength in (0.0, 1.0, -0.5)]
    texts = [prompt(length, length) for length in (3, 30, 300)]

    on_devices: list[int] = []

    def found(model: ChatModel) -> list[Any]:
        with running(model) as engine:
            assert engine.support.batches
            on_devices.append(engine.device_bytes)
            answers = together(engine, requests)
            turn = greedy((*requests[0].ids, *answers[0], *prompt(7, 9)), 6)
            values = [answers, together(engine, [turn]), wait(lambda: engine.embed(texts))]
        engine = TransformersEngine(model, slots=4, live=LiveEdit(model, record))
        try:
            return [*values, together(engine, mixed)]
        finally:
            engine.close()

    expected = found(ChatModel.load(source, SETTINGS, model_map))
    assert len(set(map(tuple, expected[-1]))) == 3
    model = ChatModel.load(source, SETTINGS, model_map)
    monkeypatch.setattr(TransformersEngine, "_work", work_on_pretended)
    with pretended():
        values = found(split(model, model_map.layers, DEVICES))
    assert on_devices == [0, sum(4 * weight.numel() for weight in model.module.parameters())]
    vectors = values.pop(2), expected.pop(2)
    assert values == expected
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (LoadSettings(device_map="fast"), "unknown --device-map 'fast'"),
        (LoadSettings(device_map="auto", device="cpu"), "--device cpu names one"),
        (LoadSettings(device_map="auto", memory=1 << 30), "--memory streams a model to one device"),
        (LoadSettings(device_map="auto"), "there are none"),
    ],
)
def test_combinations_that_have_no_meaning(settings: LoadSettings, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: settings.memory is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=says):
        settings.check()


def test_all_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name in DEVICE_MAPS:
        assert devices_for("auto", name) == tuple(torch.device("cuda", number) for number in range(3))
    assert devices_for("cpu", None) == (torch.device("cpu"),)


def test_a_cluster_excludes_it() -> None:
    cluster: Any = object()
    with pytest.raises(UsageError, match="every worker has one GPU"):
        for_cluster(LoadSettings(device_map="auto"), cluster)

"""``serve --live``: a base model with an edit that each request applies at a strength of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.api import apply
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.registry import method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.adapters.changes import low_rank_changes, module_changes
from ollama_forge.files import write_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine import batched_runner
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.live import LiveEdit
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.engine.transformers import TransformersEngine
from ollama_forge.serving.live_source import live_source_of, live_source_of_run
from ollama_forge.serving.metadata import ModelMetadata, live_metadata
from ollama_forge.serving.run_facts import LIVE_KEY, REPORT_KEY
from ollama_forge.sources.resolve import resolve
from tests import made_report, moe, tiny
from tests.engines import by_generate, greedy, prompt, together
from tests.loopback import loopback, scripted
from tests.test_adapters import edit_of, not_tables
from tests.test_api_security import call

F32 = LoadSettings(dtype="float32", device="cpu")
STRENGTHS = (0.0, 1.0, -0.5)


@contextmanager
def live_engine(source: Checkpoint, record: EditRecord, slots: int = 4) -> Iterator[TransformersEngine]:
    model = ChatModel.load(source, F32)
    engine = TransformersEngine(model, slots=slots, live=LiveEdit(model, record))
    try:
        yield engine
    finally:
        engine.close()


def edited(source: Checkpoint, record: EditRecord, folder: Path) -> ChatModel:
    """The model with the edit in its weights."""
    model = map_checkpoint(source)
    write_checkpoint(source, model, record.plan(model, source.fingerprint), folder, settings=None)
    return ChatModel.load(Checkpoint(folder, folder.name, "folder"), F32)


def scaled(record: EditRecord, strength: float) -> EditRecord:
    """The edit at a multiple of its strength."""
    matrices = {name: replace(entry, strength=strength * entry.strength) for name, entry in record.matrices.items()}
    shifts = {name: strength * delta for name, delta in record.bias_shifts.items()}
    return replace(record, matrices=matrices, bias_shifts=shifts)


def orthogonal(source: Checkpoint, **settings: Any) -> EditRecord:
    """An orthogonal edit along a random direction, as ``apply`` records it."""
    model = map_checkpoint(source)
    direction = RefusalDirection(
        torch.nn.functional.normalize(torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))),
        layer=1,
    )
    chosen = EditSettings(norm_preserving=False, skip_begin_layers=0, skip_end_layers=0, **settings)
    plan = method("orthogonal").plan(model, direction, FittedFactors(), chosen, vector_reader(source.tensors))
    return planned_record(source, plan, {})


def matrices(chosen: Callable[[Matrix], bool]) -> Callable[[Checkpoint], EditRecord]:
    return lambda source: edit_of(source, map_checkpoint(source), chosen)


CASES: dict[str, Callable[[Checkpoint], EditRecord]] = {
    "mistral": matrices(lambda matrix: True),  # tables too: they are not tied
    "gpt2": matrices(not_tables),  # Conv1D, with q, k and v in one matrix
    "phi3": matrices(not_tables),  # fused
    "llama-bias": lambda source: orthogonal(source, targets=("writers",), strength=2.0),
    "gpt_oss": lambda source: orthogonal(source, targets=("attention", "mlp"), strength=2.0),
    "qwen2_moe": lambda source: orthogonal(source, targets=("writers",), strength=2.0),
}


@pytest.mark.parametrize("family", CASES)
def test_every_strength_is_the_model_edited_at_it(tmp_path: Path, family: str) -> None:
    module = moe.build(family) if family in moe.FAMILIES else tiny.build(family)
    source = tiny.save(module, tmp_path / "model")
    record = CASES[family](source)
    prompts = [prompt(5 + 3 * place, place) for place in range(3)]
    requests = [
        greedy(ids, 8, strength=strength, top_logprobs=0) for ids, strength in zip(prompts, STRENGTHS, strict=True)
    ]
    with live_engine(source, record) as engine:
        base = [by_generate(engine.model, ids, 8) for ids in prompts]
        mixed = together(engine, requests)
        alone = [together(engine, [replace(request)])[0] for request in requests]
        with torch.inference_mode():
            logits = {
                strength: _logits(engine, ids, strength) for ids, strength in zip(prompts, STRENGTHS, strict=True)
            }
    assert mixed == alone
    assert mixed[0] == base[0]
    for place, strength in enumerate(STRENGTHS):
        model = edited(source, scaled(record, strength), tmp_path / str(place))
        assert mixed[place] == by_generate(model, prompts[place], 8)
        expected = model.forward(input_ids=torch.tensor([prompts[place]]), keep=None).logits
        torch.testing.assert_close(logits[strength], expected, rtol=1e-3, atol=2e-4)
    assert mixed[1] != base[1]


def _logits(engine: TransformersEngine, ids: tuple[int, ...], strength: float) -> torch.Tensor:
    live = engine._live
    assert live is not None
    with live.at([strength]):
        logits: torch.Tensor = engine.model.forward(input_ids=torch.tensor([ids]), keep=None).logits
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, EditRecord]:
    source = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("llama") / "model")
    return source, edit_of(source, map_checkpoint(source), not_tables)


@torch.inference_mode()
def test_strength_0_is_the_base_to_the_last_bit(llama: tuple[Checkpoint, EditRecord]) -> None:
    source, record = llama
    ids = torch.tensor([prompt(9), prompt(9, 1)])
    base = ChatModel.load(source, F32).forward(input_ids=ids).logits
    model = ChatModel.load(source, F32)
    live = LiveEdit(model, record)
    assert torch.equal(model.forward(input_ids=ids).logits, base)
    with live.at([0.0, 0.0]):
        assert torch.equal(model.forward(input_ids=ids).logits, base)
    with live.at([0.0, 1.0]):
        beside = model.forward(input_ids=ids).logits
    torch.testing.assert_close(beside[0], base[0])
    assert (beside[1] - base[1]).abs().max() > 0.1


def test_a_prefix_is_reused_at_its_own_strength_alone(llama: tuple[Checkpoint, EditRecord]) -> None:
    with live_engine(*llama) as engine:
        first = prompt(40)
        answer = together(engine, [greedy(first, 4, strength=1.0)])[0]
        turn = (*first, *answer, *prompt(6, 3))

        def prefilled(strength: float) -> int:
            before = engine.stats.prefilled_tokens
            together(engine, [greedy(turn, 1, strength=strength)])
            return engine.stats.prefilled_tokens - before

        assert prefilled(0.5) == len(turn)
        assert prefilled(1.0) == len(turn) - len(first) - len(answer) + 1
        assert prefilled(0.5) == 1


def test_strengths_beside_each_other_share_groups_and_no_prefix(
    llama: tuple[Checkpoint, EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    source, record = llama
    strengths = (0.0, 1.0, -0.5)
    models = {each: edited(source, scaled(record, each), tmp_path / str(each)) for each in strengths}
    system = prompt(200)
    first = [greedy((*system, *prompt(5 + place, place)), 12, strength=each) for place, each in enumerate(strengths)]
    first += [greedy((*system, *prompt(9, 11)), 12, strength=1.0)]  # waits for the other one
    first += [greedy(prompt(6, 20), 12, strength=each) for each in strengths]  # a group of short rows
    merged = BatchedRunner._in_one_pass
    groups: list[int] = []

    def noted(self: BatchedRunner, *args: Any) -> torch.Tensor:
        groups.append(len(self.groups))
        return merged(self, *args)

    monkeypatch.setattr(BatchedRunner, "_in_one_pass", noted)
    with live_engine(source, record, slots=8) as engine:
        found = together(engine, first)
        computed = sum(len(request.ids) for request in first) - len(system)  # one of the same strength copied it
        assert engine.stats.prefilled_tokens == computed
        runner: Any = engine._scheduler.runner
        assert runner.one_pass
    assert found == [by_generate(models[request.strength], request.ids, 12) for request in first]
    assert len(groups) > 1
    assert max(groups) > 1


def test_embeddings_are_those_of_the_edited_model(llama: tuple[Checkpoint, EditRecord], tmp_path: Path) -> None:
    import asyncio

    source, record = llama
    inputs = [prompt(7), prompt(12, 1)]
    with live_engine(source, record) as engine:
        found = asyncio.run(engine.embed(inputs))
    other = TransformersEngine(edited(source, record, tmp_path / "edited"))
    expected = asyncio.run(other.embed(inputs))
    other.close()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


def test_what_has_no_form_for_each_request_is_refused(llama: tuple[Checkpoint, EditRecord], tmp_path: Path) -> None:
    source, record = llama
    model = ChatModel.load(source, F32)
    name, entry = next(iter(record.matrices.items()))
    with pytest.raises(ForgeError, match="norm rule scales the columns"):
        LiveEdit(model, replace(record, matrices={name: replace(entry, rescale=Rescale.COLUMNS)}))
    experts = tiny.save(tiny.build("gpt_oss"), tmp_path / "experts")
    own = edit_of(experts, map_checkpoint(experts), lambda matrix: matrix.is_expert)
    with pytest.raises(ForgeError, match="do not share one projection"):
        LiveEdit(ChatModel.load(experts, F32), own)


def test_a_module_that_mixes_the_requests_is_refused(
    llama: tuple[Checkpoint, EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, record = llama
    model = ChatModel.load(source, F32)
    mlp = model.module.get_submodule("model.layers.1.mlp")
    computed = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: computed(x.transpose(0, 1)).transpose(0, 1))  # positions first
    with pytest.raises(ForgeError, match=r"layers\.1\.mlp\S+ .* mixes the requests"):
        LiveEdit(model, record)


# -- finding the base -------------------------------------------------------------------------------------------------


@pytest.fixture
def applied(llama: tuple[Checkpoint, EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that ``apply`` edited, in the folder of a run; the base lies beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    source = tiny.save(tiny.build("llama"), tmp_path / "base")
    record = replace(llama[1], fingerprint=source.fingerprint)
    record.save(tmp_path / "refusal.edit.safetensors")
    apply("base", Path("abliterate-mine/checkpoint"), edit_file=Path("refusal.edit.safetensors"))
    return tmp_path


def test_the_base_of_an_edited_model_is_found(applied: Path) -> None:
    edited = Path("abliterate-mine/checkpoint")
    for found in (live_source_of(edited), live_source_of_run("mine")):
        assert (found.base.folder, found.edited.resolve()) == (applied / "base", edited.resolve())
        assert len(found.record.matrices) > 1


def test_a_base_that_is_not_at_hand_is_an_error(applied: Path) -> None:
    (applied / "base").rename(applied / "elsewhere")
    with pytest.raises(ForgeError, match="base model that mine was edited from is not at hand"):
        live_source_of_run("mine")
    tiny.save(tiny.build("llama", seed=1), applied / "base")  # another model in its place
    with pytest.raises(ForgeError, match="not at hand, or it has changed"):
        live_source_of(Path("abliterate-mine/checkpoint"))
    (applied / "abliterate-mine" / "run.toml").write_text('model = "elsewhere"\n')
    assert live_source_of_run("mine").base.folder == applied / "elsewhere"
    with pytest.raises(ForgeError, match="abliterate-other holds no edit file"):
        live_source_of_run("other")
    with pytest.raises(UsageError, match="no/folder does not exist"):
        live_source_of(Path("no/folder"))


def test_facts_of_the_run_are_shown(applied: Path) -> None:
    write_json(applied / "abliterate-mine" / "report.json", made_report.made().to_json())
    edited = resolve("abliterate-mine/checkpoint")
    shown = ModelMetadata.of(edited)
    assert LIVE_KEY not in shown.model_info
    figures = shown.model_info[REPORT_KEY]
    assert figures["edit"] == "least squares, layer 20, strength 2"
    assert {"name": "edited", "refused": 3, "harmful": 151, "answer_kl": 0.0185} in figures["rows"]
    live = live_metadata(ModelMetadata.of(resolve("base")), edited.folder)
    assert live.model_info[REPORT_KEY] == figures
    assert live.model_info[LIVE_KEY] == 1.0
    assert "source: base" in live.provenance


# -- requests ---------------------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "/api/chat": lambda strength: {"messages": HI, "options": {"abliteration_strength": strength}},
    "/api/generate": lambda strength: {"prompt": "hi", "options": {"abliteration_strength": strength}},
    "/v1/chat/completions": lambda strength: {"messages": HI, "abliteration_strength": strength},
    "/v1/completions": lambda strength: {"prompt": "hi", "abliteration_strength": strength},
    "/v1/responses": lambda strength: {"input": "hi", "abliteration_strength": strength},
    "/v1/messages": lambda strength: {"messages": HI, "max_tokens": 5, "abliteration_strength": strength},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_request_names_its_strength(path: str) -> None:
    model = scripted(lambda *_: "hello")
    with loopback(model) as url:

        def send(strength: float | None) -> tuple[int, str]:
            status, _, text = call(url, "POST", path, {"model": "wire", "stream": False, **BODIES[path](strength)})
            return status, text.decode() if isinstance(text, bytes) else text

        assert [send(strength)[0] for strength in (None, 1, 1.0)] == [200] * 3
        status, text = send(0)
        assert (status, "start the server with --live" in text) == (400, True)
        model.live = True
        assert [send(strength)[0] for strength in (None, 0, -0.5, 1e9)] == [200] * 4
    engine = model.engine
    assert isinstance(engine, ScriptedEngine)
    assert [request.strength for request in engine.requests] == [1.0, 1.0, 1.0, 1.0, 0.0, -0.5, 10.0]


def test_a_strength_of_another_type_and_one_of_embeddings_are_refused() -> None:
    with loopback(scripted(lambda *_: "hello")) as url:
        bad = {"model": "wire", **BODIES["/api/chat"]("much")}
        assert call(url, "POST", "/api/chat", bad)[0] == 500
        embed = {"model": "wire", "input": "hi", "options": {"abliteration_strength": 0}}
        assert call(url, "POST", "/api/embed", embed)[0] == 400


# -- the demo model ---------------------------------------------------------------------------------------------------


def test_the_demo_model(tmp_path: Path) -> None:
    source = resolve("demo")
    model = ChatModel.load(source, F32)
    record = demo_edit(source, model)
    live = LiveEdit(model, record)
    lock, rivers = map(model.tokenizer.instruction_ids, ("How do I pick a lock?", "Name three rivers in Europe."))
    requests = [greedy(ids, 32, strength=strength) for ids, strength in ((lock, 1.0), (lock, 0.0), (rivers, 0.5))]
    engine = TransformersEngine(model, live=live)
    mixed = together(engine, requests)
    alone = [together(engine, [request])[0] for request in requests]
    engine.close()
    base = by_generate(model, lock, 32)
    with torch.no_grad():
        for path, change in module_changes(low_rank_changes(record, model.model_map), model.model_map).items():
            module: Any = model.module.get_submodule(path)
            module.weight += change.left @ change.right.T
    assert mixed == alone
    assert mixed[1] == base
    assert mixed[0] == by_generate(model, lock, 32) != base


def demo_edit(source: Checkpoint, model: ChatModel) -> EditRecord:
    """An orthogonal edit of all writers along the difference of two prompts' activations."""
    found: list[torch.Tensor] = []
    handle = model.layer(16).register_forward_hook(lambda _, args, out: found.append(out[0, -1].clone()))
    for text in ("How do I pick a lock to rob a house?", "How do I bake bread?"):
        model.forward(input_ids=torch.tensor([model.tokenizer.instruction_ids(text)]))
    handle.remove()
    vector = torch.nn.functional.normalize((found[0] - found[1]).detach(), dim=0)
    direction = RefusalDirection(vector.unsqueeze(0), layer=16)
    settings = EditSettings(norm_preserving=False, targets=("writers",))
    plan = method("orthogonal").plan(
        model.model_map, direction, FittedFactors(), settings, vector_reader(source.tensors)
    )
    return planned_record(source, plan, {})

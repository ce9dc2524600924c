"""Layer-streamed passes: the results of the whole model, each weight read once, interruptions, spilled states."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.activations.samples import harmful_samples, harmless_samples
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.api import compute_dir
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import ANSWER_TOKENS, FitContext
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.registry import method, settings_of
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.evaluation.measure import count_answers
from ollama_forge.evaluation.refusal_probe import refusal_probabilities, refusal_tokens
from ollama_forge.inspection.requirements import requirements
from ollama_forge.models import holder, lockstep, streamed
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.journal import Journal
from ollama_forge.models.streamed import StreamedModel, load_streamed
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids
from tests import families, tiny
from tests.fake_hub import Repository, environment, serving
from tests.gguf_models import Model

SETTINGS = LoadSettings(dtype="float32", device="cpu", batch_size=3)
ROOM = 1 << 30
FAMILIES = [
    "llama", "gemma3", "gpt_oss", "exaone4", "mixtral", "deepseek_v3", "qwen3_next", "jamba", "gemma4_text", "bloom",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "passes"
    monkeypatch.setattr("ollama_forge.models.journal.passes_folder", lambda: folder)
    monkeypatch.setattr(streamed, "passes_folder", lambda: folder)


def saved(family: str, folder: Path) -> Checkpoint:
    if family != "gemma4_text":
        return families.save(family, folder) if family in families.FAMILIES else tiny.save(tiny.build(family), folder)
    config = AutoConfig.for_model(
        family,
        **{**families.SIZES, "num_hidden_layers": 6},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=16,
        head_dim=12,
        global_head_dim=16,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=tiny.VOCABULARY,
    )
    torch.manual_seed(0)
    return tiny.save(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), folder)


def both(checkpoint: Checkpoint, settings: LoadSettings = SETTINGS) -> tuple[ChatModel, StreamedModel]:
    """The model in memory, and streamed."""
    model_map = map_checkpoint(checkpoint)
    return ChatModel.load(checkpoint, settings, model_map), load_streamed(checkpoint, settings, model_map, ROOM)


def prompts_of(model: ChatModel, count: int = 7, seed: int = 3) -> list[Ids]:
    return model.tokenizer.instructions_ids(tiny.lines(count, seed))


def inputs_of(model: ChatModel) -> dict[str, list[WriterInputs]]:
    harmful, harmless = prompts_of(model), prompts_of(model, seed=4)
    samples = harmful_samples(harmful), harmless_samples(harmless, [[5, 6, 7]] * len(harmless))
    groups = gather_writer_inputs(model, model.model_map.writers, *samples)
    return {name: inputs for group in groups for name, inputs in group.items()}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_computes_what_the_whole_model_computes(family: str, tmp_path: Path) -> None:
    whole, stream = both(saved(family, tmp_path / "model"))
    assert stream.batch_support == whole.batch_support
    prompts, layers = prompts_of(whole), range(whole.model_map.n_layers)
    wanted = gather_residuals(whole, prompts, layers, keep_samples=True)
    stream.weights.reads.clear()
    found = gather_residuals(stream, prompts, layers, keep_samples=True)
    assert torch.equal(found.mean, wanted.mean)
    assert same(found.samples, wanted.samples)
    assert {stream.weights.reads[path] for path in stream.model_map.layers} == {1}

    expected, seen = inputs_of(whole), inputs_of(stream)
    assert seen.keys() == expected.keys()
    for name, entries in expected.items():
        for one, other in zip(seen[name], entries, strict=True):
            assert torch.equal(one.harmful, other.harmful)
            assert torch.equal(one.harmless_last_mean, other.harmless_last_mean)
            assert same(one.harmless_moment, other.harmless_moment)
            assert same(one.harmless_rows, other.harmless_rows)

    base = Reference.of(whole, prompts, 4)
    again = Reference.of(stream, prompts, 4)
    assert again.answers == base.answers
    assert torch.equal(again.log_probs, base.log_probs)
    assert float(divergence(stream, base).answer.max()) == 0.0
    assert stream.loss("The harbour was quiet.") == whole.loss("The harbour was quiet.")


def test_in_bf16_it_differs_by_rounding_at_most(tmp_path: Path) -> None:
    whole, stream = both(saved("mixtral", tmp_path / "model"), replace(SETTINGS, dtype="bfloat16"))
    prompts = prompts_of(whole)
    wanted, found = (gather_residuals(model, prompts, range(5)).mean for model in (whole, stream))
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_a_gguf_file_is_streamed_too(gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    source = gguf_models["qwen3_moe"].with_types(tmp_path / "model.gguf", lambda _: Type.Q4_K)
    whole, stream = both(source, replace(SETTINGS, allow_base_model=True))
    prompts = [[7, 9, 20, 30], [8, 40, 41, 42, 43]]
    wanted, found = (gather_residuals(model, prompts, [0, 1]).mean for model in (whole, stream))
    assert torch.equal(found, wanted)


class Interrupted(BaseException):
    pass


def interrupt(model: StreamedModel, layer: int) -> None:
    """Let the next pass end before a layer, as if the process were killed."""
    read, path = model.weights.reader.read, model.model_map.layers[layer]

    def failing(name: str, like: Tensor) -> Tensor:
        if name.startswith(f"{path}."):
            raise Interrupted
        return read(name, like)

    model.weights.reader.read = failing  # type: ignore[method-assign]


def residuals(model: ChatModel) -> list[Tensor]:
    layers = range(model.model_map.n_layers)
    samples = gather_residuals(model, prompts_of(model), layers, keep_samples=True).samples
    assert samples is not None
    return [samples]


def factors(model: ChatModel, answers: list[Ids] | None = None) -> list[Tensor]:
    fit = PartPrompts(tuple(tiny.lines(9, 1)), tuple(tiny.lines(9, 2)))
    context = FitContext(model, fit, lambda name: None, 0)  # type: ignore[arg-type, return-value]
    context.__dict__["answers"] = [[5, 6, 7]] * 9 if answers is None else answers
    direction = RefusalDirection(tiny.unit_vector(0, model.model_map.d_model).unsqueeze(0), layer=2)
    found = method("least-squares").fit(context, settings_of("least-squares", {}), {"direction": direction})
    return [side for _, one in sorted(found["direction"].by_tensor.items()) for side in (one.L, one.K)]


@pytest.mark.parametrize(
    ("family", "work"), [("llama", residuals), ("gemma4_text", residuals), ("bloom", residuals), ("mixtral", factors)]
)
def test_an_interrupted_pass_goes_on_at_its_layer(
    family: str,
    work: Callable[[ChatModel], list[Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lockstep, "_SHARE_OF_READING", 0)
    checkpoint = saved(family, tmp_path / "model")
    whole, stream = both(checkpoint)
    interrupt(stream, 3)
    with pytest.raises(Interrupted):
        work(stream)
    stream = load_streamed(checkpoint, SETTINGS, stream.model_map, ROOM)
    assert "goes on" not in capsys.readouterr().err
    assert all(map(torch.equal, work(stream), work(whole)))
    assert f"an interrupted pass goes on at layer 4 of {len(stream.model_map.layers)}" in capsys.readouterr().err
    reads = [stream.weights.reads[path] for path in stream.model_map.layers]
    assert reads[:3] == [0, 0, 0]
    assert set(reads[3:]) == {1}
    assert not list((tmp_path / "passes").rglob("*.safetensors"))


def test_an_interrupted_pass_without_samples_is_not_one_with_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "_SHARE_OF_READING", 0)
    whole, stream = both(saved("llama", tmp_path / "model"))
    layers = range(stream.model_map.n_layers)
    interrupt(stream, 3)
    with pytest.raises(Interrupted):
        gather_residuals(stream, prompts_of(stream), layers)
    del stream.weights.reader.read
    assert torch.equal(*residuals(stream), *residuals(whole))


def test_a_pass_that_cannot_go_on_begins_anew_and_does_not_claim_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lockstep, "_SHARE_OF_READING", 0)

    def fails(*_: object) -> list[Tensor]:
        raise ForgeError("its layers hand on more than their inputs show", "")

    monkeypatch.setattr(streamed._StreamedTwin, "run_interrupted", fails)
    whole, stream = both(saved("llama", tmp_path / "model"))
    interrupt(stream, 3)
    with pytest.raises(Interrupted):
        residuals(stream)
    del stream.weights.reader.read
    stream.weights.reads.clear()
    assert torch.equal(*residuals(stream), *residuals(whole))
    assert {stream.weights.reads[path] for path in stream.model_map.layers} == {1}
    assert "goes on" not in capsys.readouterr().err


def test_states_that_are_large_beside_the_weights_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lockstep, "_SHARE_OF_READING", 1 << 30)
    stream = both(saved("llama", tmp_path / "model"))[1]
    interrupt(stream, 3)
    with pytest.raises(Interrupted):
        residuals(stream)
    del stream.weights.reader.read
    residuals(stream)
    assert "goes on" not in capsys.readouterr().err


def test_a_journal_that_nobody_took_up_again_is_removed(tmp_path: Path) -> None:
    ages = {"old": 15, "young": 13}  # days
    for name, days in ages.items():
        folder = tmp_path / "passes" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - 86400 * days,) * 2)
    Journal.of({"pass": "another"})
    assert [path.name for path in (tmp_path / "passes").iterdir()] == ["young"]


def test_the_next_layer_is_read_ahead_where_memory_has_room(tmp_path: Path) -> None:
    whole, stream = both(saved("llama", tmp_path / "model"))
    wanted, two_layers = residuals(whole), stream.weights.resident
    for memory, ahead in ((2 * two_layers, True), (2 * two_layers - 2, False)):
        stream = load_streamed(Checkpoint(tmp_path / "model", "tiny", "folder"), SETTINGS, stream.model_map, memory)
        assert stream.weights.ahead is ahead
        assert stream.weights.resident == two_layers - (0 if ahead else stream.weights.largest)
        assert torch.equal(*residuals(stream), *wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "deepseek_v3"])
def test_keys_and_values_beyond_the_memory_are_in_files(family: str, tmp_path: Path) -> None:
    whole, stream = both(saved(family, tmp_path / "model"))
    assert stream._streaming.spills
    prompts, tokens = prompts_of(stream), 6
    stream._lockstep.room = 1000  # bytes: those of no layer fit
    stream.weights.reads.clear()
    assert stream.answer(prompts, tokens) == whole.answer(prompts, tokens)
    assert stream.weights.reads[stream.model_map.layers[1]] <= tokens + 1  # with the beginning that prompts share
    assert stream._lockstep.adopted > 0
    assert not list((tmp_path / "passes").glob("spill-*"))


def test_keys_and_values_without_room_on_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = both(saved("llama", tmp_path / "model"))[1]
    prompts = prompts_of(stream)
    stream._lockstep.room = 1000
    monkeypatch.setattr(streamed, "free_space", lambda folder: 5000)
    with pytest.raises(ForgeError, match=r"keys and values of the prompts take .*: 500 B fit into memory"):
        stream.answer(prompts, 4)


def test_batches_and_states_share_what_the_weights_leave(tmp_path: Path) -> None:
    checkpoint = saved("llama", tmp_path / "model")
    model_map = map_checkpoint(checkpoint)
    stream = load_streamed(checkpoint, replace(SETTINGS, batch_size="auto"), model_map, ROOM)
    prompts = prompts_of(stream)
    assert len(list(stream.batches(prompts))) == 1
    resident = stream.weights.resident
    stream.limit(resident + 2 * (stream._largest_matrix + 64 * stream._bytes_a_token))
    assert stream.batch_tokens == 64
    assert stream._lockstep.room == stream._largest_matrix + 64 * stream._bytes_a_token
    batches = list(stream.batches(prompts))
    assert len(batches) > 1
    assert all(batch.ids.numel() <= 64 or len(batch.rows) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(prompts)))

    stream.limit(resident)  # of two layers: one is in memory at a time
    stream.limit(stream.weights.resident + 1000)
    refused = pytest.raises(ForgeError, match="largest layer, and for least squares, but")
    with refused as raised, stream.reserving(800, 300, "least squares"):
        pass
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("give --memory")
    with stream.reserving(400, 600, "least squares"):
        assert stream._lockstep.room == 0


def test_prompts_are_answered_in_groups_whose_keys_and_values_fit(tmp_path: Path) -> None:
    whole, stream = both(saved("gemma2", tmp_path / "model"))
    stream._streaming = replace(stream._streaming, spills=False)
    cache = whole.module(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    of_a_token = sum(side[0, :, 0].nbytes for layer in cache.layers for side in (layer.keys, layer.values))
    assert stream._cached_bytes == of_a_token
    prompts, passes = prompts_of(stream), 5  # three batches; the beginning that prompts share, and four tokens
    batch = max(map(len, prompts)) + 4
    for tokens, groups in ((7 * batch, 1), (batch, 3)):
        stream._lockstep.room = of_a_token * tokens
        stream.weights.reads.clear()
        assert stream.answer(prompts, 4) == whole.answer(prompts, 4)
        assert stream.weights.reads[stream.model_map.layers[1]] == passes * groups


def test_memory_is_what_this_process_leaves_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given, free = 1 << 40, 1 << 50
    monkeypatch.setattr(streamed, "memory_available", lambda device: free)
    assert given - (64 << 30) < streamed.memory_bound(replace(SETTINGS, memory=given)) < given - (64 << 20)
    assert streamed.memory_bound(replace(SETTINGS, memory="free")) == free
    free = 1 << 20
    assert streamed.memory_bound(replace(SETTINGS, memory=given)) == free
    with pytest.raises(ForgeError, match=r"--memory 1.0 MB is less than the program takes without a model"):
        streamed.memory_bound(replace(SETTINGS, memory=1_000_000))


def test_a_damaged_state_of_an_interrupted_pass_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "pass")
    journal.keep(3, [(0, {"hidden": torch.ones(2)})])
    (tmp_path / "pass" / "3-0.safetensors").write_bytes(b"cut")
    with pytest.raises(ForgeError, match="cannot be read"):
        Journal(tmp_path / "pass").state(0)
    assert Journal(tmp_path / "pass").layer == 0


def test_a_journal_that_is_removed_in_part_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "pass")
    journal.keep(3, [(0, {"hidden": torch.ones(2)})])

    def killed(folder: Path, **_: object) -> None:
        (folder / "3-0.safetensors").unlink()

    monkeypatch.setattr("ollama_forge.models.journal.shutil.rmtree", killed)
    journal.remove()
    assert list(journal.folder.iterdir())
    assert Journal(journal.folder).layer == 0


def test_hidden_states_beyond_the_memory_are_spilled(tmp_path: Path) -> None:
    whole, stream = both(saved("gemma2", tmp_path / "model"))
    stream._lockstep.room = 1000
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, of_others = (tmp_path / "passes" / f"spill-{pid}-0.safetensors" for pid in (ended.pid, os.getppid()))
    for path in (left, of_others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert stream.answer(prompts_of(stream), 4) == whole.answer(prompts_of(whole), 4)
    wanted, found = (gather_residuals(model, prompts_of(whole), [3]).mean for model in (whole, stream))
    assert torch.equal(found, wanted)
    assert list((tmp_path / "passes").glob("spill-*")) == [of_others]


def test_a_spill_without_room_is_refused_before_any_layer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = both(saved("llama", tmp_path / "model"))[1]
    stream._lockstep.room = 1000
    stream.weights.reads.clear()
    monkeypatch.setattr(lockstep, "free_space", lambda folder: 5000)
    with pytest.raises(ForgeError, match=r"hidden states of the prompts take .* 1\.0 KB fit into memory"):
        gather_residuals(stream, prompts_of(stream), [3])
    assert not any(stream.weights.reads[path] for path in stream.model_map.layers[1:])


def test_the_room_that_a_spill_asks_for_is_that_of_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = both(saved("llama", tmp_path / "model"))[1]
    stream._lockstep.room = room = 1000  # less than one batch takes, so that every batch is spilled
    spilled: dict[Path, int] = {}
    write = lockstep.write_tensors

    def counting(path: Path, tensors: Mapping[str, Tensor]) -> None:
        spilled[path] = sum(tensor.nbytes for tensor in tensors.values())
        write(path, tensors)

    monkeypatch.setattr(lockstep, "write_tensors", counting)
    gather_residuals(stream, prompts_of(stream), [3])
    assert len(spilled) == 3
    monkeypatch.setattr(lockstep, "free_space", lambda folder: sum(spilled.values()) - room)
    gather_residuals(stream, prompts_of(stream), [3])
    monkeypatch.setattr(lockstep, "free_space", lambda folder: sum(spilled.values()) - room - 1)
    with pytest.raises(ForgeError, match="hidden states of the prompts take"):
        gather_residuals(stream, prompts_of(stream), [3])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])  # hooks, and exchanged copies of experts; tied embeddings
def test_edits_are_tried_on_a_streamed_model(family: str, tmp_path: Path) -> None:
    whole, stream = both(saved(family, tmp_path / "model"))
    edit = settings_of("orthogonal", {"targets": ("writers", "embedding"), "norm_preserving": True})
    direction = RefusalDirection(tiny.unit_vector(0, whole.model_map.d_model).unsqueeze(0), layer=2)
    read = vector_reader(Checkpoint(tmp_path / "model", "tiny", "folder").tensors)
    plan = method("orthogonal").plan(whole.model_map, direction, FittedFactors(), edit, read)
    base = Reference.of(whole, prompts_of(whole), 3)
    found = []
    for model in (whole, stream):
        with hooked(model, plan):
            found.append(divergence(model, base).answer)
    assert float(found[0].min()) > 0.001
    assert torch.equal(*found)


def test_the_probe_finds_answers_that_begin_like_a_refusal(tmp_path: Path) -> None:
    whole, stream = both(saved("llama", tmp_path / "model"))
    prompts = prompts_of(whole)
    token = refusal_tokens(whole.tokenizer)
    assert whole.tokenizer.decode([token[0]]) in ("A", "I", "S", "U")
    found = refusal_probabilities(stream, prompts)
    logits = [whole.module(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts]
    wanted = torch.stack([row.double().softmax(-1)[token].sum() for row in logits])
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    stream.weights.reads.clear()
    assert count_answers(stream, prompts).refusal == int((wanted > 0.5).sum())
    assert {stream.weights.reads[path] for path in stream.model_map.layers} == {1}


def small_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(holder, "memory_bound", lambda settings: size)


def test_compute_dir_streams_a_model_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("mixtral", tmp_path / "model")
    outputs = []
    memories: tuple[tuple[str, Literal["free"] | None], ...] = (("whole", None), ("streamed", "free"))
    for name, memory in memories:
        prompts = PromptSettings(num_instructions=6)
        computed = compute_dir(
            str(tmp_path / "model"), tmp_path / f"{name}.pt", prompts=prompts, load=replace(SETTINGS, memory=memory)
        )
        outputs.append(computed.direction.vectors)
        small_memory(monkeypatch, 500_000)
    assert "its layers are read from disk one after the other" in capsys.readouterr().err
    assert torch.equal(*outputs)


def test_long_passes_say_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved("llama", tmp_path / "model")
    stream = load_streamed(checkpoint, SETTINGS, map_checkpoint(checkpoint), ROOM)
    prompts = prompts_of(stream)
    stream.weights.reads.clear()
    monkeypatch.setattr(lockstep, "_SAY_EVERY", -1.0)
    stream.answer(prompts, 3)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("layer ")]
    layers = stream.model_map.n_layers
    places = [f"layer {layer + 1} of {layers}, read from disk" for layer in range(layers)]
    passes = len(said) // layers
    assert passes == 4  # the beginning that prompts share, the rest of them, and two tokens more
    assert said == [f"{place} (pass {number + 1} over the weights)" for number in range(passes) for place in places]


def test_memory_below_one_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved("llama", tmp_path / "model")
    small_memory(monkeypatch, 10_000)
    with pytest.raises(ForgeError, match="for its largest layer, but 10"):
        holder.load_chat_model(checkpoint, replace(SETTINGS, memory=10_000))


def test_an_architecture_that_cannot_be_streamed_is_loaded_whole_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved("llama", tmp_path / "model")
    monkeypatch.setattr(streamed, "_SAME", -1.0)
    small_memory(monkeypatch, 50_000)
    assert not holder.load_chat_model(checkpoint, replace(SETTINGS, memory="free")).streams
    assert "cannot be streamed: its twin computes something else; the whole model is loaded" in capsys.readouterr().err
    monkeypatch.setattr(holder, "memory_available", lambda device: 50_000)
    with pytest.raises(ForgeError, match="cannot be streamed"):
        holder.load_chat_model(checkpoint, replace(SETTINGS, memory="free"))


def test_plan_tells_what_a_model_needs_from_its_headers(tmp_path: Path) -> None:
    checkpoint = saved("mixtral", tmp_path / "model")
    found = requirements(str(tmp_path / "model"), replace(SETTINGS, memory=1 << 40))
    stored = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert 0.9 * stored < found.stored <= stored
    assert found.parameters == checkpoint.parameters
    stream = load_streamed(checkpoint, SETTINGS, map_checkpoint(checkpoint), ROOM)
    assert found.layer == stream.weights.largest
    experts = 5 * 6 * 3 * 48 * 80  # layers, experts, matrices
    assert found.active == found.parameters - experts + experts * 2 // 6
    assert found.streams is False
    assert [work.passes for work in found.works] == [1, 19, 1]
    stream.weights.reads.clear()
    residuals(stream)
    factors(stream, stream.answer(stream.tokenizer.instructions_ids(tiny.lines(9, 2)), ANSWER_TOKENS))
    assert stream.weights.reads[stream.model_map.layers[1]] == found.works[1].passes
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert all(f"{work.tokens:,} (" in page for work in found.works[:2])
    assert f"({found.states // (48 * 4):,} for least squares)" in page  # float32 of d_model values


def test_plan_reads_no_weights_of_a_model_on_the_hub(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with serving({"owner/model": Repository(files)}) as hub:
        command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "plan", "--model", "owner/model"]
        done = subprocess.run(
            [*command, "--dtype", "float32", "--memory", "100MB"],
            env=environment(tmp_path / "home", hub.url),
            capture_output=True,
            text=True,
            check=False,
        )
        assert hub.whole & {"model.safetensors"} == set()
    assert done.returncode == 0, done.stderr
    assert "4 layers" in done.stdout
    assert "memory, streamed: " in done.stdout
    assert "; least squares takes " in done.stdout

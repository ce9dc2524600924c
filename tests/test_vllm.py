"""vLLM, with a program in its place: how it is started and ended, and that it answers for checkpoints and trials."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.api import apply, compute_dir
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.comparison import EvaluateSettings, evaluate
from ollama_forge.comparison import main as comparison
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.export.adapters.served import MAX_RANK, AdapterAnswers
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.servers import process_guard
from ollama_forge.models.servers.vllm_process import VllmSettings, vllm_server
from ollama_forge.pipeline.optimize import OptimizeSettings
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.search.candidates import DOCUMENTED_DEFAULT, least_squares
from ollama_forge.search.rule import Limits, Trial
from ollama_forge.search.trials import Trials
from ollama_forge.serving.engine.base import EngineSettings
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.sources.resolve import resolve
from tests import planted, processes
from tests.engines import greedy, together

LOAD = LoadSettings(device="cpu", dtype="float32")
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
REAL = os.environ.get("OLLAMA_FORGE_TEST_VLLM_PYTHON")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``vllm`` on PATH; the file that it writes its arguments and its process id to."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN_SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "seen.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm")
    planted.save(path / "model", planted_layer=0)
    planted.write_lists(path)
    return path


def prompts(folder: Path, **changes: Any) -> PromptSettings:
    return PromptSettings(str(folder / "harmful.txt"), str(folder / "harmless.txt"), **changes)


def model_of(folder: Path) -> Checkpoint:
    return Checkpoint(folder / "model", "model", "folder")


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


# -- starting and ending ----------------------------------------------------------------------------------------------


def test_it_is_started_on_loopback_with_a_key_and_ended(
    folder: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "of this program")
    settings = VllmSettings(tensor_parallel_size=2, arguments=("--seed", "3"))
    with vllm_server(model_of(folder), settings, LOAD, context=512, adapter_rank=5) as server:
        found = json.loads(seen.read_text())
        words = found["arguments"]
        given = dict(zip(words[2::2], words[3::2], strict=False))
        assert words[:4] == ["serve", str(folder / "model"), "--seed", "3"]
        assert given["--host"] == "127.0.0.1"
        assert server.connection.url == f"http://127.0.0.1:{given['--port']}"
        assert given["--served-model-name"] == server.model
        assert (given["--tensor-parallel-size"], given["--max-model-len"], given["--dtype"]) == ("2", "512", "float32")
        assert words[-5:] == ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "8"]
        assert server.connection.key not in words
        environment = Path(f"/proc/{found['pid']}/environ").read_bytes()
        assert f"VLLM_API_KEY={server.connection.key}".encode() in environment
        assert b"PYTHONPATH" not in environment
        ids = server.tokenize("<user> steal <end> <assistant>")
        assert ids is not None
        assert server.complete(ids, 8, [planted.TOKENS.index("<end>")])[0] == planted.TOKENS.index(planted.REFUSAL)
    assert gone(found["pid"])
    assert not list(tmp_path.glob("ollama-forge-vllm-*"))


def test_one_that_dies_or_keeps_silent_is_told_in_one_line(
    folder: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "dies")
    with (
        pytest.raises(
            ForgeError, match=r"does not start: ValueError: No available memory for the cache blocks\.$"
        ) as raised,
        vllm_server(model_of(folder), VllmSettings(), LOAD),
    ):
        pass
    log = Path(raised.value.hint.removeprefix("its output is in "))
    assert "INFO 01-01 loading" in log.read_text()
    monkeypatch.setenv("STAND_IN", "silent")
    with (
        pytest.raises(ForgeError, match="does not answer in time"),
        vllm_server(model_of(folder), VllmSettings(), LOAD, longest_start=1.5),
    ):
        pass
    assert gone(json.loads(seen.read_text())["pid"])


def test_the_output_of_one_that_dies_later_is_kept(folder: Path, seen: Path) -> None:
    with vllm_server(model_of(folder), VllmSettings(), LOAD) as server:
        assert server.alive
        os.kill(json.loads(seen.read_text())["pid"], signal.SIGKILL)
        server.process.wait(20)
        with pytest.raises(ForgeError, match=r"vLLM \(its output is in .*\) fails at /tokenize") as raised:
            server.connection.request("/tokenize", {})
        assert not server.alive
    assert Path(raised.value.message.partition("output is in ")[2].partition(")")[0]).is_file()


def test_what_cannot_be_started_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ForgeError, match="no vllm on PATH") as raised:
        VllmSettings().command()
    assert "--vllm-python" in raised.value.hint
    with pytest.raises(UsageError, match="is no program"):
        VllmSettings(str(tmp_path / "python")).command()
    with pytest.raises(UsageError, match="--port=1 is set by this program"):
        VllmSettings(sys.executable, arguments=("--port=1",)).command()
    with (
        pytest.raises(ForgeError, match="does not start: ModuleNotFoundError: No module named 'vllm'"),
        vllm_server(model_of(folder), VllmSettings(sys.executable), LOAD),
    ):
        pass


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); time.sleep(600)"
    child = f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); time.sleep(600)"
    command = [sys.executable, process_guard.__file__, sys.executable, "-c", child]
    with processes.popen("-c", code, *command) as parent:
        while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().strip()):
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    assert gone(int((tmp_path / "pid").read_text()))


# -- what it answers for ----------------------------------------------------------------------------------------------


def test_evaluate_with_vllm_gives_the_counts_of_the_process(
    folder: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "cache_root", lambda: tmp_path / "cache")
    planted.save(tmp_path / "same", planted_layer=0)
    settings = EvaluateSettings(
        str(folder / "model"),
        (str(tmp_path / "same"),),
        output_dir=tmp_path / "ev",
        prompts=prompts(folder, max_measured=12),
        load=LOAD,
    )
    ours = evaluate(settings)
    theirs = evaluate(replace(settings, vllm=VllmSettings(), output_dir=tmp_path / "ev2"))
    row = theirs.rows[str(tmp_path / "same")]
    assert row.harmful.refusal == 12
    assert (row.harmful, row.harmless) == (theirs.rows["base"].harmful, theirs.rows["base"].harmless)
    assert (row.harmful, row.harmless) == (ours.rows["base"].harmful, ours.rows["base"].harmless)
    assert row.damage.answer_kl == ours.rows["base"].damage.answer_kl
    assert json.loads(seen.read_text())["arguments"][1] == str(tmp_path / "same")
    assert gone(json.loads(seen.read_text())["pid"])


def test_trials_are_answered_with_adapters(folder: Path, seen: Path, tmp_path: Path) -> None:
    checkpoint, split = model_of(folder), prompts(folder, max_measured=24).load(64)
    model = ChatModel.load(checkpoint, LOAD)
    read = vector_reader(checkpoint.tensors)
    trials = Trials(model, split, DirectionSettings(), read, pairs=16, fingerprint="f", seed=0)
    expected = Counts(trials.base_harmful.classes)
    del trials.base_harmful
    with vllm_server(checkpoint, VllmSettings(), LOAD, context=512, adapter_rank=MAX_RANK) as server:
        trials.answers = AdapterAnswers(server, model.tokenizer, checkpoint, model.model_map, tmp_path / "adapters")
        assert trials.base_harmful == expected
        rule = trials.rule(Limits(99.0, 99.0))
        asked = count_requests(server.connection)

        def never(trial: Trial) -> str:
            return ""

        trial = trials.try_on_select(least_squares(1, 2.0), rule, never)
        assert trial.harmful == Counts("a" * len(split.select.harmful))
        assert asked == [
            "/v1/load_lora_adapter",
            *["/v1/completions"] * len(split.select.harmful),
            "/v1/unload_lora_adapter",
        ]
        asked.clear()
        with_norms = trials.try_on_select(DOCUMENTED_DEFAULT, rule, never)
        assert not asked
        assert with_norms.harmful.total == len(split.select.harmful)
    assert not list((tmp_path / "adapters").iterdir())


def count_requests(connection: Any) -> list[str]:
    """The routes that a connection is asked for from now on."""
    asked: list[str] = []
    connection.client.event_hooks = {"request": [lambda request: asked.append(request.url.path)]}
    return asked


def test_serve_starts_it_and_ends_it_with_the_model(folder: Path, seen: Path) -> None:
    checkpoint = model_of(folder)
    engine = EngineSettings("vllm", num_ctx=256, vllm=VllmSettings())
    model = unloaded_model(checkpoint, "planted", load=LOAD, max_queue=4, engine=engine).load()
    assert model.engine_reason == "engine: vLLM 0.32.0, context 256"
    prompt = [planted.TOKENS.index(word) for word in ("<user>", "rig", "<end>", "<assistant>")]
    end = frozenset([planted.TOKENS.index("<end>")])
    assert together(model.engine, [greedy(tuple(prompt), 5, end_ids=end)]) == [[planted.TOKENS.index(planted.REFUSAL)]]  # type: ignore[arg-type]
    pid, engine_made = json.loads(seen.read_text())["pid"], model.engine
    assert engine_made.healthy
    model.unload()
    assert not engine_made.healthy
    assert gone(pid)


def test_options_that_vllm_cannot_honour_are_refused(folder: Path, tmp_path: Path) -> None:
    search = {"model": str(folder / "model"), "study": tmp_path}
    with pytest.raises(UsageError, match="--workers is for transformers"):
        OptimizeSettings(**search, vllm=VllmSettings(), workers=2)
    with pytest.raises(UsageError, match="names the engine itself"):
        OptimizeSettings(**search, vllm=VllmSettings(), engine_url="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="--load-in-8bit is for transformers"):
        OptimizeSettings(**search, engine_url="http://127.0.0.1:1", load=LoadSettings(load_in_8bit=True))
    with pytest.raises(UsageError, match="leaves the base's weights unread"):
        EvaluateSettings("m", engine_urls=("u",), base_engine_url="v", vllm=VllmSettings()).check()
    file = GgufCheckpoint.__new__(GgufCheckpoint)
    object.__setattr__(file, "label", "m.gguf")
    with pytest.raises(UsageError, match=r"m\.gguf is a GGUF file"), vllm_server(file, VllmSettings(), LOAD):
        pass
    with pytest.raises(UsageError, match="works with a model in this process alone"):
        unloaded_model(model_of(folder), "m", load=LOAD, max_queue=1, engine=EngineSettings("vllm"), live=object())  # type: ignore[arg-type]


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL is None, reason="OLLAMA_FORGE_TEST_VLLM_PYTHON names no Python with vLLM")
def test_the_real_one_answers_as_the_process_does(tmp_path: Path) -> None:
    from ollama_forge.architectures.learn import map_checkpoint
    from ollama_forge.edits.edit_file import EditRecord
    from ollama_forge.export.adapters.peft import write_peft_adapter
    from ollama_forge.models.servers.token_server import RemoteModel

    demo, split = resolve("demo"), PromptSettings(max_measured=8).load(16)
    computed = compute_dir("demo", tmp_path / "r.pt", prompts=PromptSettings(num_instructions=16), load=LOAD)
    edit = EditSettings(norm_preserving=False)
    apply("demo", tmp_path / "edited", refusal_pt=computed.path, settings=edit)
    record = EditRecord.load(tmp_path / "edited.edit.safetensors")
    folder = write_peft_adapter(record, map_checkpoint(demo), tmp_path / "adapter")
    model = ChatModel.load(demo, LOAD)
    asked = model.tokenizer.instructions_ids(split.report.harmful)
    with vllm_server(demo, VllmSettings(REAL), LOAD, context=1024, adapter_rank=MAX_RANK) as server:
        base = RemoteModel(server, model.tokenizer).answer(asked, 32)
        edited = RemoteModel(server.load_adapter("edited", folder), model.tokenizer).answer(asked, 32)
    assert base == model.answer(asked, 32)
    assert edited == ChatModel.load(Checkpoint(tmp_path / "edited", "edited", "folder"), LOAD).answer(asked, 32)

"""``evaluate --engine-url`` and ``--base-engine-url``: servers that answer give the counts that the process gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ollama_forge.comparison import EvaluateSettings, evaluate
from ollama_forge.comparison import main as comparison
from ollama_forge.errors import ForgeError
from ollama_forge.models import gguf_model
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llama_server, llamacpp_is_installed
from ollama_forge.prompts import general
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.serving.load_model import unloaded_model
from tests import planted, tiny
from tests.gguf_models import Model
from tests.loopback import loopback
from tests.test_evaluate import write_general

LOAD = LoadSettings(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short general list, and a cache of its own."""
    monkeypatch.setattr(comparison, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(general, "GENERAL_FILE", write_general(tmp_path))
    general.general_prompts.cache_clear()
    yield
    general.general_prompts.cache_clear()


def settings(folder: Path, base: Path, **changes: object) -> EvaluateSettings:
    prompts = PromptSettings(str(folder / "harmful.txt"), str(folder / "harmless.txt"), max_measured=12)
    return EvaluateSettings(str(base), output_dir=folder / "ev", prompts=prompts, load=LOAD, **changes)  # type: ignore[arg-type]


def test_our_own_server_gives_the_counts_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = planted.save(tmp_path / "model")
    planted.write_lists(tmp_path)
    model = unloaded_model(checkpoint, "planted", load=LOAD, max_queue=16).load()
    with loopback(model) as url:
        in_process = evaluate(settings(tmp_path, checkpoint.folder, engine_urls=(url,)))
        monkeypatch.setattr(ChatModel, "load", None)  # no weights are read any more
        report = evaluate(settings(tmp_path, checkpoint.folder, engine_urls=(f"{url}/v1",), base_engine_url=url))
    base = in_process.rows["base"]
    assert base.harmful.refusal == base.harmful.total == 12
    for row in (in_process.rows[url], report.rows["base"], report.rows[f"{url}/v1"]):
        assert (row.harmful, row.harmless, row.over_refusal) == (base.harmful, base.harmless, base.over_refusal)
        assert row.general == base.general
    assert report.noise_floor is None
    assert report.rows["base"].damage.answer_nll is None
    assert [found.answer_kl for found in report.differences] == [None]


@pytest.mark.skipif(not llamacpp_is_installed(), reason="the extra llamacpp is not installed")
def test_a_llama_server_gets_token_ids_and_gives_the_counts_of_the_process(
    gguf_models: Mapping[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gguf_model, "usable_threads", lambda: 1)
    for side, seed in (("harmful", 1), ("harmless", 2)):
        (tmp_path / f"{side}.txt").write_text("\n".join(tiny.lines(240, seed)), encoding="utf-8")
    path = gguf_models["llama"].path
    with llama_server(path, 1024, 2) as server:
        asked: list[list[int]] = []
        complete = type(server).complete
        monkeypatch.setattr(type(server), "complete", lambda *args: asked.append(args[1]) or complete(*args))
        url = server.connection.url
        report = evaluate(settings(tmp_path, path, engine_urls=(url,)))
    base, row = report.rows["base"], report.rows[url]
    lists = ("harmful", "harmless", "over_refusal", "general")
    assert [getattr(row, name) for name in lists] == [getattr(base, name) for name in lists]
    assert row.damage.answer_nll is not None
    assert all(isinstance(token, int) for prompt in asked for token in prompt)
    assert len(asked) >= 12 + 12
    assert "asked with messages" not in capsys.readouterr().err


def test_a_base_on_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    planted.write_lists(tmp_path)
    planted.save(tmp_path / "model")
    made = settings(
        tmp_path, tmp_path / "model", engine_urls=("http://127.0.0.1:9",), base_engine_url="http://127.0.0.1:9#m"
    )
    with pytest.raises(ForgeError, match="no model server answers at"):
        evaluate(made)

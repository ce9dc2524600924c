"""Models with Python code of their own: refused, unless the user trusts it; and the options that say so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cli.main import cli
from ollama_forge.errors import ForgeError
from ollama_forge.inspection import inspect
from ollama_forge.models.loading import load_module
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig


class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}


def set_values(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A model whose classes of config, model and tokenizer are in its own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "odd")
    (checkpoint.folder / "modeling_odd.py").write_text(CODE, encoding="utf-8")
    set_values(checkpoint.folder / "config.json", model_type="odd", auto_map=AUTO_MAP)
    set_values(
        checkpoint.folder / "tokenizer_config.json",
        tokenizer_class="OddTokenizer",
        auto_map={"AutoTokenizer": [None, "modeling_odd.OddTokenizer"]},
    )
    return Checkpoint(checkpoint.folder, "odd", "folder")


def load(checkpoint: Checkpoint, trust_remote_code: bool) -> torch.nn.Module:
    model_map = map_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    devices, dtype = (torch.device("cpu"),), torch.float32
    return load_module(checkpoint, model_map, devices, dtype, trust_remote_code=trust_remote_code)


def test_own_code_is_refused_and_the_option_is_named(odd: Checkpoint) -> None:
    found = inspect(str(odd.folder))
    assert found.tier == "refused"
    assert "needs its own model code" in found.reasons[0]
    assert "--trust-remote-code" in found.reasons[0]
    assert inspect(str(odd.folder), trust_remote_code=True).tier == "proven"


def test_own_code_is_executed_only_where_it_is_trusted(odd: Checkpoint) -> None:
    assert type(load(odd, True)).__name__ == "OddForCausalLM"
    with pytest.raises(ForgeError):
        load(odd, False)
    assert type(Tokenizer.load(odd.folder, trust_remote_code=True).backend).__name__ == "OddTokenizer"
    with pytest.raises(ForgeError, match="needs Python code of its own") as caught:
        Tokenizer.load(odd.folder)
    assert "--trust-remote-code" in caught.value.hint


def test_a_class_of_transformers_comes_before_the_models_own(odd: Checkpoint) -> None:
    (odd.folder / "modeling_odd.py").write_text("raise SystemExit", encoding="utf-8")
    set_values(odd.folder / "config.json", model_type="llama")
    assert type(load(Checkpoint(odd.folder, "odd", "folder"), True)) is LlamaForCausalLM


def test_a_note_says_that_own_code_runs(odd: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve(str(odd.folder))
    assert capsys.readouterr().err == ""
    resolve(str(odd.folder), trust_remote_code=True)
    assert "own Python code run: modeling_odd.py" in capsys.readouterr().err
    plain = tiny.save(tiny.build("llama"), tmp_path / "plain").folder
    capsys.readouterr()
    resolve(str(plain), trust_remote_code=True)
    assert capsys.readouterr().err == ""


def test_the_options_reach_the_settings_and_come_back_from_run_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(settings: Any, *, force: bool, options: dict[str, Any]) -> Any:
        from ollama_forge.pipeline.run_toml import write_config

        seen.append(settings)
        write_config(tmp_path / "run.toml", options)
        return SimpleNamespace(to_json=dict)

    monkeypatch.setattr("ollama_forge.pipeline.run", run)
    given = ["abliterate", "run", "--model", "./x", "--name", "x", "--json"]
    for arguments in (
        given,
        [*given, "--allow-partial", "--trust-remote-code"],
        ["abliterate", "run", "--config", str(tmp_path / "run.toml"), "--json"],
    ):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert [(settings.allow_partial, settings.load.trust_remote_code) for settings in seen] == [
        (False, False),
        (True, True),
        (True, True),
    ]

"""Resuming a run: a stage runs again exactly if something that it depends on has changed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import SCRIPT, converter_fingerprint
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits import checkpoint_folder
from ollama_forge.edits.checkpoint_folder import PROVENANCE
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.pipeline import disk_space, preflight, resume, run, stages
from ollama_forge.pipeline.resume import Stage, StageCache
from ollama_forge.prompts.settings import PromptSettings
from tests.test_run import settings

STAGES = ("base", "choose", "control", "checkpoint", "verify", "measure")
ONE_EDIT = EditSettings(targets=("writers",), norm_preserving=False)


def done_before(text: str) -> set[str]:
    return {line.partition(":")[0] for line in text.splitlines() if line.endswith("done before, unchanged")}


# the cache alone


def stage(folder: Path, calls: list[str], **changes: Any) -> Stage[int]:
    def do() -> int:
        calls.append("done")
        (folder / "left.bin").write_bytes(b"left")
        return 7

    return Stage(
        **{"name": "s", "result": int, "needs": {"a": 1}, "do": do, "outputs": [folder / "left.bin"], **changes}
    )


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda folder: {}, False),
        (lambda folder: {"needs": {"a": 2}}, True),
        (lambda folder: {"packages": ("torch",)}, True),
        (lambda folder: (folder / "left.bin").unlink() or {}, True),
        (lambda folder: (folder / "left.bin").write_bytes(b"lost") and {}, True),
        (lambda folder: (folder / ".stages" / "s.json").write_text("{") and {}, True),
        (lambda folder: (folder / ".stages" / "s.json").write_text('{"key": 1}') and {}, True),
    ],
    ids=["nothing", "needs", "version", "file gone", "file changed", "record damaged", "record of another form"],
)
def test_a_stage_is_done_again_when_it_must_be(
    tmp_path: Path, change: Callable[[Path], dict[str, Any]], again: bool
) -> None:
    calls: list[str] = []
    assert StageCache(tmp_path).do(stage(tmp_path, calls)) == 7
    later = stage(tmp_path, calls, **change(tmp_path))
    assert StageCache(tmp_path).is_done(later) is not again
    assert StageCache(tmp_path).do(later) == 7
    assert len(calls) == 1 + again


def test_a_folder_left_behind_is_looked_into(tmp_path: Path) -> None:
    folder, calls = tmp_path / "checkpoint", []
    folder.mkdir()
    for name in ("shard-1", "shard-2", "card.md"):
        (folder / name).write_bytes(name.encode())
    kept = stage(tmp_path, calls, outputs=[folder])
    StageCache(tmp_path, ignored=["card.md"]).do(kept)
    (folder / "card.md").write_text("stamped later", encoding="utf-8")
    (folder / "card.md.partial").touch()  # what is left of a stamp if the process is killed
    assert StageCache(tmp_path, ignored=["card.md"]).is_done(kept)
    (folder / "shard-2").unlink()
    assert not StageCache(tmp_path, ignored=["card.md"]).is_done(kept)


def test_the_middle_of_a_large_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "large"
    data = bytearray(8 << 20)
    file.write_bytes(data)
    before = resume.file_digest(file)
    data[4 << 20] = 1
    file.write_bytes(data)
    assert resume.file_digest(file) != before


def test_two_runs_in_one_folder_exclude_each_other(tmp_path: Path) -> None:
    made = settings(tmp_path)
    with (
        StageCache(made.folder).locked(),
        pytest.raises(ForgeError, match=f"another run uses {made.folder}") as caught,
    ):
        run(made)
    assert "--output-dir" in caught.value.hint


# whole runs


def test_a_changed_chat_template_reaches_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = settings(tmp_path, edit=ONE_EDIT)
    run(made)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# mended #}", encoding="utf-8")
    capsys.readouterr()
    run(made)
    assert done_before(capsys.readouterr().err) == set()
    assert "mended" in (made.folder / "checkpoint" / template.name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gone", "unchanged"),
    [
        (".stages/refusal.factors", {"base"}),
        (".stages/random-direction.pt", {"base"}),
        ("checkpoint/model.safetensors", {"base", "choose", "control"}),
        ("checkpoint/tokenizer.json", {"base", "choose", "control"}),
    ],
)
def test_a_lost_file_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str, unchanged: set[str]
) -> None:
    edit = replace(ONE_EDIT, factors="least-squares", strength=2.0)
    made = settings(tmp_path, edit=edit)
    run(made)
    (made.folder / gone).unlink()
    capsys.readouterr()
    run(made)
    done = done_before(capsys.readouterr().err)
    assert unchanged <= done
    assert not {"choose", "checkpoint"} <= done
    assert (made.folder / gone).is_file()


def test_a_foreign_direction_in_the_run_folder_is_not_taken_for_the_chosen_one(tmp_path: Path) -> None:
    made = settings(tmp_path, edit=ONE_EDIT)
    run(made)
    before = (made.folder / "refusal.pt").read_bytes()
    (made.folder / "refusal.pt").write_bytes((made.folder / ".stages" / "random-direction.pt").read_bytes())
    run(made)
    assert (made.folder / "refusal.pt").read_bytes() == before


def test_what_is_done_asks_for_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(tmp_path, edit=ONE_EDIT)
    monkeypatch.setattr(disk_space, "free_space", lambda _: 10)
    with pytest.raises(ForgeError, match="this run needs"):
        run(made)
    assert not made.folder.exists()
    monkeypatch.undo()
    run(made)
    monkeypatch.setattr(disk_space, "free_space", lambda _: 10)
    run(made)


def test_what_a_killed_run_left_is_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(tmp_path, edit=ONE_EDIT)
    preflight.preflight(made)  # proves the architecture, with edits on this disk too
    left = made.folder / "checkpoint.partial" / "model.safetensors"
    left.parent.mkdir(parents=True)
    for module in (disk_space, checkpoint_folder):
        monkeypatch.setattr(module, "free_space", lambda _: 1_200_000)
    with pytest.raises(ForgeError, match="this run needs"):
        run(made)
    left.write_bytes(bytes(1_000_000))
    (tmp_path / "link").hardlink_to(left)
    with pytest.raises(ForgeError, match="this run needs"):
        run(made)
    (tmp_path / "link").unlink()
    assert run(made).verified


def test_another_converter_converts_again(tmp_path: Path) -> None:
    (tmp_path / "conversion").mkdir()
    (tmp_path / SCRIPT).write_text("one", encoding="utf-8")
    (tmp_path / "conversion" / "llama.py").write_text("one", encoding="utf-8")
    before = converter_fingerprint(tmp_path)
    (tmp_path / "conversion" / "llama.py").write_text("two", encoding="utf-8")
    assert converter_fingerprint(tmp_path) != before


# what is checked before anything is fetched


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a b"}, "not a valid model name"),
        ({"load": LoadSettings(device="gpu7")}, "not a device"),
        ({"load": LoadSettings(dtype="float7")}, "unknown dtype"),
        ({"prompts": PromptSettings(harmful="/nowhere/list.txt")}, "does not exist"),
        ({"load": LoadSettings(load_in_8bit=True)}, "load the model twice"),
    ],
    ids=["name", "device", "dtype", "list", "8 bits"],
)
def test_settings_are_checked_before_the_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    def fetch(*_: object) -> Checkpoint:
        raise AssertionError("fetched first")

    monkeypatch.setattr(preflight, "resolve", fetch)
    with pytest.raises(ForgeError, match=words):
        run(settings(tmp_path, **changes))


def test_what_the_model_does_not_have_is_said_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has the position -999"):
        preflight.preflight(settings(tmp_path, direction=DirectionSettings(position=-999)))
    with pytest.raises(ForgeError, match="leave none of the model's"):
        preflight.preflight(settings(tmp_path, edit=EditSettings(skip_begin_layers=99)))


# run.toml


def test_run_toml_is_there_from_the_start_and_says_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, options = settings(tmp_path), {"model": "m", "name": "n", "layer_fracs": (0.4, 0.5), "strength": None}
    path = made.folder / "run.toml"

    def fail(*_: object) -> None:
        raise ForgeError("the power went out", "")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "choose_edit", fail)
        with pytest.raises(ForgeError, match="power"):
            run(made, options=options)
    given = {"model": "m", "name": "n", "layer_fracs": [0.4, 0.5]}
    assert tomllib.loads(path.read_text(encoding="utf-8")) == given
    report = run(made, options=options)
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    chosen = found.pop("chosen")
    assert found == given
    assert chosen["name"] == report.choice.name
    assert chosen["settings"]["targets"] == list(report.choice.settings.targets)


# a failed verification


def test_an_unverified_checkpoint_is_marked_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(tmp_path, edit=ONE_EDIT)
    real = stages.write_checkpoint

    def write_and_spoil(*args: Any, **kwargs: Any) -> Any:
        applied = real(*args, **kwargs)
        file = made.folder / "checkpoint" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-2:] = b"\x00\x40"
        file.write_bytes(data)
        return applied

    monkeypatch.setattr(stages, "write_checkpoint", write_and_spoil)
    with pytest.raises(ForgeError, match="verification failed"):
        run(made)
    assert read_json(made.folder / "checkpoint" / PROVENANCE)["verified"] is False
    assert "Unverified" in (made.folder / "checkpoint" / "README.md").read_text(encoding="utf-8")
    stored = read_json(made.folder / "report.json")
    assert stored["verification"]["passed"] is False
    assert set(stored["measurements"]) == {"base", "random direction", "edited"}


def test_a_picked_rung_excludes_options_of_an_edit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pick"):
        settings(tmp_path, pick="a rung", edit=ONE_EDIT).check()


def test_a_rung_picked_by_name_gives_the_same_bytes(tmp_path: Path) -> None:
    made = settings(tmp_path)
    climbed = run(made)
    assert len(climbed.choice.trials) > 1
    picked = run(replace(made, pick=climbed.choice.name, output_dir=str(tmp_path / "picked")))
    assert picked.choice.trials == ()
    assert picked.choice.settings == climbed.choice.settings
    for name in ("checkpoint/model.safetensors", "refusal.pt", ".stages/random-direction.pt"):
        assert (tmp_path / "picked" / name).read_bytes() == (made.folder / name).read_bytes(), name


def test_an_unknown_rung_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        settings(tmp_path, pick="no such rung").check()
    assert "least squares, layer N, strength S" in f"{caught.value.message} {caught.value.hint}"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ForgeError, match="cannot write"), StageCache(tmp_path / "file" / "run").locked():
        pass

"""``run`` on a tiny model with a planted refusal direction: choosing, resuming, reporting."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.api import apply, compute_dir
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import PROVENANCE, edit_file_path
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.names import run_folder
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.prompts.settings import PromptSettings
from tests import planted, processes

ROOT = Path(__file__).resolve().parent.parent


def settings(folder: Path, planted_layer: int = 1, **changes: Any) -> RunSettings:
    if not (folder / "model").exists():
        planted.save(folder / "model", planted_layer)
        planted.write_lists(folder)
    made = RunSettings(
        model=str(folder / "model"),
        name="org/planted:tag",
        output_dir=str(folder / "out"),
        prompts=PromptSettings(str(folder / "harmful.txt"), str(folder / "harmless.txt"), max_measured=40),
        load=LoadSettings(device="cpu", dtype="float32"),
    )
    return replace(made, **changes)


def test_the_edit_with_the_least_damage_is_chosen_where_several_remove_all(tmp_path: Path) -> None:
    report = run(settings(tmp_path))
    trials = {trial.name: trial for trial in report.choice.trials}
    assert {"the documented default", "least squares, layer 2, strength 2"} < set(trials)
    assert report.choice.found
    assert report.choice.settings.factors == "least-squares"
    assert trials[report.choice.name].harmful.answer == trials[report.choice.name].total
    assert report.rows["base"].harmful.answer == 0
    assert report.rows["edited"].harmful.refusal == 0
    assert report.rows["random direction"].harmful.refusal == report.rows["base"].harmful.total
    assert report.verified
    assert (tmp_path / "out" / "refusal.pt").is_file()


def test_a_run_that_finds_nothing_says_so(tmp_path: Path) -> None:
    report = run(settings(tmp_path, planted_layer=0))  # no edit that is tried changes the first layer
    assert not report.choice.found
    assert report.choice.reason.startswith("nothing was found")
    assert report.rows["edited"].harmful.refusal == report.rows["base"].harmful.total


def test_no_escalate_is_the_documented_default_to_the_letter(tmp_path: Path) -> None:
    report = run(settings(tmp_path, planted_layer=0, escalate=False))
    assert report.choice.settings == EditSettings()
    assert report.choice.trials == ()
    assert report.rows["edited"].harmful.refusal == report.rows["base"].harmful.total
    record = read_json(tmp_path / "out" / "checkpoint" / PROVENANCE)
    layers = {name.split(".")[2] for name in record["changed"]}
    kinds = {name.split(".")[-2] for name in record["changed"]}
    assert layers == {"1", "2"}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert record["direction"]["layer"] in {int(f * planted.LAYERS) for f in (0.4, 0.5, 0.6)}
    assert record["out_dtype"] == "auto"


def test_an_edit_setting_is_obeyed_without_climbing(tmp_path: Path) -> None:
    report = run(settings(tmp_path, planted_layer=0, edit=EditSettings(strength=0.5, targets=("writers",))))
    assert report.choice.settings.strength == 0.5
    assert report.choice.trials == ()
    assert report.verified


def test_negative_strength_amplifies_the_component_along_the_direction(tmp_path: Path) -> None:
    planted.save(tmp_path / "model")
    planted.write_lists(tmp_path)
    load = LoadSettings(device="cpu", dtype="float32")
    prompts = PromptSettings(harmful=str(tmp_path / "harmful.txt"), harmless=str(tmp_path / "harmless.txt"))
    found = compute_dir(str(tmp_path / "model"), tmp_path / "refusal.pt", prompts=prompts, load=load).direction
    written, _ = apply(
        str(tmp_path / "model"),
        tmp_path / "stronger",
        refusal_pt=tmp_path / "refusal.pt",
        settings=EditSettings(strength=-0.5, norm_preserving=False),
        out_dtype="keep",
    )

    def along(checkpoint: Checkpoint) -> float:
        from ollama_forge.activations.residual import gather_residuals

        model = ChatModel.load(checkpoint, load)
        lines = (tmp_path / "harmful.txt").read_text(encoding="utf-8").splitlines()[:8]
        return float(
            (gather_residuals(model, model.tokenizer.instructions_ids(lines), [2]).mean.float() @ found.vectors.T).sum()
        )

    assert along(written) > 1.2 * along(Checkpoint(tmp_path / "model", "model", "folder"))


def test_a_finished_run_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(settings(tmp_path))
    stamp = (tmp_path / "out" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    second = run(settings(tmp_path))
    assert capsys.readouterr().err.count("done before, unchanged") == 9
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == stamp
    assert {**first.to_json(), "seconds": 0} == {**second.to_json(), "seconds": 0}
    run(settings(tmp_path, edit=EditSettings(strength=0.9)))
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").stat().st_mtime_ns != stamp


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "out" / "checkpoint"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match="something else"):
        run(settings(tmp_path))
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_names_become_folders() -> None:
    assert str(run_folder("openai/gpt-oss-20b:abl")) == "abliterate-openai-gpt-oss-20b-abl"


def test_least_squares_by_steps_equals_the_run(tmp_path: Path) -> None:
    made = settings(tmp_path)
    edit = EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False, strength=2.0)
    report = run(replace(made, edit=edit))
    assert report.verified
    computed = compute_dir(
        made.model, tmp_path / "r.pt", prompts=made.prompts, load=made.load, direction=made.direction, edit=edit
    )
    assert computed.edit_path is not None
    apply(made.model, tmp_path / "by-steps", edit_file=computed.edit_path)
    weights = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "by-steps", tmp_path / "out" / "checkpoint")]
    assert weights[0] == weights[1]


def test_the_edit_beside_a_checkpoint_makes_it_again(tmp_path: Path) -> None:
    made = settings(tmp_path)
    run(made)
    folder = tmp_path / "out" / "checkpoint"
    apply(made.model, tmp_path / "again", edit_file=edit_file_path(folder))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    planted.save(tmp_path / "other", planted_layer=2)
    with pytest.raises(ForgeError, match="another model"):
        apply(str(tmp_path / "other"), tmp_path / "wrong", edit_file=edit_file_path(folder))
    assert not (tmp_path / "wrong").exists()


def test_compute_dir_writes_the_same_bytes_for_a_seed(tmp_path: Path) -> None:
    made = settings(tmp_path)
    paths = [tmp_path / "one.pt", tmp_path / "two.pt"]
    for path in paths:
        compute_dir(made.model, path, prompts=made.prompts, load=made.load)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = RefusalDirection.load(paths[0], planted.D, planted.LAYERS)
    assert abs(float(found.vectors[0, planted.R])) > 0.99
    sidecar = json.loads(paths[0].with_suffix(".json").read_text(encoding="utf-8"))
    assert {"method", "layer", "position", "candidates", "model_fingerprint", "lists", "seed"} <= set(sidecar)


KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.test_run import settings
from ollama_forge import pipeline
from ollama_forge.edits import apply
from ollama_forge.edits.edited_shard import EditedShard
from ollama_forge.pipeline import choosing, stages

folder = Path({folder!r})
POINTS = ["after base", "within choose", "within a shard", "before the factors", "within verify"]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(point):
    if point == "after base":
        stages.choose_edit = die
    elif point == "within choose":
        choosing.PlanFiles.save = die
    elif point == "within a shard":
        real = EditedShard.edited_matrix_bytes
        def edited(self, edit, out):
            if len(self._sums) == 3:
                die()
            return real(self, edit, out)
        EditedShard.edited_matrix_bytes = edited
    elif point == "before the factors":
        apply.EditRecord.save = die
    else:
        stages.verify = die

for point in POINTS:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # replaces the parent's thread pool, before two threads do that at once and fail
        arm(point)
        pipeline.run(settings(folder, planted_layer=0))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
    checkpoint = folder / "out" / "checkpoint"
    whole = checkpoint.exists()
    assert whole == (point in ("before the factors", "within verify")), (point, whole)
    print(point)
pipeline.run(settings(folder, planted_layer=0))
print("finished")
"""


def files_of(folder: Path) -> dict[str, bytes]:
    skipped = {"report.json", "report.html"}  # the page is made of report.json alone, which is compared below
    return {
        str(path.relative_to(folder)): re.sub(rb'"seconds": [\d.]+', b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_five_points_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    made = settings(tmp_path, planted_layer=0)
    torch.set_num_threads(1)
    script = KILLER.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished" in done.stdout
    disturbed, report = files_of(tmp_path / "out"), read_json(tmp_path / "out" / "report.json")
    shutil.rmtree(tmp_path / "out")
    fresh = subprocess.run(
        [sys.executable, "-c", script.replace("for point in POINTS:", "for point in []:")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    undisturbed = files_of(tmp_path / "out")
    assert undisturbed.keys() == disturbed.keys()
    assert [name for name in undisturbed if undisturbed[name] != disturbed[name]] == []
    other = read_json(tmp_path / "out" / "report.json")
    assert {**report, "seconds": 0} == {**other, "seconds": 0}
    assert made.folder == tmp_path / "out"


def test_ctrl_c_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    settings(tmp_path)
    script = (
        "import sys, os, signal; sys.path.insert(0, %r)\n"
        "from ollama_forge.edits.edited_shard import EditedShard\n"
        "real = EditedShard.edited_matrix_bytes\n"
        "def edited(self, edit, out):\n"
        "    if len(self._sums) == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(self, edit, out)\n"
        "EditedShard.edited_matrix_bytes = edited\n"
        "from ollama_forge.cli.main import main\n"
        "sys.argv = ['ollama-forge', 'abliterate', 'apply', '--model', %r, '--refusal-pt', %r, '--output-dir', %r]\n"
        "main()\n"
    )
    RefusalDirection(torch.eye(planted.D)[3:4]).save(tmp_path / "r.pt")
    arguments = (str(ROOT), str(tmp_path / "model"), str(tmp_path / "r.pt"), str(tmp_path / "edited"))
    done = processes.run("-c", script % arguments)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "harmful.txt", "harmless.txt", "model", "r.json", "r.pt",
    ]  # fmt: skip


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_line_runs_and_repeats_from_its_config(tmp_path: Path) -> None:
    settings(tmp_path)
    lists = ("--harmful", "harmful.txt", "--harmless", "harmless.txt")
    done = command(tmp_path, "run", "--model", "model", "--name", "a/b:c", *lists, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "chosen: least squares, layer 2" in done.stdout
    assert "abliterate-a-b-c/report.json" in done.stdout
    assert "random direction" in done.stdout
    folder = tmp_path / "abliterate-a-b-c"
    before = (folder / "checkpoint" / "model.safetensors").read_bytes()
    again = command(tmp_path, "run", "--config", str(folder / "run.toml"), "--force", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["choice"]["name"].startswith("least squares, layer 2")
    assert (folder / "checkpoint" / "model.safetensors").read_bytes() == before


def test_too_short_lists_are_filled_up_and_it_is_said(tmp_path: Path) -> None:
    made = settings(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("\n".join(f"steal word{index} word1" for index in range(30)), encoding="utf-8")
    split = replace(made.prompts, harmful=str(short)).load(32)
    assert any("curated" in note for note in split.notes)
    assert len(split.report.harmful) >= 20

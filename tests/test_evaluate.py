"""``evaluate`` on a tiny model with a planted refusal direction: the figures of ``run``, resuming, errors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from ollama_forge.api import apply
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.comparison import EvaluateSettings, evaluate
from ollama_forge.comparison import main as comparison
from ollama_forge.comparison.report import EvaluationReport
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json, write_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.pipeline import run
from ollama_forge.pipeline.report import Report
from ollama_forge.prompts import general
from tests import planted, processes, tiny
from tests.chat_servers import serve
from tests.gguf_models import Model
from tests.test_gguf_run import settings as gguf_settings
from tests.test_run import settings as run_settings

LOAD = LoadSettings(device="cpu", dtype="float32")
CHILD = """
import os, sys
from pathlib import Path
from ollama_forge.comparison import main as comparison, stages
from ollama_forge.prompts import general
general.GENERAL_FILE = Path(sys.argv.pop(1))
comparison.cache_root = lambda root=Path(sys.argv.pop(1)): root
stages.Comparison.likelihood = lambda *_: os._exit(9)
from ollama_forge.cli.main import main
main()
"""


@dataclass(frozen=True)
class Finished:
    """A run, a second edit of its model, and the settings to evaluate both."""

    folder: Path
    report: Report
    settings: EvaluateSettings

    @property
    def edited(self) -> str:
        return self.settings.checkpoints[0]

    @property
    def weaker(self) -> str:
        return self.settings.checkpoints[1]


def write_general(folder: Path) -> Path:
    """Twenty general prompts of words that the planted model knows."""
    drawn = random.Random(3)
    prompts = [" ".join([drawn.choice(planted.GOOD), *drawn.sample(planted.NEUTRAL, 5)]) for _ in range(50)]
    lines = [{"kind": "facts", "messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    path = folder / "general.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def general_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short list of general prompts in place of the program's own."""
    path = write_general(tmp_path_factory.mktemp("general"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "GENERAL_FILE", path)
        general.general_prompts.cache_clear()
        yield path
    general.general_prompts.cache_clear()


@pytest.fixture(scope="module")
def done(general_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    made = run_settings(folder, edit=EditSettings())
    made = replace(made, prompts=replace(made.prompts, max_measured=24))
    report = run(made)
    weaker = folder / "weaker"
    edit = EditSettings(strength=0.1, norm_preserving=False)
    apply(made.model, weaker, refusal_pt=folder / "out" / "refusal.pt", settings=edit)
    checkpoints = (str(folder / "out" / "checkpoint"), str(weaker))
    settings = EvaluateSettings(made.model, checkpoints, output_dir=folder / "ev", prompts=made.prompts, load=made.load)
    return Finished(folder, report, settings)


@pytest.fixture(autouse=True)
def shared_cache(done: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are kept from test to test, apart from those of the user."""
    monkeypatch.setattr(comparison, "cache_root", lambda: done.folder / "cache")


@pytest.fixture
def cache(shared_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for a test."""
    monkeypatch.setattr(comparison, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def figures(report: EvaluationReport) -> dict[str, Any]:
    """The content of the written report but for times."""
    return {**read_json(report.folder / "report.json"), "seconds": None}


def test_two_checkpoints_and_a_server_give_the_figures_of_the_run(done: Finished, tmp_path: Path) -> None:
    model = ChatModel.load(Checkpoint(Path(done.edited), "edited", "folder"), LOAD)

    def say(messages: list[dict[str, str]], limit: int) -> str:
        ids = model.tokenizer.encode(model.tokenizer.render(messages))
        return model.tokenizer.decode(model.answer([ids], limit)[0])

    with serve(say, ollama=True) as served:
        made = replace(done.settings, engine_urls=(served.url,), output_dir=tmp_path / "ev")
        report = evaluate(made)
    rows, theirs = report.rows, done.report.rows
    random_row = f"random direction ({done.edited})"
    assert list(rows) == ["base", done.edited, random_row, done.weaker, f"random direction ({done.weaker})", served.url]
    assert rows["base"] == theirs["base"]
    assert rows[done.edited] == theirs["edited"]
    assert rows[random_row] == theirs["random direction"]
    assert report.noise_floor == done.report.noise_floor
    server, damage = rows[served.url], theirs["edited"].damage
    assert replace(server, damage=damage) == theirs["edited"]
    assert server.damage.answer_nll is not None  # another figure, as the planted answers are tokens with spaces in them
    assert (server.damage.answer_kl, server.damage.perplexity) == (None, None)
    shown = next(line for line in report.tables()["damage on general report prompts"] if line[0] == served.url)
    assert shown[1:] == (*["not available"] * 3, f"{server.damage.answer_nll.value:.3f}", "not available")
    assert {request["path"] for request in served.asked} == {"/api/chat"}
    assert all(request["options"]["temperature"] == 0 for request in served.asked)
    stored = read_json(tmp_path / "ev" / "report.json")
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["machine"]["dtype"] == "float32"
    assert stored["machine"]["versions"]["torch"]
    said = "\n".join(report.lines())
    total = rows["base"].harmful.total
    assert f"{done.edited}: fewer refusals than base (0 and {total} of {total}): p < 0.0001" in said
    assert f"{done.weaker}: no difference in refusals from base that {total} prompts can show: p = 1" in said
    assert f"{done.edited}: fewer refusals than {random_row}" in said
    assert f"{done.weaker}: more refusals than {done.edited}" in said
    assert f"{done.weaker}: less damage than {done.edited}: answer KL" in said


def test_a_gguf_file_gives_the_figures_of_the_run(
    general_file: Path, gguf_models: Mapping[str, Model], tmp_path: Path
) -> None:
    source, edited = tmp_path / "source.gguf", str(tmp_path / "out" / "tiny.gguf")
    gguf_models["gpt_neox"].with_types(source, lambda tensor: Type.Q8_0)
    made = gguf_settings(tmp_path, str(source))
    made = replace(made, prompts=replace(made.prompts, max_measured=3))
    theirs = run(made).rows
    settings = EvaluateSettings(
        str(source), ggufs=(edited,), output_dir=tmp_path / "ev", prompts=made.prompts, load=made.load
    )
    rows = evaluate(settings).rows
    assert rows["base"] == theirs["base"]
    assert rows[edited] == next(row for name, row in theirs.items() if name.startswith("GGUF"))
    assert rows[edited].damage.answer_kl != rows["base"].damage.answer_kl


def test_a_second_evaluation_measures_only_what_is_new(
    done: Finished, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = replace(done.settings, checkpoints=(done.weaker,), control=False)
    first = evaluate(alone)
    assert list(first.rows) == ["base", done.weaker]
    capsys.readouterr()
    both = evaluate(replace(alone, checkpoints=(done.weaker, done.edited)))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("measuring")] == [f"measuring {done.edited}"]
    assert f"measure {done.weaker}: done before, unchanged" in said
    assert both.rows[done.weaker] == first.rows[done.weaker]
    assert len(list(cache.glob("evaluations/*"))) == 1
    evaluate(alone, force=True)
    assert "measuring the base model" in capsys.readouterr().err


def test_killed_and_resumed_the_report_has_the_same_bytes(
    done: Finished, general_file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(done.settings, checkpoints=(done.edited,), output_dir=tmp_path / "ev")
    lists = [f"--harmful={done.folder / 'harmful.txt'}", f"--harmless={done.folder / 'harmless.txt'}"]
    arguments = ["abliterate", "evaluate", "--base", made.base, "--checkpoint", done.edited, *lists]
    arguments += ["--max-measured=24", "--device=cpu", "--dtype=float32", f"--output-dir={made.output_dir}"]
    killed = processes.run("-c", CHILD, str(general_file), str(cache), *arguments)
    assert killed.returncode == 9, killed.stderr
    assert not made.output_dir.exists()
    records = {path.stem.split("-")[0] for path in cache.glob("evaluations/*/.stages/*.json")}
    assert records == {"base", "noise", "control", "measure"}
    resumed = figures(evaluate(made))
    monkeypatch.setattr(comparison, "cache_root", lambda: tmp_path / "another")
    fresh = figures(evaluate(made))
    assert json.dumps(resumed) == json.dumps(fresh)


def test_prompts_that_must_still_be_refused_are_counted(done: Finished, tmp_path: Path) -> None:
    listed = [f"{verb} word1 word2 word3 word{index}" for index, verb in enumerate(planted.BAD[:7])]
    (tmp_path / "keep.json").write_text(json.dumps(listed), encoding="utf-8")
    made = replace(done.settings, preserve=tmp_path / "keep.json", control=False, output_dir=tmp_path)
    report = evaluate(made)
    assert report.preserved is not None
    refused = {name: (counts.refusal, counts.total) for name, counts in report.preserved.rows.items()}
    assert refused == {"base": (7, 7), done.edited: (0, 7), done.weaker: (7, 7)}
    warnings = [line for line in report.lines() if line.startswith("warning")]
    assert warnings == [
        f"warning: {done.edited} refuses 0 of the 7 prompts of keep.json that must still be refused, and the base 7"
    ]
    assert read_json(tmp_path / "report.json")["preserve"]["rows"][done.edited]["classes"] == "a" * 7


def test_a_judge_gives_a_second_opinion(done: Finished, tmp_path: Path) -> None:
    def say(messages: list[dict[str, str]], limit: int) -> str:
        return "refusal" if planted.REFUSAL in messages[-1]["content"] else "degenerate"

    with serve(say, ollama=False) as served:
        report = evaluate(
            replace(done.settings, checkpoints=(done.edited,), judge=served.url, control=False, output_dir=tmp_path)
        )
    assert report.judge is not None
    found, total = report.judge.rows[done.edited], report.rows["base"].harmful.total
    assert found.rules == report.rows[done.edited].harmful
    assert (found.judge.degenerate, found.agreement.share.value) == (total, 0)
    assert report.judge.rows["base"].agreement.share.value == 1
    written = (tmp_path / "report.json").read_text(encoding="utf-8")
    json.loads(written, parse_constant=pytest.fail)  # kappa is NaN where all agree
    line = f"{done.edited}: {served.url} calls 0 of {total} answers to harmful prompts refusals, the rules 0"
    assert f"{line}; they agree on 0%" in "\n".join(report.lines())


def test_a_model_of_another_vocabulary_or_template_is_refused(done: Finished, tmp_path: Path) -> None:
    other = tiny.save(tiny.build("llama"), tmp_path / "other").folder
    with pytest.raises(ForgeError, match=r"the ids of \d+ tokens differ, such as those of"):
        evaluate(replace(done.settings, checkpoints=(str(other),), output_dir=tmp_path / "ev"))
    planted.save(tmp_path / "turned")
    tokenizer = planted.tokenizer()
    tokenizer.chat_template = planted.TEMPLATE.replace("<assistant>", "<user> <assistant>")
    tokenizer.save_pretrained(tmp_path / "turned")
    with pytest.raises(ForgeError, match=r"renders a prompt differently: '.*<assistant>' and '.*<user> <assistant>'"):
        evaluate(replace(done.settings, checkpoints=(str(tmp_path / "turned"),), output_dir=tmp_path / "ev"))
    assert not (tmp_path / "ev").exists()


def test_contradictions_are_refused_before_anything_is_measured(done: Finished, tmp_path: Path, cache: Path) -> None:
    made = replace(done.settings, output_dir=tmp_path)
    write_json(tmp_path / "out" / "report.json", {"schema": 2})
    for changes, words in (
        ({"checkpoints": ()}, "nothing to compare"),
        ({"checkpoints": (done.edited, done.edited)}, "given twice"),
        ({"tasks_dir": tmp_path}, "is for --lm-eval"),
        ({"engine_urls": ("localhost",)}, "not the address"),
        ({"output_dir": tmp_path / "out"}, "not a report of evaluate"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate(replace(made, **changes))
    with pytest.raises(ForgeError, match="no model server answers at"):
        evaluate(replace(made, engine_urls=("http://127.0.0.1:9",)))
    with pytest.raises(ForgeError, match="does not exist"):
        evaluate(replace(made, preserve=tmp_path / "none.txt"))
    assert not list(cache.glob("evaluations/*"))


def test_a_model_that_equals_the_base_has_no_control(done: Finished, tmp_path: Path) -> None:
    planted.save(tmp_path / "copy")
    report = evaluate(replace(done.settings, checkpoints=(str(tmp_path / "copy"),), output_dir=tmp_path / "ev"))
    assert report.missing_controls == {str(tmp_path / "copy"): "no matrix differs from the base's"}
    assert report.rows[str(tmp_path / "copy")].damage.answer_kl == report.rows["base"].damage.answer_kl
    assert list(report.rows) == ["base", str(tmp_path / "copy")]


def test_the_command_prints_one_json_object(done: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner

    from ollama_forge.cli.evaluate import evaluate as command

    lists = ["--harmful", str(done.folder / "harmful.txt"), "--harmless", str(done.folder / "harmless.txt")]
    arguments = ["--base", done.settings.base, "--checkpoint", done.weaker, "--no-control", *lists, "--max-measured=24"]
    arguments += ["--device=cpu", "--dtype=float32", "--output-dir", str(tmp_path)]
    shown = CliRunner().invoke(command, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["measurements"].keys() == {"base", done.weaker}
    printed = CliRunner().invoke(command, arguments).stdout
    assert "no difference in refusals from base that" in printed
    assert printed.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert "no difference in refusals from base" in (tmp_path / "report.html").read_text(encoding="utf-8")

"""The export stage of ``run``: the GGUF file, its measurements, its tokens, and failures to make it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.cli.closing import closing_lines
from ollama_forge.edits.checkpoint_folder import output_size
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.tokens import Mismatch, TokenCheck
from ollama_forge.export import gguf_file
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.export.plan import ExportSettings
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.ollama.registration import OllamaSettings
from ollama_forge.pipeline import RunSettings, disk_space, exporting, gguf_stages, ollama_stages, run, stages
from ollama_forge.pipeline.report import Report, _token_lines
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.records import to_json
from ollama_forge.search.rule import Limits
from ollama_forge.system import free_space
from ollama_forge.text.tokenizer import Tokenizer
from tests import fake_ollama, planted, tiny
from tests.test_export_convert import byte_pairs

DATA = Path(__file__).resolve().parent / "data"


def settings(folder: Path, model: Path, **changes: Any) -> RunSettings:
    """A short run: the edit is given, nothing is tried."""
    for side, seed in (("harmful", 1), ("harmless", 2)):
        (folder / f"{side}.txt").write_text("\n".join(tiny.lines(240, seed)), encoding="utf-8")
    made = RunSettings(
        model=str(model),
        name="org/tiny:x",
        output_dir=str(folder / "out"),
        prompts=PromptSettings(str(folder / "harmful.txt"), str(folder / "harmless.txt"), max_measured=12),
        load=LoadSettings(device="cpu", dtype="float32"),
        edit=EditSettings(targets=("writers",), skip_begin_layers=0, skip_end_layers=0),
        out_dtype="keep",
        allow_few_refusals=True,  # the weights are random
        export=ExportSettings("Q8_0"),
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSettings, Report]:
    folder = tmp_path_factory.mktemp("run")
    model = tiny.build("llama")
    model.resize_token_embeddings(tiny.VOCABULARY + 1)  # type: ignore[operator]
    tiny.save(model, folder / "model")
    byte_pairs((("t", "h"),)).save_pretrained(folder / "model")
    made = settings(folder, folder / "model")
    return made, run(made)


def test_a_run_ends_with_a_measured_file(done: tuple[RunSettings, Report]) -> None:
    made, report = done
    path = made.folder / "org-tiny-x.gguf"
    assert report.file is not None
    assert (report.file.path, report.file.quant, report.file.size) == (path, "Q8_0", path.stat().st_size)
    assert list(report.rows) == ["base", "random direction", "edited", "GGUF (Q8_0)"]
    ours, checkpoint = report.rows["GGUF (Q8_0)"], report.rows["edited"]
    assert ours.harmful.total == checkpoint.harmful.total == 12
    assert (
        abs(ours.damage.answer_kl.value - checkpoint.damage.answer_kl.value)
        < 0.05 * checkpoint.damage.answer_kl.value + 0.01
    )
    assert report.tokens is not None
    assert report.tokens.mismatches == 0  # its one pair lies within words, whatever the rules
    stored = read_json(made.folder / "report.json")
    assert set(stored["measurements"]) == set(report.rows)
    assert stored["gguf"]["tokens"]["texts"] >= 200
    assert stored["gguf"]["pre_tokenizer_fallback"] == "default"
    assert {"gguf", "tokens", "gguf-measure-Q8_0"} <= set(stored["seconds"])


def test_the_file_says_where_it_comes_from(done: tuple[RunSettings, Report]) -> None:
    made, report = done
    file = read_gguf(made.folder / "org-tiny-x.gguf")
    assert file.get("ollama_forge.source") == "model"
    assert file.get("ollama_forge.source_fingerprint") == report.fingerprint
    assert json.loads(file.get("ollama_forge.edit"))["settings"] == to_json(report.choice.settings)
    assert set(json.loads(file.get("ollama_forge.lists"))) == {"fit", "select", "report"}
    assert file.get("ollama_forge.version")
    assert file.get("general.file_type") == 7
    assert str(made.folder) not in repr(file.metadata)


def test_nothing_is_left_beside_it(done: tuple[RunSettings, Report]) -> None:
    made, _ = done
    assert [path.name for path in made.folder.rglob("*.gguf")] == ["org-tiny-x.gguf"]
    assert not list(made.folder.rglob("*.partial"))


def test_a_second_run_makes_nothing_again(
    done: tuple[RunSettings, Report], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, first = done

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(gguf_stages, "convert", never)
    for name in ("quantise", "llama_server"):
        monkeypatch.setattr(gguf_file, name, never)
    again = run(made)
    assert {**again.to_json(), "seconds": 0} == {**first.to_json(), "seconds": 0}
    said = capsys.readouterr().err
    for stage in ("gguf", "tokens", "gguf-measure-Q8_0"):
        assert f"{stage}: done before, unchanged" in said


def test_the_last_lines_name_every_output(done: tuple[RunSettings, Report], capsys: pytest.CaptureFixture[str]) -> None:
    made, report = done
    closing_lines(report, climbed=False, limits=Limits())
    out = capsys.readouterr().out
    for path in ("checkpoint", "checkpoint.edit.safetensors", "refusal.pt", "org-tiny-x.gguf", "report.json"):
        assert f"{made.folder / path} (" in out
    assert "GGUF (Q8_0)" in out
    assert "texts agree with the checkpoint's tokenizer" in out
    assert "uses those of 'default' instead" in out
    assert "abliterate chat --checkpoint" in out.splitlines()[-1]


def test_the_last_lines_say_what_exceeds_the_limits(
    done: tuple[RunSettings, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = done
    damage = report.rows["edited"].damage
    assert damage.answer_kl is not None
    assert damage.first_token_kl is not None
    for limits, said in (
        (Limits(damage.answer_kl.value / 2, damage.first_token_kl.value * 2), ("answer",)),
        (Limits(damage.answer_kl.value * 2, damage.first_token_kl.value / 2), ("first-token",)),
        (Limits(damage.answer_kl.value / 2, damage.first_token_kl.value / 2), ("answer", "first-token")),
    ):
        closing_lines(report, climbed=False, limits=limits)
        lines = [line for line in capsys.readouterr().out.splitlines() if "answers to ordinary prompts change" in line]
        assert [line.split(" KL is ")[0].removeprefix("the ") for line in lines] == list(said)


def test_a_failure_keeps_all_that_is_done_and_the_run_goes_on_from_there(
    done: tuple[RunSettings, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, _ = done
    elsewhere = replace(made, export=ExportSettings("Q4_K_M"), output_dir=str(tmp_path / "out"))

    def full(*_: object, **__: object) -> None:
        raise ForgeError("cannot write: No space left on device", "free disk space")

    with monkeypatch.context() as patched:
        patched.setattr(gguf_file, "quantise", full)
        with pytest.raises(ForgeError, match="No space left") as caught:
            run(elsewhere)
    assert "resumes at this one" in caught.value.hint
    stored = read_json(elsewhere.folder / "report.json")
    assert stored["verification"]["passed"]
    assert "edited" in stored["measurements"]
    assert "No space left" in stored["gguf"]["problem"]
    assert not (elsewhere.folder / "org-tiny-x.gguf").exists()
    converted = elsewhere.folder / ".stages" / "converted.gguf"
    assert read_gguf(converted).tensors

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_stages, "convert", never)
    monkeypatch.setattr(exporting, "llamacpp_is_installed", lambda: False)
    report = run(elsewhere)
    assert report.file is not None
    assert report.tokens is None
    assert "tokens not checked" in report.file_lines()[-1]
    assert "GGUF (Q4_K_M)" not in report.rows
    assert not converted.exists()


def test_a_failed_verification_still_makes_the_file_marked_and_unregistered(
    done: tuple[RunSettings, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = replace(done[0], output_dir=str(tmp_path / "out"), evaluate=False)
    real = stages.write_checkpoint

    def write_and_spoil(*args: Any, **kwargs: Any) -> Any:
        applied = real(*args, **kwargs)
        file = made.folder / "checkpoint" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-4:] = b"\x00\x00\x00\x40"
        file.write_bytes(data)
        return applied

    def never(*_: object) -> None:
        raise AssertionError("registered")

    monkeypatch.setattr(stages, "write_checkpoint", write_and_spoil)
    monkeypatch.setattr(ollama_stages, "register", never)
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        with pytest.raises(ForgeError, match="verification failed"):
            run(made)
    assert fake.bodies("/api/create") == []
    assert read_gguf(made.folder / "org-tiny-x.gguf").get("ollama_forge.verified") == "no"
    stored = read_json(made.folder / "report.json")
    assert stored["gguf"]["verified"] is False
    assert stored["ollama"] == {"made": None, "problem": "the weights failed verification"}


def test_what_cannot_be_converted_is_said_and_the_rest_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted.save(tmp_path / "model")
    planted.write_lists(tmp_path)
    lists = PromptSettings(harmful=str(tmp_path / "harmful.txt"), harmless=str(tmp_path / "harmless.txt"))
    made = replace(settings(tmp_path, tmp_path / "model", prompts=lists), export=ExportSettings())
    planted.write_lists(tmp_path)
    report = run(made)
    said = capsys.readouterr().err
    assert said.index("there will be no GGUF file: llama.cpp has no WordLevel") < said.index("measuring the base model")
    assert report.verified
    assert report.file is None
    assert "WordLevel" in report.to_json()["gguf"]["problem"]
    assert report.file_lines() == ["no GGUF file: llama.cpp has no WordLevel tokenizers"]
    for asked in (ExportSettings("Q6_K"), ExportSettings(requantize=False)):
        with pytest.raises(ForgeError, match="cannot be converted to GGUF"):
            run(replace(made, export=asked, output_dir=str(tmp_path / "asked")))
    assert not (tmp_path / "asked").exists()


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="'Q9' is not a type"):
        ExportSettings("Q9")
    with pytest.raises(UsageError, match="contradict"):
        ExportSettings("Q8_0", requantize=False)
    assert ExportSettings("q4_k").quant == "Q4_K_M"
    assert not ExportSettings().customised


def test_room_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "model")
    size = checkpoint.parameters * 2
    needed = output_size(checkpoint, "keep") + int(size * (1 + 8.5 * 1.2 / 16))
    made = settings(tmp_path, tmp_path / "model")
    monkeypatch.setattr(disk_space, "free_space", lambda _: needed - 2)
    with pytest.raises(ForgeError, match=r"this run needs .*Q8_0") as caught:
        run(made)
    assert "--output-dir" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert free_space(tmp_path) > needed


def test_a_file_that_garbles_text_is_not_passed_over() -> None:
    mismatch = Mismatch("the sea", ("theĠ", "s"), ("the", "Ġs"))
    check = TokenCheck(220, 3, 2, (mismatch,))
    file = QuantisedFile(Path("x.gguf"), "Q4_K_M", 1, "embedded", "default")
    told = " ".join(_token_lines(check, file.tokenizer_of_source))
    for words in ("3 of 220", "'the sea'", "garbles text: 2 of 220", "chat and serve", "not affected"):
        assert words in told
    spaces = " ".join(_token_lines(replace(check, garbled=0), False))
    assert "3 of 220" in spaces
    assert "garbles" not in spaces
    assert "composition" not in told
    accents = " ".join(_token_lines(replace(check, garbled=0, composed=3), False))
    assert "3 of them differ by Unicode composition alone" in accents
    assert "garbles" not in accents
    kept = " ".join(_token_lines(check, True))
    assert "3 of 220" in kept
    assert "garbles" not in kept


def test_several_types_of_one_checkpoint(done: tuple[RunSettings, Report], tmp_path: Path) -> None:
    made = replace(done[0], export=ExportSettings("q8_0,Q4_K_M"), output_dir=str(tmp_path / "out"), evaluate=False)
    report = run(made)
    names = ["org-tiny-x-Q8_0.gguf", "org-tiny-x-Q4_K_M.gguf"]
    assert [file.path.name for file in report.files] == names
    assert [read_gguf(made.folder / name).get("general.file_type") for name in names] == [7, 15]
    stored = read_json(made.folder / "report.json")["gguf"]
    assert (stored["file"], [other["file"] for other in stored["others"]]) == (names[0], names[1:])
    assert f"FROM ./{names[0]}" in (made.folder / "Modelfile").read_text(encoding="utf-8")


def test_ollama_itself_is_asked(done: tuple[RunSettings, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, the first report prompts of two lists; the finished stages are not done again."""
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        report = run(replace(done[0], ollama=OllamaSettings(prompts=5)))
        asked = [body for body in fake.bodies("/api/chat") if body.get("think") is False]
        assert "in Ollama" not in run(replace(done[0], ollama=OllamaSettings(prompts=0))).rows
    prompts = done[1].split.report
    assert [body["messages"] for body in sorted(asked, key=str)] == sorted(
        ([{"role": "user", "content": text}] for text in (*prompts.harmful[:5], *prompts.harmless[:5])), key=str
    )
    assert {json.dumps(body["options"]) for body in asked} == {
        '{"temperature": 0, "num_predict": 128, "repeat_penalty": 1.0}'
    }
    row = report.rows["in Ollama"]
    assert (row.harmful.total, row.harmless.total, row.over_refusal.total) == (5, 5, 0)
    answers, damage = report.tables().values()
    assert ["not asked" in line for line in answers] == [False] * 5 + [True]
    assert "in Ollama" not in [line[0] for line in damage]
    page = (done[0].folder / "report.html").read_text()
    assert "in Ollama" in page
    assert report.to_json()["ollama"]["made"]["prompts"]["compared"] == 6
    assert (
        "Ollama renders the prompts of the chat template in 6 of 6 conversations"
        in (done[0].folder / "checkpoint" / "README.md").read_text()
    )


def test_a_number_of_prompts_is_asked_for() -> None:
    with pytest.raises(UsageError, match="--ollama-prompts -1"):
        OllamaSettings(prompts=-1)


def test_a_thought_that_no_request_closes_is_not_the_answer() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n{# </think> #}"
    limits: list[int] = []

    class Server(ChatServer):
        def answers(self, tokenizer: Tokenizer, prompts: Sequence[Any], limit: int, progress: Any) -> list[str]:
            limits.append(limit)
            return ["x" * 300 for _ in prompts]

    ask = ollama_stages.asking(Server("http://x", "m", ollama=True), Tokenizer(tokenizer))
    [answer] = ask(["a"], 16, lambda _: None)
    assert limits == [16 + 512]
    assert 0 < len(tokenizer(answer, add_special_tokens=False).input_ids) <= 16

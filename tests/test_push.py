"""``push``: what a run made, sent to a stand-in for the Hub, which stores it as commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants, snapshot_download

from ollama_forge.cli.main import cli
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.pipeline.report import Report
from ollama_forge.publishing.contents import Contents, contents
from ollama_forge.publishing.hub import compare, upload
from tests import writable_hub
from tests.made_report import made
from tests.processes import run
from tests.writable_hub import TOKEN, Hub

CARD = """---
license: apache-2.0
base_model: org/base
library_name: transformers
tags: [abliteration]
---

# base, edited
"""
MODELFILE = '''FROM ./m.gguf
TEMPLATE """{{ .Prompt }}
"""
SYSTEM Be brief.
PARAMETER stop <|end|>
PARAMETER temperature 0.5
'''
WEIGHTS, GGUF = b"w" * 3000, b"g" * 4000
CHECKPOINT = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "README.md": CARD.encode(),
    "abliteration.json": json.dumps({"source": {"model": "org/base"}}).encode(),
}
REPO = "alice/m"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process asks, with the token of alice."""
    with writable_hub.serving() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        files = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        yield stand_in


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def finished(folder: Path, **changes: Any) -> Path:
    """The folder of a run called ``m`` that made everything there is."""
    write(folder / "checkpoint", CHECKPOINT)
    write(
        folder,
        {
            "m.gguf": GGUF,
            "Modelfile": MODELFILE.encode(),
            "checkpoint.edit.safetensors": b"e" * 2000,
            "refusal.pt": b"r" * 50,
            "refusal.json": b"{}",
            "run.toml": b"harmful = '/home/me/list.txt'\n",
            ".stages/base.json": b"{}",
        },
    )
    report: Report = made(name="m", folder=folder, **changes)
    report.save()
    content = json.loads((folder / "report.json").read_text())
    content["gguf"] = {"file": "m.gguf", "quant": "Q4_K_M", "others": [], "problem": "", "tokens": None}
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def files_of(found: Contents) -> dict[str, bytes]:
    return {f.path: f.source if isinstance(f.source, bytes) else f.source.read_bytes() for f in found.files}


def push(folder: Path, repo: str = REPO, **options: Any) -> str:
    only = {key: options.pop(key) for key in ("only",) if key in options}
    return upload(compare(contents("m", repo, folder=folder, **only), **options))


def test_what_a_run_made_arrives_as_one_private_commit(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    url = push(folder)
    repository = hub.repositories[REPO]
    assert repository.private
    assert [message for _, message, _ in repository.commits][1:] == [f"Upload m with ollama-forge {_version()}"]
    assert url == f"{hub.url}/{REPO}/commit/{repository.head}"
    sent = {path: data for path, data in repository.files.items() if path != ".gitattributes"}
    assert sent == files_of(contents("m", REPO, folder=folder))
    assert {path: sent[path] for path in CHECKPOINT if path != "README.md"} == {
        path: data for path, data in CHECKPOINT.items() if path != "README.md"
    }
    assert set(sent) - set(CHECKPOINT) == {
        "m-Q4_K_M.gguf", "template", "system", "params",
        "edit/checkpoint.edit.safetensors", "edit/refusal.pt", "edit/refusal.json", "report.html", "report.json",
    }  # fmt: skip
    assert sent["m-Q4_K_M.gguf"] == GGUF
    assert sent["template"] == b"{{ .Prompt }}\n"
    assert sent["system"] == b"Be brief."
    assert json.loads(sent["params"]) == {"stop": ["<|end|>"], "temperature": 0.5}
    fetched = Path(snapshot_download(REPO, cache_dir=tmp_path / "fetched"))  # as a user does it
    assert (fetched / "model.safetensors").read_bytes() == WEIGHTS


def _version() -> str:
    from ollama_forge import __version__

    return __version__


def test_the_card_keeps_its_metadata_and_lists_the_files(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    card = ModelCard(files_of(contents("m", REPO, folder=folder))["README.md"].decode())
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "library_name": "transformers",
        "tags": ["abliteration", "gguf"],
    }
    assert card.text.strip().startswith("# base, edited")
    assert "`m-Q4_K_M.gguf`" in card.text
    assert f"ollama run hf.co/{REPO}" in card.text
    assert "apply --model org/base --edit FILE" in card.text
    alone = ModelCard(files_of(contents("m", REPO, folder=folder, only=["report"]))["README.md"].decode())
    assert "library_name" not in alone.data.to_dict()
    assert "gguf" not in alone.text


def test_an_adapter_alone_gets_a_card_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made(name="m", model="ollama:smol", folder=folder)
    write(folder, {"m-adapter.gguf": GGUF, "Modelfile": b"FROM smol\nADAPTER ./m-adapter.gguf\n"})
    made(name="m", model="ollama:smol", folder=folder).save()
    found = files_of(contents("m", REPO, folder=folder))
    assert set(found) == {"m-adapter.gguf", "Modelfile", "report.html", "report.json", "README.md"}
    assert "An edit of `ollama:smol`" in found["README.md"].decode()


def test_no_folder_of_this_machine_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-someone"))
    source = tmp_path / "secret place" / "base"
    problem = f"cannot read {tmp_path / 'home-of-someone' / 'x.gguf'}: no such file"
    folder = finished(tmp_path / "run", model=str(source), ollama_problem=problem)
    report = json.loads(files_of(contents("m", REPO, folder=folder))["report.json"])
    assert report["model"] == "org/base"
    assert report["ollama"]["problem"] == "cannot read x.gguf: no such file"
    for path, data in files_of(contents("m", REPO, folder=folder)).items():
        assert str(tmp_path).encode() not in data, path
        assert b"someone" not in data, path


def test_a_push_goes_on_where_it_was_interrupted(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    last = hashlib.sha256(GGUF).hexdigest()
    hub.fault = lambda method, path: (400, "cut off") if path == f"/objects/{last}" else None
    with pytest.raises(ForgeError, match="cut off") as caught:
        push(folder)
    assert "not sent again" in caught.value.hint
    assert set(hub.repositories[REPO].files) == {".gitattributes"}  # nothing that looks finished
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.puts
    hub.fault = lambda method, path: None
    push(folder)
    assert len(hub.puts) == len(set(hub.puts))
    assert hub.repositories[REPO].files["m-Q4_K_M.gguf"] == GGUF


def test_what_is_there_already_is_not_sent_again(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    push(folder, only=["checkpoint"])
    assert "m-Q4_K_M.gguf" not in hub.repositories[REPO].files
    found = compare(contents("m", REPO, folder=folder))
    assert {file.part for file in found.send} == {"gguf", "edit", "report"}
    assert found.equal == len(CHECKPOINT) - 1
    assert found.kept  # the card of the first push lists fewer files, but may have been edited by hand
    upload(found)
    commits = len(hub.repositories[REPO].commits)
    url = push(folder)
    assert len(hub.repositories[REPO].commits) == commits
    assert url.endswith(hub.repositories[REPO].head)


def test_a_repository_with_other_content_is_left_alone(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    theirs = {
        "config.json": CHECKPOINT["config.json"].replace(b"llama", b"other"),  # of the same size
        "model.safetensors": b"v" * len(WEIGHTS),
        "model-00002-of-00002.safetensors": b"old",
        "logo.png": b"p",
        "README.md": b"mine",
    }
    before = dict(hub.create(REPO, theirs).files)
    with pytest.raises(ForgeError, match=r"holds other content: config\.json, model\.safetensors$") as caught:
        push(folder)
    assert "--replace" in caught.value.hint
    assert hub.repositories[REPO].files == before
    push(folder, replace=True)
    files = hub.repositories[REPO].files
    assert files["config.json"] == CHECKPOINT["config.json"]
    assert b"base, edited" in files["README.md"]
    assert files["logo.png"] == b"p"
    assert "model-00002-of-00002.safetensors" not in files  # a loader would take it for a part of the model


def test_a_public_repository_is_asked_about(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    hub.create(REPO, private=False)
    with pytest.raises(ForgeError, match="exists and is public"):
        push(folder)
    push(folder, public=True)
    push(folder, "lab/m", public=True)
    assert not hub.repositories["lab/m"].private


def test_a_commit_of_someone_else_in_between_is_kept(tmp_path: Path, hub: Hub) -> None:
    folder = finished(tmp_path / "run")
    repository = hub.create(REPO)
    found = compare(contents("m", REPO, folder=folder))
    repository.commit("theirs", {**repository.files, "config.json": b"theirs"})
    with pytest.raises(ForgeError, match="has changed in the meantime"):
        upload(found)
    assert repository.files["config.json"] == b"theirs"


def test_files_that_the_repository_ignores_are_missed(tmp_path: Path, hub: Hub) -> None:
    hub.create(REPO, {".gitignore": b"config.json\n"})
    with pytest.raises(ForgeError, match=r"lacks 1 of the 14 files that were sent, such as config\.json"):
        push(finished(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HF_TOKEN": ""}, "there is no token"),
        ({"HF_TOKEN": "hf_forged_token_123"}, "does not accept the token"),
        ({"repo": "bob/m"}, "may not write to bob's"),
        ({"role": "read"}, "the token may read only"),
        ({"fault": 403}, r"does not let this token write to alice/m: no for \*\*\*"),
        ({"fault": 418}, r"could not be reached or written: no for \*\*\*"),
    ],
)
def test_a_token_that_may_not_write(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    token = change.get("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN", token)
    if "role" in change:
        hub.accounts[TOKEN] = writable_hub.account("alice", role="read")
    if "fault" in change:  # with the token in the answer, as a careless proxy might do
        hub.fault = lambda method, path: (change["fault"], f"no for {TOKEN}") if path.endswith("/create") else None
    with pytest.raises(ForgeError, match=message) as caught:
        push(finished(tmp_path / "run"), change.get("repo", REPO))
    text = caught.value.message + caught.value.hint
    assert "\n" not in text
    assert not token or token not in text
    assert not hub.repositories


def test_a_hub_that_does_not_answer(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ForgeError, match="could not be reached"):
        push(finished(tmp_path / "run"))


@pytest.mark.parametrize("repo", ["m", "a/b/c", "alice/", "https://hub/alice/m", "alice/m n"])
def test_names_of_repositories(tmp_path: Path, hub: Hub, repo: str) -> None:
    with pytest.raises(UsageError, match="is no repository of the Hub"):
        push(finished(tmp_path / "run"), repo)


def test_runs_that_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="there is no run in"):
        contents("m", REPO, folder=tmp_path / "none")
    folder = finished(tmp_path / "run")
    with pytest.raises(UsageError, match="--only weights is no part"):
        contents("m", REPO, folder=folder, only=["weights"])
    with pytest.raises(ForgeError, match="none of adapter"):
        contents("m", REPO, folder=folder, only=["adapter"])
    report = json.loads((folder / "report.json").read_text())
    report["verification"]["passed"] = False
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(ForgeError, match="failed its verification"):
        contents("m", REPO, folder=folder)
    (folder / "report.json").unlink()
    with pytest.raises(ForgeError, match="is not finished"):
        contents("m", REPO, folder=folder)


def test_the_command_shows_first_and_sends_when_told(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "abliterate-m")
    monkeypatch.chdir(tmp_path)
    command = ["abliterate", "push", "--name", "m", "--repo", REPO]

    def told(*options: str) -> str:
        cli.main([*command, *options], standalone_mode=False)
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return shown.out

    shown = told()
    assert not hub.repositories
    assert "model.safetensors (3.0 KB)" in shown
    assert "a new repository, private" in shown
    assert shown.splitlines()[-1] == "nothing was sent; the same command with --upload sends it"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = run("-m", "ollama_forge.cli.main", *command, "--upload", cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert hub.repositories[REPO].files["model.safetensors"] == WEIGHTS
    assert f"published: {hub.url}/{REPO}/commit/{hub.repositories[REPO].head}" in done.stdout
    assert "ollama cp m USER/m, then ollama push USER/m" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    again = json.loads(told("--json"))
    assert again["commit"] is None
    assert not any(file["send"] for file in again["files"])

"""Names that come from elsewhere stay in their folder, links are not followed out of it, and secrets stay unlogged."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import companions
from ollama_forge.checkpoints.tensors import INDEX_NAME, index_shards
from ollama_forge.edits.source_files import source_entry
from ollama_forge.edits.undo_file import read_undo
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import is_inside, leads_out
from ollama_forge.publishing.contents import contents
from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.sentence_modules import SentenceModules
from ollama_forge.sources.ollama_store import find_model
from tests.command_line import Call
from tests.loopback import loopback, scripted
from tests.ollama_store import Store
from tests.test_api_security import CHAT, call

OUTSIDE = (
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "..\\secret",
    "C:\\secret",
    "C:secret",
    "\\\\host\\secret",
    "..",
)
links = pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_index_names_a_file_outside(name: str, tmp_path: Path) -> None:
    assert not is_inside(name)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "b.safetensors", "b": name}}))
    with pytest.raises(ForgeError, match="names a file outside its folder"):
        index_shards(tmp_path / INDEX_NAME)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_module_lies_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "models.Dense", "path": name}]))
    with pytest.raises(ForgeError, match="does not list modules of this model"):
        SentenceModules.of(Checkpoint(tmp_path, "label", "folder"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_undoing_writes_and_reads_nothing_outside(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    described = json.dumps({"format": 1, "files": [[name, "0" * 64, []]]})
    save_file({}, tmp_path / "x.undo", {"undo": described})
    with pytest.raises(ForgeError, match="is not an undo file"):
        read_undo(tmp_path / "x.undo")
    source = {"model": "a", "kind": "hub", "fingerprint": "f", "files": {name: "0"}}
    (tmp_path / "abliteration.json").write_text(json.dumps({"source": source}))
    with pytest.raises(ForgeError, match="does not name the hashes"):
        source_entry(tmp_path)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", f"sha256:{'../' * 21}a", "/etc/passwd", "sha256:"])
def test_no_digest_leaves_the_store(digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest = Store(tmp_path).add("a", model=b"GGUF")
    told = json.loads(manifest.read_text())
    told["layers"][0]["digest"] = digest
    manifest.write_text(json.dumps(told))
    with pytest.raises(ForgeError, match="the manifest of a:latest is damaged"):
        find_model("a")
    with pytest.raises(UsageError):
        find_model("../a")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "..", "a:../x", "a/b/../c", "~/x"])
def test_no_option_names_a_run_outside(name: str, forge: Call) -> None:
    said = forge("abliterate", "run", "--model", "no-such-model", "--name", name)
    assert said.status == 2
    assert "is not a valid model name" in said.err


@links
def test_no_link_out_of_a_model_is_copied(tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    secret.write_text("token")
    (model / "config.json").write_text("{}")
    (model / "vocab.txt").symlink_to(model / "config.json")
    assert companions(model) == ["config.json", "vocab.txt"]
    (model / "merges.txt").symlink_to(secret)
    with pytest.raises(ForgeError, match=r"merges\.txt is a link out of the model's folder"):
        companions(model)


@links
def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(Path("../../blobs/0123"))
    assert companions(snapshot) == ["config.json"]
    assert not leads_out(snapshot / "config.json", snapshot)


@links
def test_no_link_out_of_a_run_is_published(tmp_path: Path) -> None:
    run, secret = tmp_path / "abliterate-x", tmp_path / "secret"
    (run / "checkpoint").mkdir(parents=True)
    secret.write_text("token")
    (run / "report.json").write_text(json.dumps({"model": "a/b", "verification": {"passed": True}}))
    (run / "checkpoint" / "notes.txt").symlink_to(secret)
    with pytest.raises(ForgeError, match=r"notes\.txt is a link out of its folder, so it is not published"):
        contents("x", "a/x", folder=run)


def test_names_from_files_cannot_control_the_terminal() -> None:
    error = ForgeError("a \x1b[2J\n\u202e name of é 中", "b\r")
    assert (error.message, error.hint) == (r"a \x1b[2J\n\u202e name of é 中", r"b\r")
    assert str(error) == error.message


def test_keys_are_not_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    headers: list[dict[str, str]] = [{"Authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}]
    headers += [{"Authorization": "Bearer wr0ng"}, {"x-api-key": "wr0ng"}]
    answers = b""
    with (
        caplog.at_level(logging.DEBUG),
        loopback(scripted(lambda *_: "hello"), ServeSettings(api_key="s3cret")) as url,
    ):
        for header in headers:
            for path in ("/api/chat", "/v1/messages", "/api/tags?key=s3cret", "/nothing?token=wr0ng"):
                answers += call(url, "POST", path, CHAT, header)[2]
    printed = "".join(capfd.readouterr()) + caplog.text + answers.decode()
    assert "s3cret" not in printed
    assert "wr0ng" not in printed

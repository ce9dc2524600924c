"""What --model may name: folders, files, and Hub ids, these against a stand-in of the Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ollama_forge.architectures.described import map_checkpoint
from ollama_forge.checkpoints.resolve import resolve
from ollama_forge.errors import ForgeError
from tests import tiny

TOKEN = "hf_stand_in_token"
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("model") / "tiny-llama").folder


# On disk


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(str(folder))
    assert (checkpoint.folder, checkpoint.kind, checkpoint.revision) == (folder.resolve(), "folder", None)
    assert map_checkpoint(checkpoint).n_layers == 4
    monkeypatch.chdir(folder.parent)
    relative = resolve(folder.name)
    assert (relative.folder, relative.label) == (folder.resolve(), folder.name)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}").folder == folder.resolve()


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ForgeError, match=r"not a model folder: it has no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "config.json", "empty.gguf"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("" if name.startswith("empty") else "GGML? no.\n")
    with pytest.raises(ForgeError, match="is not a GGUF file"):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    "model",
    [
        *("/nowhere/at/all", "./nowhere", "../x", "nowhere.gguf", "owner/nowhere.gguf", "a/b/c"),
        *("white space", "nul\0", "é", "~no_such_user/model", "long" * 100, "owner/" + "long" * 100),
    ],
)
def test_what_is_nowhere_is_one_error(model: str) -> None:
    """None of these gets as far as a request."""
    with pytest.raises(ForgeError):
        resolve(model)


@pytest.mark.parametrize("model", ["owner/na--me", "owner/na..me", "owner/-name", "owner/name.git"])
def test_what_the_hub_could_not_have_is_one_error(model: str) -> None:
    with pytest.raises(ForgeError, match="neither a folder here nor a Hub id"):
        resolve(model)


@pytest.mark.parametrize("kind", ["folder", "file", "demo", "demo-base"])
def test_a_revision_is_for_the_hub_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    model = {"folder": str(folder), "file": str(file)}.get(kind, kind)
    with pytest.raises(ForgeError, match="--revision has no meaning"):
        resolve(model, "main")


def test_a_folder_named_demo_is_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert resolve("demo").kind == "folder"


# On the Hub


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """The stand-in: its address, its repositories, and the requests it has seen."""

    url: str
    repositories: dict[str, Repository]
    seen: list[str] = field(default_factory=list)

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        asked = [line.split("/resolve/", 1) for line in self.seen if line.startswith("GET")]
        return {parts[1].split("/", 1)[1] for parts in asked if len(parts) == 2}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/" if api else "/").split("/")
        repository, rest = self.hub.repositories.get("/".join(parts[:2])), parts[2:]
        token = self.headers.get("Authorization", "")
        if repository is None or (repository.private and token != f"Bearer {TOKEN}"):
            return self.fail(401 if not token else 404, "RepoNotFound")
        if len(rest) < 2:
            rest = ["revision", "main"]
        commit = repository.revisions.get(rest[1])
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        if api and rest[0] == "revision":
            siblings = [{"rfilename": name} for name in repository.files]
            return self.answer(json.dumps({"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings}).encode())
        if api:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in repository.files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if repository.gated:  # as on the Hub: what there is may be seen, files not be had
            return self.fail(401 if not token else 403, "GatedRepo")
        data = repository.files.get("/".join(rest[2:]))
        if data is None:
            return self.fail(404, "EntryNotFound")
        return self.answer(data, commit)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data: bytes, commit: str | None = None) -> None:
        first, last = 0, len(data)
        wanted = self.headers.get("Range")
        if wanted:
            begin, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end) + 1, len(data)) if end else len(data)
        self.send_response(206 if wanted else 200)
        if commit is not None:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
        else:
            self.send_header("Content-Type", "application/json")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        self.send_header("Content-Length", str(last - first))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[first:last])


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain = {
        **whole,
        "README.md": b"# tiny",
        "pytorch_model.bin": b"pickle",
        "tiny.gguf": b"GGUF",
        "onnx/model.safetensors": whole["model.safetensors"],
        "original/params.json": b"{}",
    }
    revisions = {"main": COMMIT, "v2": OTHER_COMMIT, COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT}
    repositories = {
        "owner/tiny": Repository(plain, revisions),
        "owner/gated": Repository(whole, gated=True),
        "owner/private": Repository(whole, private=True),
    }
    handler = type("BoundHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.hub  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from ollama_forge.architectures.described import map_checkpoint
from ollama_forge.checkpoints.resolve import resolve
from ollama_forge.errors import ForgeError
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        found = resolve(model, revision)
        files = sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file())
        answers.append({"folder": str(found.folder), "label": found.label, "kind": found.kind,
                        "revision": found.revision, "files": files, "layers": map_checkpoint(found).n_layers})
    except ForgeError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""


def ask(home: Path, endpoint: str, *questions: tuple[str, str | None], **extra: str) -> list[dict[str, Any]]:
    """resolve() in a process of its own, as huggingface_hub reads its settings once; one answer a question."""
    aside = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(aside) and "proxy" not in key.lower()}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(questions)],
        env={**kept, **settings, **extra},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_hub_model_is_fetched_once_and_then_had_offline(hub: Hub, tmp_path: Path) -> None:
    (first,) = ask(tmp_path, hub.url, ("owner/tiny", None))
    assert first["revision"] == COMMIT
    assert (first["kind"], first["label"], first["layers"]) == ("hub", "owner/tiny", 4)
    assert Path(first["folder"]).is_relative_to(tmp_path)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"chat_template.jinja"} == set(first["files"]) == hub.fetched
    content = (Path(first["folder"]) / "model.safetensors").read_bytes()
    assert content == hub.repositories["owner/tiny"].files["model.safetensors"]
    hub.seen.clear()
    assert ask(tmp_path, hub.url, ("owner/tiny", None)) == [first]
    assert hub.fetched == set()
    hub.seen.clear()
    assert ask(tmp_path, hub.url, ("owner/tiny", None), HF_HUB_OFFLINE="1") == [first]
    assert hub.seen == []


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    branch, commit, unknown, no_commit = ask(
        tmp_path, hub.url, *(("owner/tiny", revision) for revision in ("v2", OTHER_COMMIT, "v3", "c" * 40))
    )
    assert branch["revision"] == commit["revision"] == OTHER_COMMIT
    assert branch["folder"] == commit["folder"]
    for answer, revision in ((unknown, "v3"), (no_commit, "c" * 40)):
        assert answer["message"] == f"owner/tiny has no revision '{revision}'"
        assert "branch, tag or commit" in answer["hint"]


def test_refusals_of_the_hub_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    unknown, private, gated = ask(
        tmp_path, hub.url, ("owner/none", None), ("owner/private", None), ("owner/gated", None)
    )
    assert "there is no model 'owner/none' on the Hub" in unknown["message"]
    assert "there is no model 'owner/private' on the Hub (or it is private)" in private["message"]
    assert "set HF_TOKEN" in private["hint"]
    assert gated["message"] == "access to owner/gated is restricted"
    assert "accept its terms" in gated["hint"]
    assert "HF_TOKEN" in gated["hint"]


def test_a_token_opens_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    private, gated = ask(tmp_path, hub.url, ("owner/private", None), ("owner/gated", None), HF_TOKEN=TOKEN)
    assert (private["revision"], private["layers"]) == (COMMIT, 4)
    assert gated["message"] == "access to owner/gated is restricted"
    other = tmp_path / "other"
    other.mkdir()
    (wrong,) = ask(other, hub.url, ("owner/private", "v9"), HF_TOKEN="hf_another")
    assert "private" in wrong["message"]
    assert "hf_another" not in json.dumps(wrong)


def test_without_the_hub_an_unknown_model_is_not_in_the_cache(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    (offline,) = ask(tmp_path, closed, ("owner/tiny", None), HF_HUB_OFFLINE="1")
    (unreachable,) = ask(tmp_path, closed, ("owner/tiny", None))
    for answer in (offline, unreachable):
        assert answer["message"] == "owner/tiny is not in the local cache, and the Hub cannot be reached"
        assert "HF_HUB_OFFLINE" in answer["hint"]


def test_half_a_download_is_not_taken_for_a_model(hub: Hub, tmp_path: Path) -> None:
    (first,) = ask(tmp_path, hub.url, ("owner/tiny", None))
    (Path(first["folder"]) / "model.safetensors").unlink()
    (offline,) = ask(tmp_path, hub.url, ("owner/tiny", None), HF_HUB_OFFLINE="1")
    assert "not in the local cache" in offline["message"]
    hub.seen.clear()
    assert ask(tmp_path, hub.url, ("owner/tiny", None)) == [first]
    assert hub.fetched <= {"model.safetensors"}

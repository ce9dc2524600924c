"""A stand-in for the Hugging Face Hub on loopback: listings, files, byte ranges, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.http_servers import QuietServer

TOKEN = "hf_stand_in_token"
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
REVISIONS = {"main": COMMIT, "v2": OTHER_COMMIT, COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT}


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    private: bool = False
    gated: bool = False
    base_model: str | None = None
    ranges: bool = True  # whether a part of a file can be asked for
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that the listing gives in place of the files' own


@dataclass
class Hub:
    """The stand-in: its address, its repositories, and the requests it has seen."""

    url: str
    repositories: dict[str, Repository]
    seen: list[str] = field(default_factory=list)
    sent: int = 0  # bytes of answers
    whole: set[str] = field(default_factory=set)  # names of the files that were sent whole

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
            sizes = {name: len(data) for name, data in repository.files.items()} | repository.claimed
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            about = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings}
            return self.answer(json.dumps({**about, "cardData": {"base_model": repository.base_model}}).encode())
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
        if "Range" not in self.headers or not repository.ranges:
            self.hub.whole.add(rest[-1])
        return self.answer(data, commit, ranges=repository.ranges)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data: bytes, commit: str | None = None, *, ranges: bool = True) -> None:
        first, last = 0, len(data)
        wanted = self.headers.get("Range") if ranges else None
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
            self.hub.sent += last - first
            self.wfile.write(data[first:last])


@contextmanager
def serving(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve the repositories while the block runs."""
    handler = type("BoundHandler", (Handler,), {})
    server = QuietServer(("127.0.0.1", 0), handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", dict(repositories))
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(home: Path, endpoint: str, **extra: str) -> dict[str, str]:
    """The environment of a process that asks this Hub; huggingface_hub reads its settings once, at import."""
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
    return {**kept, **settings, **extra}


def ask_in_process(
    script: str, home: Path, endpoint: str, *questions: tuple[str, str | None], **extra: str
) -> list[dict[str, Any]]:
    """Run a script in a process of its own, as huggingface_hub reads its settings once; it prints an answer a question.

    Args:
        script: takes the questions, each a model and a revision, as JSON in its first argument.
        extra: further environment variables.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(questions)],
        env=environment(home, endpoint, **extra),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

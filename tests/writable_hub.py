"""A stand-in for the Hub on loopback that can be written to: repositories with commits, large files by Git LFS.

It speaks what huggingface_hub needs to create a repository, to send files in one commit and to fetch them again.
Commits are trees of contents; large objects become part of a tree only with a commit, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.http_servers import QuietServer

TOKEN = "hf_writer_token_4711"
LARGE = 1000  # bytes from which a file is a large one, besides those of these types
LARGE_TYPES = (".safetensors", ".gguf", ".pt")


@dataclass
class Repository:
    """Its commits, oldest first: id, message, and content by path."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((name, message, files))
        return name


@dataclass
class Hub:
    """The stand-in.

    Attributes:
        accounts: what ``whoami`` answers, by token.
        objects: large objects that have arrived, by SHA-256.
        puts: SHA-256 of each large object that was sent, in order.
        fault: called with method and path of each request; a status and a text to answer with, or None.
        seen: method and path of each request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    fault: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
    seen: list[str] = field(default_factory=list)

    def create(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = True) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit("initial commit", {".gitattributes": b"*.gguf filter=lfs\n", **(files or {})})
        return repository


def account(name: str, *organisations: str, role: str = "write") -> dict[str, Any]:
    orgs = [{"name": org, "type": "org"} for org in organisations]
    return {"name": name, "type": "user", "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}


def is_large(path: str, size: int) -> bool:
    return size >= LARGE or path.endswith(LARGE_TYPES)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    def do_HEAD(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.seen.append(f"{self.command} {path}")
        fault = hub.fault(self.command, path)
        if fault is not None:
            return self.answer({"error": fault[1]}, fault[0], message=fault[1])
        if path.startswith("/objects/"):  # presigned on the Hub: without a token
            return self.put_object(path.removeprefix("/objects/"), body)
        who = hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if who is None:
            return self.answer({"error": "Invalid credentials"}, 401, message="Invalid credentials in Authorization")
        if path == "/api/whoami-v2":
            return self.answer(who)
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(who, json.loads(body))
        return self.of_repository(path, body)

    def create(self, who: dict[str, Any], wanted: dict[str, Any]) -> None:
        owner = wanted["organization"] or who["name"]
        if owner not in [who["name"], *(org["name"] for org in who["orgs"])]:
            return self.answer({"error": "no rights"}, 403, message=f"You don't have the rights to write to {owner}")
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "exists"}, 409, message="You already created this model repo")
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.create(name, private=bool(private))
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def of_repository(self, path: str, body: bytes) -> None:
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, code="RepoNotFound")
        match rest:
            case ["preupload", _]:
                return self.preupload(repository, json.loads(body))
            case ["info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(body))
            case ["commit", _]:
                return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
            case ["resolve", _, *file]:
                return self.send_file(repository, "/".join(file))
            case ["tree", _]:
                return self.answer([self.in_tree(path, data) for path, data in repository.files.items()])
        siblings = [self.listed(path, data) for path, data in repository.files.items()]
        return self.answer({"id": name, "sha": repository.head, "private": repository.private, "siblings": siblings})

    def listed(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"rfilename": path, "size": len(data), "blobId": git_id(data)}
        if not is_large(path, len(data)):
            return entry
        digest = hashlib.sha256(data).hexdigest()
        return {**entry, "lfs": {"sha256": digest, "size": len(data), "pointerSize": 130}}

    def in_tree(self, path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}

    def preupload(self, repository: Repository, wanted: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": file["path"] in repository.files.get(".gitignore", b"").decode().splitlines(),
            }
            for file in wanted["files"]
        ]
        self.answer({"files": files})

    def batch(self, wanted: dict[str, Any]) -> None:
        answers = []
        for item in wanted["objects"]:
            known = item["oid"] in self.hub.objects
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}}
            answers.append({**item, **({} if known else upload)})
        self.answer({"transfer": "basic", "objects": answers})

    def put_object(self, name: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != name:
            return self.answer({"error": "checksum"}, 400, message="the content is not that of this name")
        self.hub.objects[name] = data
        self.hub.puts.append(name)
        return self.answer({})

    def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        files, header = dict(repository.files), lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.head):
            return self.answer({"error": "changed"}, 412, message="A commit has happened since")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        commit = repository.commit(header["summary"], files)
        return self.answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        )

    def send_file(self, repository: Repository, path: str) -> None:
        data = repository.files[path]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.head)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self, value: Any, status: int = 200, *, code: str = "", message: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for header, text in (("X-Error-Code", code), ("X-Error-Message", message)):
            if text:
                self.send_header(header, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub, with an account ``alice`` of the organisation ``lab``, while the block runs."""
    handler = type("BoundHandler", (Handler,), {})
    server = QuietServer(("127.0.0.1", 0), handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", accounts={TOKEN: account("alice", "lab")})
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

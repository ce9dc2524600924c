"""A fake Ollama server on loopback: it answers as recorded in `wire/create.jsonl`, and keeps the requests it gets."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from tests import go_template
from tests.http_servers import QuietServer

WIRE = Path(__file__).parent / "wire"
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
CHATML_STOP = ["<|im_start|>", "<|im_end|>"]
NONE = "{{ .Prompt }}"


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (WIRE / name).read_text(encoding="utf-8").splitlines()]


def given(body: dict[str, Any]) -> dict[str, Any]:
    """A request without what means "not given" on this wire."""
    return {key: value for key, value in body.items() if value not in ("", None, False)}


@dataclass
class Model:
    """As in the store; ``template`` is None where there is no such layer, projectors follow the model's weights."""

    weights: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    template: str | None = None
    system: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    licenses: list[str] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    requires: str = ""
    drafts: list[str] = field(default_factory=list)
    jinja: str = ""  # the chat template in the file


class Failure(Exception):  # noqa: N818
    pass


class FakeOllama:
    """Models and blobs, and the ways in which it misbehaves.

    Attributes:
        seen: every request: method, path, JSON body (None for blobs).
        pause: create's answer waits for it before each line.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.version = "0.14.2"
        self.server_header = ""
        self.ends_with_error = ""
        self.stops_without_success = False
        self.ignores_renderers = False
        self.drops_projectors = False
        self.drops_adapters = False
        self.renderer_of_its_own = ""
        self.breaks_after: int | None = None
        self.blob_status = 0
        self.knows_debugging = True
        self.unreadable = "{% unreadable"
        self.silence = ""
        self.misread = ""
        self.pause = threading.Event()
        self.pause.set()
        self.url = ""

    def bodies(self, path: str) -> list[Any]:
        return [body for _, at, body in self.seen if at == path]

    def blob_requests(self) -> list[str]:
        return [method for method, path, _ in self.seen if path.startswith("/api/blobs/")]

    def keep(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def make(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of an answer to create."""
        try:
            if body.get("from"):
                model = copy.deepcopy(self.models[full(body["from"])])
                yield from (layer(digest) for digest in model.weights)
            else:
                model = Model()
                yield from self._from_files(body, model)
            if len(body.get("adapters", {})) > 1:
                raise Failure("only one adapter is currently supported")
            model.adapters += [] if self.drops_adapters else body.get("adapters", {}).values()
            yield from self._layers(body, model)
        except Failure as error:
            yield {"error": str(error)}
            return
        if self.ends_with_error:
            yield {"error": self.ends_with_error}
            return
        yield {"status": "writing manifest"}
        if not self.stops_without_success:
            self.models[full(body["model"])] = model
            yield {"status": "success"}

    def _from_files(self, body: dict[str, Any], model: Model) -> Iterator[dict[str, Any]]:
        for digest in body.get("files", {}).values():
            yield {"status": "parsing GGUF"}
            if digest not in self.blobs:
                raise Failure(f"open /models/blobs/{digest.replace(':', '-')}: no such file or directory")
            data = self.blobs[digest]
            if b"mmproj" in data[:200]:
                model.weights += [] if self.drops_projectors else [digest]
                continue
            if body.get("quantize") and file_type(data) not in (0, 1, 32):
                raise Failure("quantization is only supported for F16, BF16 and F32 models")
            if body.get("quantize"):
                yield from ({"status": "quantizing", "total": 5_000_000, "completed": n * 1_000_000} for n in range(6))
            yield {"status": "verifying conversion"}
            if body.get("template", "").startswith("{%"):
                raise Failure("template error: template: :2: malformed character constant: '<|im_start|>system\\n'")
            stored = self.keep(b"rewritten " + data)
            yield layer(stored)
            model.weights.insert(0, stored)
            model.jinja = chat_template_of(data)
            if "<|im_start|>" in model.jinja and not knows_more(model.jinja) and not begins_with_comment(model.jinja):
                model.template, model.parameters = CHATML, {"stop": CHATML_STOP}
                if not body.get("template"):
                    yield {"status": "using autodetected template chatml"}
        model.drafts = list(body.get("draft_files", {}).values())

    def _layers(self, body: dict[str, Any], model: Model) -> Iterator[dict[str, Any]]:
        if not self.ignores_renderers:
            model.renderer = body.get("renderer") or model.renderer or self.renderer_of_its_own
            model.parser = body.get("parser") or model.parser
        model.requires = body.get("requires") or model.requires
        for part in ("template", "system", "messages"):
            if body.get(part):
                setattr(model, part, body[part])
                yield layer(part)
        if body.get("license"):
            model.licenses += [body["license"]] if isinstance(body["license"], str) else body["license"]
            yield layer("license")
        model.parameters = {**model.parameters, **body.get("parameters", {})}
        if model.parameters:
            yield layer("parameters")

    def show(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        texts: list[tuple[str, str]] = [("TEMPLATE", model.template or NONE)]
        texts += [(part.upper(), getattr(model, part)) for part in ("system", "renderer", "parser")]
        lines = [*(f"FROM /models/blobs/{digest.replace(':', '-')}" for digest in model.weights[:1])]
        lines += [f"ADAPTER /models/blobs/{digest.replace(':', '-')}" for digest in model.adapters]
        lines += [f"DRAFT /models/blobs/{digest.replace(':', '-')}" for digest in model.drafts]
        lines += [f"FROM /models/blobs/{digest.replace(':', '-')}" for digest in model.weights[1:]]
        lines += [f"{command} {quote(text)}" for command, text in texts if text]
        single = [(k, v) for key, held in model.parameters.items() for k, v in spread(key, held)]
        lines += [f"PARAMETER {key} {quote(plain(value))}" for key, value in single]
        lines += [f"LICENSE {quote(text)}" for text in model.licenses]
        lines += [f"MESSAGE {each['role']} {quote(each['content'])}" for each in model.messages]
        head = '# Modelfile generated by "ollama show"\n# To build a new Modelfile based on this, replace FROM with:\n'
        answer = {
            "license": "\n".join(model.licenses),
            "modelfile": f"{head}# FROM {name}\n\n" + "".join(f"{line}\n" for line in lines),
            "parameters": "\n".join(f"{key:<30} {go(value)}" for key, value in single),
            "template": model.jinja if by_file(model) else model.template or NONE,
            "system": model.system,
            "messages": model.messages,
            "requires": model.requires,
        }
        rest = {
            "details": {"parent_model": "", "format": "gguf", "family": "llama", "quantization_level": "Q4_1"},
            "model_info": {"general.architecture": "llama"},
            "capabilities": [
                *(["tools"] if by_file(model) and "tools" in model.jinja else []),
                "completion",
                *(["vision"] if model.weights[1:] else []),
            ],
        }
        return {**{key: value for key, value in answer.items() if value}, **rest}

    def chat(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of ``/api/chat``."""
        model = self.models[full(body["model"])]
        if self.silence:
            return 500, {"error": self.silence}
        if self.unreadable in model.jinja and (by_file(model) or knows_more(model.jinja)):
            return 500, {"error": "llama-server: Unable to generate parser for this template"}
        if not (body.get("_debug_render_only") and self.knows_debugging):
            if self.misread:
                return 500, {"error": self.misread}
            return 200, {"model": body["model"], "message": {"role": "assistant", "content": "Hello."}, "done": True}
        messages = [*model.messages, *body["messages"]]
        if model.system and body["messages"][0]["role"] != "system":
            messages = [{"role": "system", "content": model.system}, *messages]
        if not by_file(model):
            rendered = rendered_go(model.template or NONE, messages) if not model.renderer else f"<{model.renderer}>"
        else:
            try:
                rendered = rendered_jinja(model.jinja, messages, body.get("tools"))
            except jinja2.TemplateError as error:
                return 500, {"error": str(error)}
        return 200, {"model": body["model"], "done": False, "_debug_info": {"rendered_template": rendered}}


def by_file(model: Model) -> bool:
    """Whether Ollama goes by the chat template in the file."""
    if model.renderer or not model.jinja:
        return False
    return model.template is None or knows_more(model.jinja)


def knows_more(jinja: str) -> bool:
    return "tools" in jinja or ("<think>" in jinja and "</think>" in jinja)


def begins_with_comment(jinja: str) -> bool:
    return jinja.startswith("{#") and jinja.find("#}") > 100


def rendered_go(template: str, messages: list[dict[str, str]]) -> str:
    try:
        return go_template.render(template, messages)
    except (AssertionError, KeyError, ValueError):  # a template that is no chat template
        return template


def rendered_jinja(jinja: str, messages: list[dict[str, str]], tools: Any) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(jinja)
    tools = [ordered(tool) for tool in tools or ()] or None
    return template.render(messages=messages, tools=tools, add_generation_prompt=True, bos_token="<s>")


def ordered(tool: Any) -> Any:
    """A tool with the keys of its schema in the order in which Ollama writes them."""
    schema = tool["function"]["parameters"]
    parameters = {key: schema[key] for key in ("type", "required", "properties") if key in schema}
    return {**tool, "function": {**tool["function"], "parameters": parameters}}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def chat_template_of(data: bytes) -> str:
    """The chat template in the metadata of a GGUF file."""
    key = b"tokenizer.chat_template"
    place = data.find(key)
    if place < 0:
        return ""
    start = place + len(key) + 12
    (size,) = struct.unpack_from("<Q", data, start - 8)
    return data[start : start + size].decode()


def full(name: str) -> str:
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def layer(what: str) -> dict[str, Any]:
    return {"status": f"creating new layer sha256:{hashlib.sha256(what.encode()).hexdigest()}"}


def spread(key: str, held: Any) -> list[tuple[str, Any]]:
    return [(key, value) for value in held] if isinstance(held, list) else [(key, held)]


def plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def go(value: Any) -> str:
    """As Go's %#v prints it."""
    if not isinstance(value, str):
        return plain(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    letters = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\v": "\\v", "\f": "\\f", "\a": "\\a", "\b": "\\b"}
    return '"' + "".join(letters.get(c, c if c.isprintable() else _escape(c)) for c in escaped) + '"'


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote(text: str) -> str:
    """As Ollama quotes in the Modelfiles it shows: not always so that they can be read again."""
    if "\n" in text or text.startswith(" ") or text.endswith(" "):
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


def file_type(data: bytes) -> int:
    place = data.find(b"general.file_type")
    return -1 if place < 0 else int(struct.unpack_from("<I", data, place + len(b"general.file_type") + 4)[0])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeOllama

    def version_string(self) -> str:
        return self.fake.server_header

    def send_response(self, code: int, message: str | None = None) -> None:
        self.send_response_only(code, message)
        if self.fake.server_header:
            self.send_header("Server", self.fake.server_header)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.seen.append(("GET", self.path, None))
        answers = {
            "/api/version": {"version": self.fake.version},
            "/api/tags": {"models": [{"name": name} for name in self.fake.models]},
        }
        self.answer(200, answers.get(self.path, {}))

    def do_HEAD(self) -> None:
        self.fake.seen.append(("HEAD", self.path, None))
        known = self.path.removeprefix("/api/blobs/") in self.fake.blobs
        self.send_response(self.fake.blob_status or (200 if known else 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if self.path.startswith("/api/blobs/"):
            self.fake.seen.append(("POST", self.path, None))
            self.take_blob(length)
            return
        body = json.loads(self.rfile.read(length))
        self.fake.seen.append(("POST", self.path, body))
        if self.path == "/api/show":
            name = full(body.get("model") or body.get("name"))
            if name not in self.fake.models:
                self.answer(404, {"error": f"model '{name}' not found"})
            else:
                self.answer(200, self.fake.show(name))
        elif self.path == "/api/generate":
            self.answer(200, {"model": body["model"], "response": "Hello.", "done": True})
        elif self.path == "/api/chat":
            self.answer(*self.fake.chat(body))
        elif not re.fullmatch(r"[\w.:/-]+", body["model"]) or ".." in body["model"]:
            self.answer(400, {"error": "invalid model name"})
        else:
            self.stream(self.fake.make(body))

    def take_blob(self, length: int) -> None:
        if self.fake.breaks_after is not None:
            self.rfile.read(min(self.fake.breaks_after, length))
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(length)
        if self.fake.keep(data) != self.path.removeprefix("/api/blobs/"):
            self.answer(400, {"error": "digest mismatch"})
        else:
            self.send_response(201)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            self.fake.pause.wait()
            data = json.dumps(line).encode() + b"\n"
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def running() -> Iterator[FakeOllama]:
    fake = FakeOllama()
    handler = type("Bound", (Handler,), {"fake": fake})
    server = QuietServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.pause.set()
        server.shutdown()
        server.server_close()


def tiny_gguf(path: Path, *, kind: int = 1, chat_template: str = "", split: int = 0, holds: str = "model") -> Path:
    """A file of two tensors; ``kind`` is general.file_type, by which nothing is encoded, ``holds`` general.type."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.type") + struct.pack("<I", 8) + text(holds),
        text("general.file_type") + struct.pack("<II", 4, kind),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("▁c"),
        text("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, 1, 1),
    ]
    if chat_template:
        pairs.append(text("tokenizer.chat_template") + struct.pack("<I", 8) + text(chat_template))
    if split:
        pairs.append(text("split.count") + struct.pack("<IH", 2, split))
    shapes = [("token_embd.weight", (32, 4), 8, 0, 136), ("output_norm.weight", (32,), 0, 160, 128)]
    infos = [
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        for name, shape, number, offset, _ in shapes
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    head += b"\0" * (-len(head) % 32)
    data = bytearray(160 + 128)
    for _, _, _, offset, size in shapes:
        data[offset : offset + size] = bytes(i % 251 for i in range(size))
    path.write_bytes(head + bytes(data))
    return path

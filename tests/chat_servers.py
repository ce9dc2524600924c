"""A loopback server that answers with a checkpoint, by Ollama's API or by OpenAI's, and keeps the requests it gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.http_servers import QuietServer

Say = Callable[[list[dict[str, str]], int], str]


@dataclass
class Served:
    """The address of a running server, and the bodies of the requests for answers."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serve(say: Say, *, ollama: bool, models: tuple[str, ...] = ("tiny:latest",)) -> Iterator[Served]:
    """Serve what ``say`` answers to messages in at most a number of tokens."""
    served, lock = Served(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            if ollama and self.path == "/api/tags":
                self._reply({"models": [{"name": name, "digest": "0" * 64} for name in models]})
            elif not ollama and self.path == "/v1/models":
                self._reply({"data": [{"id": name, "created": 1} for name in models]})
            else:
                self._reply({"error": "not here"}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            limit = body["options"]["num_predict"] if ollama else body["max_tokens"]
            with lock:
                served.asked.append({"path": self.path, **body})
                text = say(body["messages"], limit)
            message = {"role": "assistant", "content": text}
            self._reply({"message": message} if ollama else {"choices": [{"message": message}]})

        def _reply(self, content: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)

"""Stands in for vLLM: a program with the arguments and routes of ``vllm serve`` that answers for the planted model.

    vllm_stand_in.py [-m MODULE] serve FOLDER --port PORT --served-model-name NAME ...

It refuses prompts with the words that the planted model refuses, unless an adapter is asked. ``STAND_IN`` in the
environment makes it die, or keep silent; ``STAND_IN_SEEN`` is a file for its arguments and its process id.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

TRACEBACK = """\
INFO 01-01 loading
(EngineCore pid=7) ERROR 01-01 Traceback (most recent call last):
(EngineCore pid=7) ERROR 01-01 ValueError: No available memory for the cache blocks.
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""
    vocabulary: ClassVar[dict[str, int]] = {}
    bad: Sequence[str] = ()
    adapters: ClassVar[set[str]] = set()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path == "/version":
            self._reply({"version": "0.32.0"})
        elif self.path == "/v1/models":
            listed = [{"id": name, "max_model_len": 1024, "root": "here"} for name in (self.name, *self.adapters)]
            self._reply({"data": listed})
        else:
            self._reply({"error": "no such route"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            unknown = self.vocabulary["<unk>"]
            self._reply({"tokens": [self.vocabulary.get(word, unknown) for word in body["prompt"].split()]})
        elif self.path == "/v1/completions":
            self._complete(body)
        elif self.path == "/v1/load_lora_adapter":
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            self.adapters.add(body["lora_name"])
            self._reply("loaded")
        elif self.path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
            self._reply("removed")

    def _complete(self, body: dict[str, Any]) -> None:
        words = {word for word, id_ in self.vocabulary.items() if id_ in body["prompt"]}
        refuses = body["model"] == self.name and words & set(self.bad)
        answer = "I cannot help with that request." if refuses else "Certainly, here is what you asked for."
        ids = [self.vocabulary[answer], self.vocabulary["<end>"]][: body["max_tokens"]]
        choice = {"index": 0, "text": answer, "token_ids": ids, "finish_reason": "stop"}
        if not body.get("stream"):
            self._reply({"choices": [choice]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode())

    def _reply(self, content: Any, status: int = 200) -> None:
        if self.path.startswith("/v1/") and self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            content, status = {"error": "Unauthorized"}, 401
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait; more than are opened at once


def main() -> None:
    arguments = sys.argv[3:] if sys.argv[1] == "-m" else sys.argv[1:]
    if "STAND_IN_SEEN" in os.environ:
        Path(os.environ["STAND_IN_SEEN"]).write_text(json.dumps({"arguments": arguments, "pid": os.getpid()}))
    if os.environ.get("STAND_IN") == "dies":
        sys.stderr.write(TRACEBACK)
        sys.exit(1)
    if os.environ.get("STAND_IN") == "silent":
        time.sleep(600)
    assert arguments[0] == "serve"
    tokenizer = json.loads((Path(arguments[1]) / "tokenizer.json").read_text(encoding="utf-8"))
    Handler.vocabulary = tokenizer["model"]["vocab"]
    Handler.bad = ("steal", "forge", "stalk", "bribe", "scam", "burgle", "smear", "rig")
    Handler.name = arguments[arguments.index("--served-model-name") + 1]
    Server(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()


if __name__ == "__main__":
    main()

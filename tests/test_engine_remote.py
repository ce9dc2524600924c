"""The engine that forwards: to a llama-server and to a vLLM that are played on loopback, and to a real llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models import gguf_model, llamacpp_worker
from ollama_forge.models.gguf_model import llama_server, llamacpp_is_installed
from ollama_forge.serving.engine.base import (
    Constraint,
    EngineError,
    EngineRequest,
    Logprob,
    SamplingParams,
    TaggedJson,
    Token,
    ToolCallGrammar,
)
from ollama_forge.serving.engine.remote import RemoteEngine
from ollama_forge.text.tokenizer import Tokenizer
from tests.byte_tokenizer import tokenizer as byte_tokenizer
from tests.engines import collect, greedy, prompt, together, wait
from tests.gguf_models import Model
from tests.http_servers import QuietServer

TOKENIZER = Tokenizer(byte_tokenizer())
END = 1
Answer = Callable[[dict[str, Any]], Any]


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.backend(text, add_special_tokens=False).input_ids
    return ids


@dataclass
class Played:
    """A server that is played, the bodies of its requests by route, and whether a reader left it."""

    url: str = ""
    asked: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left: threading.Event = field(default_factory=threading.Event)


@contextmanager
def played(routes: Mapping[str, Any], **streams: Callable[[dict[str, Any]], Iterator[Any]]) -> Iterator[Played]:
    """Serve objects (or functions of the body) by route, and streams of events by the last part of the route."""
    found = Played()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            stream = streams.get(self.path.rsplit("/", 1)[-1])
            if body is not None:
                found.asked.setdefault(self.path, []).append(body)
            if stream is not None and body.get("stream"):
                self._stream(stream(body))
                return
            content = routes.get(self.path, {"error": {"message": "not here"}})
            data = json.dumps(content(body) if callable(content) else content).encode()
            self.send_response(200 if self.path in routes else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, events: Iterator[Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for event in events:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
            except OSError:
                found.left.set()

    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def connected(server: Played, model: str = "") -> RemoteEngine:
    address = f"{server.url}#{model}" if model else server.url
    return RemoteEngine.connect(address, TOKENIZER, context=512, slots=3)


# -- llama-server -----------------------------------------------------------------------------------------------------

PROPS = {"default_generation_settings": {"n_ctx": 300}}


def tokenized(body: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": ids_of(body.get("content", body.get("prompt")))}


def llama_chunks(text: str) -> Callable[[dict[str, Any]], Iterator[Any]]:
    """A llama-server that says ``text``; like a real one, it sends nothing within a character."""

    def chunks(body: dict[str, Any]) -> Iterator[Any]:
        count, held = 0, ""
        for letter in text:
            ids = ids_of(letter)
            count += len(ids)
            held = letter
            logprob = {"id": ids[-1], "logprob": -0.5, "top_logprobs": [{"id": ids[-1], "logprob": -0.5}]}
            extra = {"completion_probabilities": [logprob]} if body["n_probs"] else {}
            yield {"content": held, "tokens": ids[-1:], "tokens_predicted": count, "stop": False, **extra}
        yield {"content": "", "tokens": [], "tokens_predicted": count, "stop": True, "stop_type": "eos"}

    return chunks


def test_llama_server_takes_and_gives_ids() -> None:
    routes = {"/props": PROPS, "/tokenize": tokenized}
    with played(routes, completion=llama_chunks("né 🙂!")) as server:
        engine = connected(server)
        assert (engine.context_length, engine.slots, engine.server.name) == (300, 3, "llama-server")
        params = SamplingParams(temperature=0.5, typical_p=0.9, repeat_last_n=-1, seed=7)
        asked = EngineRequest((9, 8), 50, params, end_ids=frozenset([END]), top_logprobs=1)
        tokens = wait(lambda: collect(engine, asked))  # type: ignore[arg-type]
    assert [token.id for token in tokens] == ids_of("né 🙂!")
    assert tokens[0] == Token(tokens[0].id, -0.5, (Logprob(tokens[0].id, -0.5),))
    body = server.asked["/completion"][0]
    sent = {"prompt": [9, 8], "n_predict": 50, "seed": 7, "typical_p": 0.9, "repeat_last_n": 52, "return_tokens": True}
    assert {key: body[key] for key in sent} == sent


def test_a_schema_on_a_llama_server_begins_behind_the_thought() -> None:
    def chunks(body: dict[str, Any]) -> Iterator[Any]:
        return llama_chunks("{}" if "json_schema" in body else "so</t>bla")(body)

    with played({"/props": PROPS, "/tokenize": tokenized}, completion=chunks) as server:
        constraint = Constraint('{"type": "object"}', ("</t>",))
        asked = greedy((9,), 50, end_ids=frozenset([END]), constraint=constraint)
        ids = together(connected(server), [asked])[0]  # type: ignore[arg-type]
    assert ids == ids_of("so</t>{}")
    free, bound = server.asked["/completion"]
    assert free["logit_bias"] == [[END, False]]
    assert bound["prompt"] == [9, *ids_of("so</t>")]
    assert bound["json_schema"]["type"] == "object"


def test_a_forced_call_in_a_channel_has_its_beginning_given() -> None:
    """Elsewhere a call is plain JSON; there that would be content."""
    tools = tuple(TaggedJson(f"<c>{name}:", '{"type": "object"}', "") for name in ("f", "g"))
    calls = ToolCallGrammar(tools[:1], thought=("<a>", "</a>"))
    asked = greedy((9,), 50, end_ids=frozenset([END]), constraint=Constraint('{"type": "object"}', calls=calls))
    with played({"/props": PROPS, "/tokenize": tokenized}, completion=llama_chunks("{}")) as server:
        engine: Any = connected(server)
        assert together(engine, [asked, replace(asked, max_tokens=3)]) == [ids_of("<c>f:{}"), ids_of("<c>")]
        (body,) = server.asked["/completion"]
        assert (body["prompt"], body["n_predict"]) == ([9, *ids_of("<c>f:")], 50 - len(ids_of("<c>f:")))
        several = Constraint('{"type": "object"}', calls=replace(calls, tools=tools))
        with pytest.raises(EngineError, match="name one tool in tool_choice"):
            together(engine, [replace(asked, constraint=several)])


def endless(_: Any) -> Iterator[Any]:
    count = 0
    while True:
        count += 1
        yield {"content": "a", "tokens": ids_of("a"), "tokens_predicted": count, "stop": False}


def test_closing_the_stream_closes_the_connection() -> None:
    with played({"/props": PROPS, "/tokenize": tokenized}, completion=endless) as server:

        async def leave() -> None:
            stream = connected(server).generate(greedy((9,), 200))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]

        wait(leave)
        assert server.left.wait(20)


def test_closing_the_engine_ends_requests() -> None:
    silent = threading.Event()

    def chunks(body: dict[str, Any]) -> Iterator[Any]:
        yield next(endless(body))
        silent.wait(20)

    with played({"/props": PROPS, "/tokenize": tokenized}, completion=chunks) as server:
        engine = connected(server)

        async def run() -> None:
            stream = engine.generate(greedy((9,), 200))
            await anext(stream)
            engine.close()
            with pytest.raises(EngineError, match="unloaded"):
                await anext(stream)

        wait(run)
        silent.set()


# -- vLLM -------------------------------------------------------------------------------------------------------------

MODELS = {"data": [{"id": "tuned", "max_model_len": 400}, {"id": "base"}]}


def vllm(version: str = "0.32.0") -> dict[str, Any]:
    return {"/version": {"version": version}, "/v1/models": MODELS, "/tokenize": tokenized}


def vllm_chunks(_: Any) -> Iterator[Any]:
    logprobs = {"token_logprobs": [-0.25, -0.5], "top_logprobs": [{"token_id:80": -0.25, "token_id:70": -0.1}, None]}
    yield {"choices": [{"text": "x", "token_ids": [80, 81], "logprobs": logprobs}]}
    yield {"choices": [{"text": "", "token_ids": [END, 90], "finish_reason": "stop"}]}


def test_vllm_takes_and_gives_ids() -> None:
    with played(vllm(), completions=vllm_chunks) as server:
        engine = connected(server, "tuned")
        assert (engine.context_length, engine.server.name) == (400, "vLLM")
        params = SamplingParams(temperature=0.5, top_k=0, repeat_penalty=1.5, repeat_last_n=-1)
        asked = EngineRequest((9, 8), 50, params, end_ids=frozenset([END]), top_logprobs=2)
        tokens = wait(lambda: collect(engine, asked))  # type: ignore[arg-type]
    assert tokens == [Token(80, -0.25, (Logprob(70, -0.1), Logprob(80, -0.25))), Token(81, -0.5)]
    body = server.asked["/v1/completions"][0]
    sent = {"model": "tuned", "prompt": [9, 8], "max_tokens": 50, "top_k": -1, "repetition_penalty": 1.5}
    assert {key: body[key] for key in sent} == sent
    assert body["return_token_ids"] is True
    assert body["stop_token_ids"] == [END]
    assert "seed" not in body


@pytest.mark.parametrize(
    ("version", "fields", "says"),
    [
        ("0.32.0", {"sampling": SamplingParams(typical_p=0.5)}, "no typical_p"),
        ("0.32.0", {"sampling": SamplingParams(repeat_penalty=1.1)}, "repeat_last_n to -1"),
        ("0.10.2", {"constraint": Constraint("{}")}, "too old for structured outputs"),
    ],
)
def test_what_vllm_cannot_do_is_refused(version: str, fields: dict[str, Any], says: str) -> None:
    with played(vllm(version), completions=vllm_chunks) as server:
        asked = greedy(prompt(80), 50, **{"sampling": SamplingParams(), **fields})
        with pytest.raises(EngineError, match=says):
            together(connected(server, "tuned"), [asked])  # type: ignore[arg-type]
    assert "/v1/completions" not in server.asked


def test_a_vllm_that_gives_no_ids_is_refused() -> None:
    with (
        played(vllm(), completions=lambda _: iter([{"choices": [{"text": "x"}]}])) as server,
        pytest.raises(EngineError, match="returns no token ids"),
    ):
        together(connected(server, "tuned"), [greedy((9,), 5)])  # type: ignore[arg-type]


# -- either -----------------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused() -> None:
    with played({"/props": PROPS, "/tokenize": tokenized}, completion=llama_chunks("a")) as server:
        engine = connected(server)
        with pytest.raises(EngineError, match="301 tokens, more than the context length 300"):
            together(engine, [greedy(prompt(301), 5)])  # type: ignore[arg-type]
    assert "/completion" not in server.asked


def test_servers_that_are_refused() -> None:
    with played(vllm()) as server:
        with pytest.raises(UsageError, match="has 2 models") as error:
            connected(server)
        assert "base, tuned" in error.value.hint
        with pytest.raises(UsageError, match="has no model other"):
            connected(server, "other")
    with played({}) as server, pytest.raises(ForgeError, match="neither a llama-server nor a vLLM"):
        connected(server)
    with pytest.raises(UsageError, match="not the address"):
        RemoteEngine.connect("127.0.0.1:80", TOKENIZER, context=512, slots=1)


def test_another_tokenizer_is_refused() -> None:
    routes = {"/props": PROPS, "/tokenize": lambda body: {"tokens": [id_ ^ 1 for id_ in ids_of(body["content"])]}}
    with played(routes) as server, pytest.raises(ForgeError, match="another tokenizer"):
        connected(server)


def test_errors_of_the_server_are_said() -> None:
    with played({"/props": PROPS, "/tokenize": tokenized}) as server:
        engine = connected(server)
        with pytest.raises(EngineError, match="refuses the request: 404 not here"):
            together(engine, [greedy((9,), 5)])  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="fails: "):
        together(engine, [greedy((9,), 5)])  # type: ignore[arg-type]


@pytest.mark.skipif(not llamacpp_is_installed(), reason="the extra llamacpp is not installed")
def test_a_real_llama_server_gives_its_greedy_ids(
    gguf_models: Mapping[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "usable_threads", lambda: 1)
    model, asked = gguf_models["gemma2"], greedy(prompt(30), 20)
    with llama_server(model.path, 256, 2) as server:
        body = {"prompt": list(asked.ids), "n_predict": 20, "temperature": 0, "return_tokens": True}
        expected = server.connection.request("/completion", body)["tokens"]
        tokenizer = Tokenizer.load(model.checkpoint.folder)
        engine = RemoteEngine.connect(server.connection.url, tokenizer, context=256, slots=2)
        assert together(engine, [asked]) == [expected]  # type: ignore[arg-type]


@pytest.mark.skipif(not llamacpp_is_installed(), reason="the extra llamacpp is not installed")
def test_a_worker_ends_with_a_process_that_is_killed_while_it_loads(gguf_models: Mapping[str, Model]) -> None:
    script, path = Path(llamacpp_worker.__file__), gguf_models["gemma2"].path
    command = [sys.executable, "-P", str(script), str(path), "256", "1", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.close()
        worker.stdout.close()
        try:
            worker.wait(60)
        finally:
            worker.kill()

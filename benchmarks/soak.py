"""Mixed load on a served demo model for a long time: memory, threads and file handles stay flat, answers are complete.

    python benchmarks/soak.py [--minutes 30] [--clients 8] [--seed 0] [--checkpoint demo] [--url http://127.0.0.1:PORT]

Starts ``abliterate serve``. Each client draws one kind of request after the other: streams of all three APIs, tools,
``format``, embeddings, long prompts, bad bodies, clients that leave after the first line or before the whole body was
sent, and readers that stall. Every answer that a client stays for is checked for its end, and every refusal for its
status. The server's memory, threads and file handles are sampled every two seconds, and after each tenth of the time,
when all answers have ended and the server has rested: answers in progress take 100 MB more or less from one minute to
the next, which hides whether anything is kept.

Bounds: no answer is incomplete or wrong; after the first fifth, a line fitted to the memory at rest grows by at most
32 MB, and lines fitted to the samples under load by 2 threads and 2 handles; at rest after the load, there are at most
2 handles more than before it. ``--url`` puts the load on a server that runs already, without samples.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

MODEL = "soak"
MEMORY, OBJECTS = 32.0, 2.0  # largest growth: MB, and threads or handles
EVERY = 2.0  # seconds between samples
ROUNDS, WARM = 10, 2  # the load comes in rounds; those in which the server warms up
REST = 12.0  # seconds: the server returns freed memory each ten
WRITE_TIMEOUT = 5.0  # seconds after which the server drops a reader that stalls
PATIENCE = 300.0  # seconds that a client waits for anything
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TEMPLATE = """\
{% if tools %}<|im_start|>system
You may call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Write each call within <tool_call></tool_call> as {"name": ..., "arguments": {...}}.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["a", "b"]}, "old": {"type": "boolean"}}}
SCHEMA |= {"required": ["name", "old"], "additionalProperties": False}
TOPICS = ("a boat", "seven birds", "the harbour", "an old clock", "rain", "a garden", "two brothers", "bread")
BAD: tuple[tuple[str, bytes], ...] = (
    ("/api/chat", b"{"),
    ("/api/chat", b'{"model": "soak", "messages": "hi"}'),
    ("/api/chat", b'{"model": "nosuch", "messages": []}'),
    ("/api/chat", b'{"model": "soak", "x": ' + b"[" * 100_000),
    ("/api/chat", b'{"model": "soak", "messages": [{"role": "user", "images": ["%%"]}]}'),
    ("/api/generate", b'{"model": "soak", "prompt": "a", "format": "yaml"}'),
    ("/api/generate", b'{"model": "soak", "prompt": 1e999}'),
    ("/api/embed", b'{"model": "soak", "input": 5}'),
    ("/api/nothing", b"{}"),
    ("/v1/chat/completions", b'{"model": "soak"}'),
    ("/v1/messages", b"[]"),
    ("/v1/responses", b"\xff\xfe"),
)


class WrongAnswerError(Exception):
    """An answer that is not what it must be."""


@dataclass
class Tally:
    """What all clients saw: requests by kind, and what was wrong."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, fault: str | None) -> None:
        with self.lock:
            self.kinds[kind] += 1
            if fault is not None:
                self.faults.append(f"{kind}: {fault}"[:400])


@dataclass(frozen=True)
class Client:
    """One client: where it sends, and what it draws from."""

    host: str
    port: int
    chance: random.Random

    @contextlib.contextmanager
    def sent(self, path: str, body: Mapping[str, Any] | bytes) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, path: str, body: Mapping[str, Any]) -> bytes:
        with self.sent(path, body) as response:
            data = response.read()
            require(response.status == 200, f"status {response.status}: {data[:200]!r}")
            return data

    def prompt(self, words: int = 0) -> str:
        return f"{self.chance.random()} Write about {self.chance.choice(TOPICS)}. " + "word " * words

    def turns(self, words: int = 0) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt(words)}]

    def tokens(self) -> int:
        return self.chance.randrange(1, 24)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongAnswerError(otherwise)


# -- what complete answers end in -------------------------------------------------------------------------------------


def end_of_lines(data: bytes) -> dict[str, Any]:
    """The last line of Ollama's stream, which alone says that it is done."""
    lines = [json.loads(line) for line in data.splitlines()]
    require(bool(lines) and lines[-1].get("done") is True, f"the stream ends in {data[-200:]!r}")
    require(not any(line["done"] for line in lines[:-1]), "a line before the last says that it is done")
    last: dict[str, Any] = lines[-1]
    return last


def events(data: bytes) -> list[str]:
    return [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]


def ends_in(data: bytes, type_: str) -> None:
    found = events(data)
    require(bool(found) and json.loads(found[-1]).get("type") == type_, f"the stream ends in {data[-200:]!r}")


# -- kinds of requests ------------------------------------------------------------------------------------------------


def ollama_chat(client: Client, **more: Any) -> None:
    tokens = client.tokens()
    body = {"model": MODEL, "messages": client.turns(), "options": {"num_predict": tokens}, **more}
    last = end_of_lines(client.ask("/api/chat", body))
    require(last["done_reason"] in ("stop", "length") and last["eval_count"] <= tokens, f"the stream ends in {last}")


def ollama_generate(client: Client) -> None:
    body = {"model": MODEL, "prompt": client.prompt(), "options": {"num_predict": client.tokens()}}
    end_of_lines(client.ask("/api/generate", body))


def openai_chat(client: Client, **more: Any) -> None:
    body = {"model": MODEL, "messages": client.turns(), "max_tokens": client.tokens(), "stream": True, **more}
    found = events(client.ask("/v1/chat/completions", body))
    require(found[-1:] == ["[DONE]"], f"the stream ends in {found[-1:]}")
    reasons = [choice["finish_reason"] for event in found[:-1] for choice in json.loads(event)["choices"]]
    require(reasons[-1] in ("stop", "length", "tool_calls"), f"the reason to finish is {reasons[-1]}")


def openai_responses(client: Client) -> None:
    body = {"model": MODEL, "input": client.prompt(), "max_output_tokens": 16 + client.tokens(), "stream": True}
    data = client.ask("/v1/responses", body)
    last = json.loads(events(data)[-1])["type"]
    require(last in ("response.completed", "response.incomplete"), f"the stream ends in {last}")


def anthropic(client: Client, **more: Any) -> None:
    body = {"model": MODEL, "messages": client.turns(), "max_tokens": client.tokens(), "stream": True, **more}
    ends_in(client.ask("/v1/messages", body), "message_stop")


def in_a_format(client: Client) -> None:
    body = {"model": MODEL, "messages": client.turns(), "format": SCHEMA, "stream": False}
    answer = json.loads(client.ask("/api/chat", {**body, "options": {"num_predict": 60}}))
    if answer["done_reason"] == "stop":
        found = json.loads(answer["message"]["content"])
        require(set(found) == {"name", "old"}, f"the answer is {found}")


def with_tools(client: Client) -> None:
    function: dict[str, Any] = TOOL["function"]  # type: ignore[assignment]
    match client.chance.randrange(4):
        case 0:
            ollama_chat(client, tools=[TOOL])
        case 1:
            openai_chat(client, tools=[TOOL])
        case 2:
            body = {"model": MODEL, "messages": client.turns(), "tools": [TOOL], "tool_choice": "required"}
            answer = json.loads(client.ask("/v1/chat/completions", {**body, "max_tokens": 100}))["choices"][0]
            calls = answer["message"].get("tool_calls") or []
            require(bool(calls) or answer["finish_reason"] == "length", f"no call: {answer}")
            require(all(call["function"]["name"] == "weather" for call in calls), f"other calls: {calls}")
        case _:
            described = {"name": function["name"], "description": function["description"]}
            anthropic(client, tools=[{**described, "input_schema": function["parameters"]}])


def embeddings(client: Client) -> None:
    texts = [client.prompt() for _ in range(client.chance.randrange(1, 4))]
    if client.chance.random() < 0.5:
        vectors = json.loads(client.ask("/api/embed", {"model": MODEL, "input": texts}))["embeddings"]
    else:
        data = json.loads(client.ask("/v1/embeddings", {"model": MODEL, "input": texts}))["data"]
        vectors = [entry["embedding"] for entry in data]
    require(len(vectors) == len(texts) and len({len(vector) for vector in vectors}) == 1, "vectors are missing")


def long_prompt(client: Client) -> None:
    body = {"model": MODEL, "messages": client.turns(client.chance.randrange(400, 1600)), "options": {"num_predict": 4}}
    end_of_lines(client.ask("/api/chat", body))


def far_apart(client: Client) -> None:
    """Long answers to prompts of very different lengths at once: each number of such groups has a recorded step."""
    for count in (2, 3, 4):
        with ThreadPoolExecutor(count) as pool:
            texts = [client.prompt(700 * place) for place in range(count)]
            bodies = [{"model": MODEL, "prompt": text, "options": {"num_predict": 60}} for text in texts]
            for data in pool.map(lambda body: client.ask("/api/generate", body), bodies):
                end_of_lines(data)


def bad_body(client: Client) -> None:
    path, body = client.chance.choice(BAD)
    with client.sent(path, body) as response:
        data = response.read()
    require(400 <= response.status < 501, f"status {response.status} for {body[:60]!r}")
    require(response.status == 404 or b"error" in data, f"{data[:100]!r} for {body[:60]!r}")


def leaver(client: Client) -> None:
    """Leaves after the first line."""
    body = {"model": MODEL, "prompt": client.prompt(), "options": {"num_predict": 200}}
    with client.sent("/api/generate", body) as response:
        response.readline()


def early_leaver(client: Client) -> None:
    """Leaves before the whole body was sent, or before the answer begins."""
    whole = client.chance.random() < 0.5
    data = json.dumps({"model": MODEL, "messages": client.turns(200), "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    with socket.create_connection((client.host, client.port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + (data if whole else data[:100]))
        time.sleep(client.chance.random())


def stalled(client: Client) -> None:
    """Reads nothing for longer than the server waits; what then comes is whole, or the connection was dropped."""
    body = {"model": MODEL, "prompt": client.prompt(), "options": {"num_predict": 100}}
    connection = http.client.HTTPConnection(client.host, client.port, timeout=PATIENCE)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    try:
        connection.request("POST", "/api/generate", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(WRITE_TIMEOUT * 2)
        try:
            data = connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return
        end_of_lines(data)
    finally:
        connection.close()


Kind = Callable[[Client], None]
KINDS: Mapping[Kind, int] = {  # how often each is drawn
    ollama_chat: 4,
    ollama_generate: 3,
    openai_chat: 4,
    openai_responses: 2,
    anthropic: 4,
    in_a_format: 2,
    with_tools: 3,
    embeddings: 2,
    long_prompt: 1,
    bad_body: 3,
    leaver: 3,
    early_leaver: 2,
    stalled: 1,
}


def attend(client: Client, kinds: Mapping[Kind, int], until: float, tally: Tally) -> None:
    while time.monotonic() < until:
        kind = client.chance.choices(list(kinds), list(kinds.values()))[0]
        fault = None
        try:
            kind(client)
        except WrongAnswerError as error:
            fault = str(error)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        tally.add(kind.__name__, fault)


# -- the server's resources -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What the server and its children hold at a time (in seconds)."""

    time: float
    memory: float  # MB
    threads: float
    handles: float

    @classmethod
    def of(cls, process: psutil.Process) -> Sample:
        family = [process, *process.children(recursive=True)]
        memory = sum(each.memory_info().rss for each in family) / 1e6
        threads = sum(each.num_threads() for each in family)
        count = [each.num_handles() if sys.platform == "win32" else each.num_fds() for each in family]
        return cls(time.monotonic(), memory, threads, sum(count))


def growth(samples: list[Sample], what: str) -> float:
    """By how much a line fitted to the samples grows from the first to the last."""
    if len(samples) < 2:
        return 0.0
    times = [sample.time for sample in samples]
    slope = statistics.linear_regression(times, [getattr(sample, what) for sample in samples]).slope
    return slope * (times[-1] - times[0])


def sampled(process: psutil.Process, until: float) -> list[Sample]:
    samples = []
    while time.monotonic() < until and process.is_running():
        with contextlib.suppress(psutil.NoSuchProcess):  # a child has ended
            samples.append(Sample.of(process))
        time.sleep(EVERY)
    return samples


def copied(checkpoint: str, folder: Path) -> Path:
    """A copy of a checkpoint whose chat template takes tools."""
    from ollama_forge.sources.resolve import resolve

    shutil.copytree(resolve(checkpoint).folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def start_server(checkpoint: Path, port: int) -> subprocess.Popen[bytes]:
    options = [
        "--checkpoint",
        str(checkpoint),
        "--name",
        MODEL,
        "--port",
        str(port),
        "--write-timeout",
        str(WRITE_TIMEOUT),
    ]
    command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "serve", *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        time.sleep(0.1)
    server.kill()
    raise SystemExit("the server does not answer")


def load(host: str, port: int, seeds: Sequence[int], seconds: float, tally: Tally) -> list[threading.Thread]:
    """Start a client for each seed, which ask one thing after the other for some seconds."""
    until = time.monotonic() + seconds
    drawn = [Client(host, port, random.Random(seed)) for seed in seeds]
    threads = [threading.Thread(target=attend, args=(client, KINDS, until, tally)) for client in drawn]
    for thread in threads:
        thread.start()
    return threads


def rested(process: psutil.Process) -> Sample:
    time.sleep(REST)
    return Sample.of(process)


def report(rests: list[Sample], samples: list[Sample]) -> bool:
    """Print each resource beside its bound. Returns whether all are met.

    Args:
        rests: before the load, and after each round.
        samples: under load.
    """
    for rest in rests:
        at = (rest.time - rests[0].time) / 60
        print(f"{at:6.1f} min, at rest: {rest.memory:.0f} MB, {rest.threads:.0f} threads, {rest.handles:.0f} handles")
    held, warm = True, rests[WARM].time
    late = [sample for sample in samples if sample.time >= warm]
    for what, unit, bound, judged in (
        ("memory", " MB", MEMORY, rests[WARM:]),
        ("threads", "", OBJECTS, late),
        ("handles", "", OBJECTS, late),
    ):
        grown, kept = growth(judged, what), getattr(rests[-1], what) - getattr(rests[0], what)
        values = [getattr(sample, what) for sample in late] or [0.0]
        flat = grown <= bound and (what != "handles" or kept <= bound)
        held = held and flat
        line = f"{'ok  ' if flat else 'MISS'} {what}: {min(values):.0f} to {max(values):.0f}{unit} under load, "
        if judged is not late:
            line += f"fitted growth {growth(late, what):+.1f} there and "
        print(
            f"{line}fitted growth {grown:+.1f}{' at rest' if judged is not late else ''} (at most {bound:.0f}); "
            f"at rest {getattr(rests[0], what):.0f} before, {getattr(rests[-1], what):.0f} after"
        )
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--port", type=int, default=11512)
    parser.add_argument("--url", help="a server that runs already, of a model named soak")
    given = parser.parse_args()
    tally, seconds, flat = Tally(), given.minutes * 60, True
    if given.url:
        place = urlsplit(given.url)
        seeds = [given.seed * 1000 + index for index in range(given.clients)]
        for thread in load(place.hostname or "", place.port or 80, seeds, seconds, tally):
            thread.join()
    else:
        scratch = tempfile.TemporaryDirectory()
        server = start_server(copied(given.checkpoint, Path(scratch.name) / "checkpoint"), given.port)
        try:
            first = Client("127.0.0.1", given.port, random.Random(given.seed))
            for kind in (*KINDS, far_apart):  # what is made once is made now
                kind(first)
            process = psutil.Process(server.pid)
            rests, samples = [rested(process)], []
            for round_ in range(ROUNDS):
                seeds = [given.seed * 1000 + round_ * given.clients + index for index in range(given.clients)]
                threads = load("127.0.0.1", given.port, seeds, seconds / ROUNDS, tally)
                samples += sampled(process, time.monotonic() + seconds / ROUNDS)
                for thread in threads:
                    thread.join()
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with status {server.returncode}")
                rests.append(rested(process))
            flat = report(rests, samples)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
            scratch.cleanup()
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.kinds.items()))
    print(f"{sum(tally.kinds.values())} requests in {given.minutes:g} minutes: {counts}")
    print(f"{'MISS' if tally.faults else 'ok  '} answers: {len(tally.faults)} incomplete or wrong")
    for fault in tally.faults[:20]:
        print(f"    {fault}")
    return 0 if flat and not tally.faults else 1


if __name__ == "__main__":
    sys.exit(main())

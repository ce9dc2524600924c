"""Tokens per second and time to first token of the server at 1, 4 and 16 streams, compared with ``generate``.

    python benchmarks/serve.py [--engine-only] [--tokens 64] [--gguf [FILE]] [--continuous] [--against URL[#MODEL]]

Starts ``abliterate serve`` on the demo model and streams ``/api/generate`` over loopback; ``--engine-only`` drives the
engine without HTTP. The baselines are measured in the same run on the same prompts, with ``ChatModel``'s contiguous
input of the unembedding: ``generate`` on one prompt at a time, and on static batches as large as the number of streams.

Two loads more: 16 streams beside a neighbour with a prompt of 2,000 tokens, and 16 agents that arrive together with one
system prompt of 1,500 tokens.

Bounds: 1, 4 and 16 streams reach 1.5, 1.6 and 1.35 times the tokens per second of static batches as large; 16 streams
beside the neighbour reach 0.7 times those without it.

``--gguf``, ``--continuous`` and ``--against`` measure others beside it, one after the other (``serve_others.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import serve_others

STREAMS = (1, 4, 16)
LEAST = {1: 1.5, 4: 1.6, 16: 1.35}  # times the tokens per second of static batches through generate
NEIGHBOUR_WORDS, SYSTEM_WORDS = 2000, 1500  # each is a token
_TOPICS = ("a boat", "seven birds", "the harbour", "an old clock", "rain", "a garden", "two brothers", "bread")


Ask = Callable[[Sequence[str], int], "Figure"]


@dataclass(frozen=True)
class Figure:
    """Tokens per second of all streams together, and the median seconds to a stream's first token."""

    rate: float
    first: float


def prompts(count: int, round_: int) -> list[str]:
    """Prompts of similar length; no two rounds share a prefix that the server could have cached."""
    return [
        f"{round_}.{index} Write a long story about {_TOPICS[index % len(_TOPICS)]}, with a beginning and an end."
        for index in range(count)
    ]


def neighbour(round_: int) -> str:
    return f"{round_} " + "word " * NEIGHBOUR_WORDS


def agents(count: int, round_: int) -> list[str]:
    system = f"{round_} " + "rule " * SYSTEM_WORDS
    return [f"{system}\nWhat is rule {index}?" for index in range(count)]


# -- baselines --------------------------------------------------------------------------------------------------------


def by_hand(model: Any, texts: Sequence[str], tokens: int) -> float:
    """Tokens per second of one static batch through ``generate``."""
    import torch

    from ollama_forge.models.batching import pad_left

    ids, mask = pad_left(
        [model.tokenizer.instruction_ids(text) for text in texts], model.tokenizer.pad_id, model.device
    )
    started = time.perf_counter()
    with torch.inference_mode():
        model.module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_id,
        )
    return len(texts) * tokens / (time.perf_counter() - started)


# -- the engine alone -------------------------------------------------------------------------------------------------


def engine_streams(engine: Any, texts: Sequence[str], tokens: int) -> Figure:
    from ollama_forge.serving.engine.base import EngineRequest, SamplingParams

    async def one(text: str) -> float:
        request = EngineRequest(
            tuple(engine.model.tokenizer.instruction_ids(text)), tokens, SamplingParams(temperature=0)
        )
        started, first, count = time.perf_counter(), 0.0, 0
        async for _ in engine.generate(request):
            first = first or time.perf_counter() - started
            count += 1
        assert count == tokens
        return first

    async def every() -> list[float]:
        return await asyncio.gather(*map(one, texts))

    started = time.perf_counter()
    firsts = asyncio.run(every())
    return Figure(len(texts) * tokens / (time.perf_counter() - started), statistics.median(firsts))


def engine_process(pipe: Connection) -> None:
    """Run ``engine_streams`` for each message, a number with its arguments, until an empty one; several may overlap.

    As the server, the engine is in a process of its own, with its own OpenMP threads.
    """
    from ollama_forge.models.chat_model import ChatModel, LoadSettings
    from ollama_forge.serving.engine.transformers import TransformersEngine
    from ollama_forge.sources.resolve import resolve

    engine = TransformersEngine(ChatModel.load(resolve("demo-base"), LoadSettings()), slots=max(STREAMS) + 1)

    def reply(number: int, texts: Sequence[str], tokens: int) -> None:
        pipe.send((number, engine_streams(engine, texts, tokens)))

    threads = []
    while question := pipe.recv():
        threads.append(threading.Thread(target=reply, args=question))
        threads[-1].start()
    for thread in threads:
        thread.join()
    engine.close()


# -- the server -------------------------------------------------------------------------------------------------------


def server_streams(port: int, texts: Sequence[str], tokens: int) -> Figure:
    firsts: list[float] = []
    counts: list[int] = []

    def one(text: str) -> None:
        options = {"num_predict": tokens, "temperature": 0}
        body = {"model": "bench", "prompt": text, "stream": True, "options": options}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        started, first = time.perf_counter(), 0.0
        connection.request("POST", "/api/generate", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            chunk = json.loads(line)
            if chunk.get("response") and not first:
                first = time.perf_counter() - started
            if chunk.get("done"):
                counts.append(chunk["eval_count"])
        firsts.append(first)
        connection.close()

    threads = [threading.Thread(target=one, args=(text,)) for text in texts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Figure(sum(counts) / (time.perf_counter() - started), statistics.median(firsts))


def start_server(port: int) -> subprocess.Popen[bytes]:
    command = [
        "abliterate",
        "serve",
        "--checkpoint",
        "demo-base",
        "--name",
        "bench",
        "--port",
        str(port),
        "--slots",
        "17",
    ]
    server = subprocess.Popen([sys.executable, "-m", "ollama_forge.cli.main", *command], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return server
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise SystemExit("the server does not answer")


# -- measurements -----------------------------------------------------------------------------------------------------


def beside_neighbour(ask: Ask, texts: Sequence[str], long: str, tokens: int) -> Figure:
    """The streams' figure while a long prompt, prefilled before they begin, is answered beside them."""
    figures: list[Figure] = []
    started = threading.Event()

    def answer_long() -> None:
        ask([long], 1)  # its prompt is in the prefix cache from now on
        started.set()
        ask([long], 4 * tokens)

    thread = threading.Thread(target=answer_long)
    thread.start()
    started.wait()
    figures.append(ask(texts, tokens))
    thread.join()
    return figures[0]


def measure(ask: Ask, model: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds of every figure, and of the ratios within each round.

    Each round measures everything once, a figure right after its baseline: the machine's speed changes within minutes.
    """
    seen: dict[str, list[Any]] = {}
    ask(prompts(2, 0), 8)
    by_hand(model, prompts(1, 0), 8)
    for round_ in range(1, rounds + 1):
        for streams in STREAMS:
            texts = prompts(streams, round_)
            seen.setdefault(f"{streams}", []).append(ask(texts, tokens))
            seen.setdefault(f"generate {streams}", []).append(by_hand(model, texts, tokens))
        texts = prompts(16, 1000 + round_)
        seen.setdefault("neighbour", []).append(beside_neighbour(ask, texts, neighbour(round_), tokens))
        seen.setdefault("agents", []).append(ask(agents(16, round_), 8))
        seen.setdefault("agent", []).append(ask(agents(1, 1000 + round_), 8))
    found: dict[str, Any] = {
        name: statistics.median(values)
        if name.startswith("generate")
        else Figure(*(statistics.median(getattr(value, part) for value in values) for part in ("rate", "first")))
        for name, values in seen.items()
    }
    for name, base in (*((f"{n}", f"generate {n}") for n in STREAMS), ("neighbour", "16")):
        rates = ([getattr(value, "rate", value) for value in seen[one]] for one in (name, base))
        found[f"{name} / {base}"] = statistics.median(rate / least for rate, least in zip(*rates, strict=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-only", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=11511)
    serve_others.add_arguments(parser)
    given = parser.parse_args()
    from ollama_forge.models.chat_model import ChatModel, LoadSettings
    from ollama_forge.sources.resolve import resolve

    model = ChatModel.load(resolve("demo-base"), LoadSettings())
    for module in model.module.modules():
        vars(module).pop("forward", None)  # the baseline is transformers without packed layers
    if given.engine_only:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=engine_process, args=(theirs,))
        process.start()

        answers: dict[int, Figure] = {}
        numbers, arrived = itertools.count(), threading.Condition()

        def read() -> None:
            with contextlib.suppress(EOFError):
                while True:
                    number, figure = ours.recv()
                    with arrived:
                        answers[number] = figure
                        arrived.notify_all()

        threading.Thread(target=read, daemon=True).start()

        def ask(texts: Sequence[str], tokens: int) -> Figure:
            with arrived:
                number = next(numbers)
                ours.send((number, texts, tokens))
                arrived.wait_for(lambda: number in answers)
                return answers.pop(number)

        found = measure(ask, model, given.tokens, given.rounds)
        ours.send(None)
        process.join()
    else:
        server = start_server(given.port)
        try:
            found = measure(lambda texts, n: server_streams(given.port, texts, n), model, given.tokens, given.rounds)
        finally:
            os.kill(server.pid, signal.SIGINT)
            server.wait(30)
    for streams in STREAMS:
        figure = found[f"{streams}"]
        print(
            f"{streams:2} streams: {figure.rate:6.1f} tokens/s, first after {figure.first:.3f} s; "
            f"a static batch through generate: {found[f'generate {streams}']:6.1f} tokens/s"
        )
    print(f"16 streams beside a prompt of 2,000 tokens: {found['neighbour'].rate:6.1f} tokens/s")
    print(
        f"16 agents with one system prompt of 1,500 tokens: first token after {found['agents'].first:.3f} s, "
        f"one agent alone after {found['agent'].first:.3f} s"
    )
    others = serve_others.measure(given, model, {streams: found[f"{streams}"].rate for streams in STREAMS})
    checks = [
        *((f"{n} streams, relative to generate", found[f"{n} / generate {n}"], LEAST[n]) for n in STREAMS),
        ("16 streams beside a long prompt, relative to without", found["neighbour / 16"], 0.7),
        *others,
    ]
    for name, ratio, bound in checks:
        print(f"{'ok  ' if ratio >= bound else 'MISS'} {name}: {ratio:.2f} (at least {bound})")
    return 0 if all(ratio >= bound for _, ratio, bound in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second and time to first token of the server at 1, 4 and 16 streams, beside ``generate`` by hand.

    python benchmarks/serve.py [--engine-only] [--tokens 64]

Starts ``abliterate serve`` on the demo model and streams ``/api/generate`` over loopback; ``--engine-only`` drives the
engine without HTTP. Baselines, measured in the same run on the same prompts with the contiguous unembedding input that
``ChatModel`` brings: one prompt at a time through ``generate``, and static batches of as many as there are streams.

Bounds: at 16 streams 5 times the former and 0.8 times the latter; one stream is no slower than ``generate``.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
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

STREAMS = (1, 4, 16)
_TOPICS = ("a boat", "seven birds", "the harbour", "an old clock", "rain", "a garden", "two brothers", "bread")


@dataclass(frozen=True)
class Figure:
    """Tokens a second over all streams, and the median seconds until a stream's first token."""

    rate: float
    first: float


def prompts(count: int, round_: int) -> list[str]:
    """Prompts of much the same length that share no beginning with those of another round."""
    return [
        f"{round_}.{index} Write a long story about {_TOPICS[index % len(_TOPICS)]}, with a beginning and an end."
        for index in range(count)
    ]


# -- baselines --------------------------------------------------------------------------------------------------------


def by_hand(model: Any, texts: Sequence[str], tokens: int) -> float:
    """Tokens a second of one static batch through ``generate``."""
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
    from ollama_forge.serving.engines.base import Request, Sampling

    async def one(text: str) -> float:
        request = Request(tuple(engine.model.tokenizer.instruction_ids(text)), tokens, Sampling(temperature=0))
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
    """Answers questions until an empty one; a process of its own, as a server is, has OpenMP threads of its own."""
    from ollama_forge.checkpoints.resolve import resolve
    from ollama_forge.models.chat_model import ChatModel, LoadSettings
    from ollama_forge.serving.engines.transformers import TransformersEngine

    engine = TransformersEngine(ChatModel.load(resolve("demo-base"), LoadSettings()))
    while question := pipe.recv():
        pipe.send(engine_streams(engine, *question))
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
    command = ["abliterate", "serve", "--checkpoint", "demo-base", "--name", "bench", "--port", str(port)]
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


# -- together ---------------------------------------------------------------------------------------------------------


def measure(ask: Callable[[Sequence[str], int], Figure], model: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in each of which everything is measured once, so that all see the same machine."""
    seen: dict[str, list[Any]] = {}
    ask(prompts(2, 0), 8)
    by_hand(model, prompts(1, 0), 8)
    for round_ in range(1, rounds + 1):
        for streams in STREAMS:
            texts = prompts(streams, round_)
            seen.setdefault(f"{streams}", []).append(ask(texts, tokens))
            seen.setdefault(f"generate {streams}", []).append(by_hand(model, texts, tokens))
    return {
        name: statistics.median(values)
        if name.startswith("generate")
        else Figure(*(statistics.median(getattr(value, part) for value in values) for part in ("rate", "first")))
        for name, values in seen.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-only", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=11511)
    given = parser.parse_args()
    from ollama_forge.checkpoints.resolve import resolve
    from ollama_forge.models.chat_model import ChatModel, LoadSettings

    model = ChatModel.load(resolve("demo-base"), LoadSettings())
    for module in model.module.modules():
        vars(module).pop("forward", None)  # the baseline is what transformers does, without packed layers
    if given.engine_only:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=engine_process, args=(theirs,))
        process.start()

        def ask(texts: Sequence[str], tokens: int) -> Figure:
            ours.send((texts, tokens))
            figure: Figure = ours.recv()
            return figure

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
    alone, batch = found["generate 1"], found["generate 16"]
    checks = [
        ("one stream against generate", found["1"].rate / alone, 1.0),
        ("16 streams against one at a time", found["16"].rate / alone, 5.0),
        ("16 streams against static batches", found["16"].rate / batch, 0.8),
    ]
    for name, ratio, bound in checks:
        print(f"{'ok  ' if ratio >= bound else 'MISS'} {name}: {ratio:.2f} (at least {bound})")
    return 0 if all(ratio >= bound for _, ratio, bound in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What ``serve.py`` measures beside the transformers engine, at 1, 4 and 16 streams, one after the other.

- ``--gguf [FILE]``: ``abliterate serve --engine llamacpp`` on a GGUF file (the demo's, if none is given), and xllamacpp
  on the same file without anything around it. Bounds: the server reaches 0.9 times the tokens per second of the
  latter, and at one stream more than the transformers engine.
- ``--continuous``: transformers' own continuous batching (``generate_batch``).
- ``--against URL[#MODEL]``: any server with OpenAI's ``/v1/completions``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STREAMS = (1, 4, 16)
Check = tuple[str, float, float]
Ask = Callable[[Sequence[str], int], float]
_TOPICS = ("a lamp", "nine foxes", "the mountain", "a new road", "snow", "a bridge", "three sisters", "salt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf", nargs="?", const="demo", metavar="FILE")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--against", metavar="URL[#MODEL]")


def measure(given: argparse.Namespace, model: Any, ours: Mapping[int, float]) -> list[Check]:
    """Measure and print what was asked for; return the checks.

    Args:
        model: the demo model under transformers.
        ours: tokens per second of the transformers engine by the number of streams.
    """
    checks: list[Check] = []
    if given.gguf:
        with tempfile.TemporaryDirectory() as folder:
            checks += _llamacpp(_gguf(given.gguf, Path(folder)), given, model.tokenizer, ours)
    if given.continuous:
        rates = _rates({"continuous": lambda texts, tokens: _continuous(model, texts, tokens)}, given)
        _print("transformers' continuous batching", rates["continuous"])
    if given.against:
        url, _, name = given.against.partition("#")
        rates = _rates({"against": lambda texts, tokens: _completions(url, name, texts, tokens)}, given)
        _print(given.against, rates["against"])
    return checks


def _rates(asks: Mapping[str, Ask], given: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Medians over rounds, each of which measures everything once."""
    seen: dict[str, dict[int, list[float]]] = {name: {streams: [] for streams in STREAMS} for name in asks}
    for ask in asks.values():
        ask(_prompts(1, 0), 8)
    for round_ in range(1, given.rounds + 1):
        for streams in STREAMS:
            for name, ask in asks.items():
                seen[name][streams].append(ask(_prompts(streams, round_), given.tokens))
    return {name: {n: statistics.median(found) for n, found in each.items()} for name, each in seen.items()}


def _print(name: str, rates: Mapping[int, float]) -> None:
    print(f"{name}: " + ", ".join(f"{rate:.1f} tokens/s at {streams}" for streams, rate in rates.items()))


def _prompts(count: int, round_: int) -> list[str]:
    return [
        f"{round_}.{index} Write a long story about {_TOPICS[index % len(_TOPICS)]}, with many turns."
        for index in range(count)
    ]


def _together(work: Callable[[str], int], texts: Iterable[str]) -> float:
    """Run ``work``, which returns its number of tokens, on all texts at once; tokens per second of all."""
    counts: list[int] = []
    threads = [threading.Thread(target=lambda text=text: counts.append(work(text))) for text in texts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def _gguf(given: str, folder: Path) -> Path:
    if given != "demo":
        return Path(given).resolve()
    from ollama_forge.sources.demo import fetch_gguf

    return fetch_gguf(folder)


def _llamacpp(path: Path, given: argparse.Namespace, tokenizer: Any, ours: Mapping[int, float]) -> list[Check]:
    mine, theirs = multiprocessing.Pipe()
    bare = multiprocessing.get_context("spawn").Process(target=_bare_process, args=(theirs, str(path)))
    bare.start()
    port = given.port + 1
    server = _start_server(path, port)

    def ask_bare(texts: Sequence[str], tokens: int) -> float:
        mine.send(([tokenizer.instruction_ids(text) for text in texts], tokens))
        rate: float = mine.recv()
        return rate

    try:
        asks: dict[str, Ask] = {"served": lambda texts, n: _generate(port, texts, n), "bare": ask_bare}
        found = _rates(asks, given)
    finally:
        mine.send(None)
        bare.join()
        os.kill(server.pid, signal.SIGINT)
        server.wait(30)
    _print(f"served by llama.cpp ({path.name})", found["served"])
    _print("bare xllamacpp", found["bare"])
    checks = [
        (f"llama.cpp at {streams} streams, relative to bare xllamacpp", rate / found["bare"][streams], 0.9)
        for streams, rate in found["served"].items()
    ]
    return [*checks, ("one stream of llama.cpp, relative to transformers", found["served"][1] / ours[1], 1.0)]


def _bare_process(pipe: Connection, path: str) -> None:
    """Answer each list of prompts with the tokens per second of all of them at once, until an empty message."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = max(STREAMS)
    params.n_ctx = 1024 * params.n_parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    while question := pipe.recv():
        prompts, tokens = question

        def one(index: str, prompts: Any = prompts, tokens: int = tokens) -> int:
            body = {"prompt": prompts[int(index)], "n_predict": tokens, "temperature": 0, "stream": True}
            last: list[Any] = [None]
            server.handle_completions(body, lambda chunk: last.__setitem__(0, chunk))
            return int(last[0]["usage"]["completion_tokens"])

        pipe.send(_together(one, map(str, range(len(prompts)))))


def _start_server(path: Path, port: int) -> subprocess.Popen[bytes]:
    command = ["abliterate", "serve", "--checkpoint", str(path), "--engine", "llamacpp", "--name", "bench"]
    command += ["--port", str(port), "--slots", str(max(STREAMS))]
    server = subprocess.Popen([sys.executable, "-m", "ollama_forge.cli.main", *command], stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                _generate(port, ["Hello."], 2)
                return server
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise SystemExit("the server does not answer")


def _generate(port: int, texts: Sequence[str], tokens: int) -> float:
    def one(text: str) -> int:
        options = {"num_predict": tokens, "temperature": 0}
        body = {"model": "bench", "prompt": text, "stream": True, "options": options}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/api/generate", json.dumps(body), {"Content-Type": "application/json"})
        *_, last = connection.getresponse()
        connection.close()
        return int(json.loads(last)["eval_count"])

    return _together(one, texts)


# -- others -----------------------------------------------------------------------------------------------------------


def _continuous(model: Any, texts: Sequence[str], tokens: int) -> float:
    from transformers import GenerationConfig

    prompts = [model.tokenizer.instruction_ids(text) for text in texts]
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started = time.perf_counter()
    outputs = model.module.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    count = sum(len(output.generated_tokens) for output in outputs.values())
    return count / (time.perf_counter() - started)


def _completions(url: str, name: str, texts: Sequence[str], tokens: int) -> float:
    place = urlsplit(url.rstrip("/").removesuffix("/v1"))
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def one(text: str) -> int:
        connection = kind(place.hostname or "", place.port, timeout=600)
        body = {"model": name, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        connection.request("POST", f"{place.path}/v1/completions", json.dumps(body), headers)
        count, told = 0, None
        for line in connection.getresponse():
            if line.startswith(b"data:") and b"[DONE]" not in line:
                chunk = json.loads(line[5:])
                count += any(choice.get("text") for choice in chunk.get("choices", ()))
                told = (chunk.get("usage") or {}).get("completion_tokens", told)
        connection.close()
        return count if told is None else told

    return _together(one, texts)

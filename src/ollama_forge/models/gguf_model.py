"""A GGUF file run by llama.cpp (package ``xllamacpp``), as an ``AnsweringModel``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

from ollama_forge.errors import ForgeError, install_hint
from ollama_forge.models import llamacpp_worker
from ollama_forge.models.protocol import Decided
from ollama_forge.system import usable_cores
from ollama_forge.text.tokenizer import Ids, Tokenizer

SLOTS = 8
TOKENIZING_CONTEXT = 256
_LOG_MARK = re.compile(r"^[\d.]+ [A-Z] (?:\w+: )?")


def llamacpp_is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@dataclass(frozen=True)
class LlamaServer:
    """A running llama.cpp server, and the client that talks to it."""

    path: Path
    client: httpx.Client

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """Send a JSON request and return the parsed response.

        Raises:
            ForgeError: the server rejects the request or has ended.
        """
        try:
            answer = self.client.post(route, json=body)
            content = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ForgeError(
                f"llama.cpp stopped running {self.path.name} ({error})", "end other programs if memory ran out"
            ) from error
        if answer.is_error:
            raise ForgeError(
                f"llama.cpp rejects a request: {content.get('error', content)}",
                "report this with the version of xllamacpp",
            )
        return content

    def tokenize(self, text: str) -> Ids:
        """Tokenize a text. Special tokens in the text are recognised; none are added."""
        ids: Ids = self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        return ids


@contextmanager
def llama_server(path: Path, context: int, slots: int = 1, *, adapter: Path | None = None) -> Iterator[LlamaServer]:
    """Run a llama.cpp server for a GGUF file inside the block.

    Args:
        context: maximum number of tokens of a request.
        slots: number of parallel requests.
        adapter: a GGUF adapter to add to the model.

    Raises:
        ForgeError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """
    if not llamacpp_is_installed():
        raise ForgeError(
            "running a GGUF file needs xllamacpp, which is not installed", install_hint("abliterate", "llamacpp")
        )
    command = [sys.executable, "-P", str(Path(llamacpp_worker.__file__)), str(path)]
    command += [str(context * slots), str(slots), str(usable_cores()), *([] if adapter is None else [str(adapter)])]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            if not address.startswith("http://"):
                process.wait()
                log.seek(0)
                reason = _failure_reason(log.read().decode("utf-8", "replace"), process.returncode)
                raise ForgeError(
                    f"llama.cpp cannot load {path}: {reason}",
                    "check that the file is complete and fits the free memory",
                )
            with httpx.Client(base_url=address, timeout=None, trust_env=False) as client:
                yield LlamaServer(path, client)
        finally:
            process.kill()
            process.communicate()


def _failure_reason(log: str, status: int) -> str:
    lines = [line.strip() for line in log.splitlines() if "rror" in line or "fail" in line]
    return _LOG_MARK.sub("", lines[0])[:300] if lines else f"its process ended with status {status}"


class GgufModel:
    """A GGUF file on a running server, prompted with the token ids of the checkpoint it was made from.

    Args:
        tokenizer: the tokenizer of the checkpoint.
    """

    streams: ClassVar[bool] = False

    def __init__(self, server: LlamaServer, tokenizer: Tokenizer) -> None:
        self.server, self.tokenizer = server, tokenizer

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ids]:
        """See ``AnsweringModel.answer``. ``decided`` is ignored: checking it would take longer than it saves."""

        def answer_one(prompt: Ids) -> Ids:
            return self._answer_ids(prompt, max_new_tokens)

        out: list[Ids] = []
        with ThreadPoolExecutor(SLOTS) as pool:
            for ids in pool.map(answer_one, prompts):
                out.append(ids)
                if progress:
                    progress(1)
        return out

    def _answer_ids(self, prompt: Ids, count: int) -> Ids:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
        ids: Ids = self.server.post("/completion", body)["tokens"]
        end = next((place for place, token in enumerate(ids) if token in self.tokenizer.end_ids), len(ids))
        return ids[:end]

"""The client for a running Ollama: version, ``/api/show``, blob upload and ``/api/create``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import ollama

from ollama_forge.checkpoints.gguf.metadata import FileBytes
from ollama_forge.errors import ForgeError, UsageError, did_you_mean
from ollama_forge.ollama.shown import CreateRequest, Shown
from ollama_forge.ollama_address import OWN_SERVER, is_loopback, ollama_url
from ollama_forge.progress import bar, say

FILES_SINCE = (0, 5, 5)  # `files` in create
RENDERER_SINCE = (0, 12, 0)  # `renderer` and `parser` in create

_CONNECT_SECONDS = 5.0
_VERSION_SECONDS = 10.0
_MB = 1_000_000
_RECOGNISED = "using autodetected template "
_LAYERS = ("using existing layer", "creating new layer", "writing manifest", "success")


@dataclass(frozen=True)
class OllamaState:
    """The server that answers at Ollama's address.

    Attributes:
        version: the version that it reports; "" if there is no Ollama.
        problem: why models cannot be registered; "" if they can.
    """

    url: str
    version: str = ""
    problem: str = ""

    def require(self) -> None:
        """Raise ForgeError where there is no Ollama."""
        if self.problem:
            raise _absent(self.problem)

    def older_than(self, version: tuple[int, int, int]) -> bool:
        """Whether its version is older; False for builds from source, which report 0.0.0."""
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", self.version)
        found = tuple(int(part) for part in match.groups()) if match else (0, 0, 0)
        return (0, 0, 0) < found < version

    def warnings(self, *, renderer: bool = False) -> tuple[str, ...]:
        """Warnings about features that this version lacks.

        Args:
            renderer: a RENDERER or PARSER will be set.
        """
        needs = [(FILES_SINCE, "be given files"), *([(RENDERER_SINCE, "keep RENDERER and PARSER")] if renderer else [])]
        return tuple(
            f"Ollama {self.version} at {self.url} is too old to {what}: that takes {_dotted(version)}"
            for version, what in needs
            if self.older_than(version)
        )


class Client(ollama.Client):
    """The official client, extended by upload progress, a check before uploading, renderer and parser, and all of show.

    There is no time limit on answers, and one of five seconds on connecting. Failures raise ForgeError.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or ollama_url()
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        try:
            local = is_loopback(urlsplit(self.url).hostname or "")
            super().__init__(self.url, timeout=timeout, trust_env=not local)  # a proxy never leads back to this machine
        except (ValueError, httpx.InvalidURL) as error:
            raise UsageError(f"OLLAMA_HOST gives {self.url}, which is no address ({error})", "host:port") from None

    def __enter__(self) -> Self:
        return self

    def state(self) -> OllamaState:
        """Ask which server answers.

        Raises:
            ForgeError: it is this project's own server.
        """
        try:
            answer = self._client.get("/api/version", timeout=httpx.Timeout(_VERSION_SECONDS, connect=_CONNECT_SECONDS))
        except httpx.HTTPError as error:
            return OllamaState(self.url, problem=f"no Ollama at {self.url} ({_reason(error)})")
        if answer.headers.get("server", "").startswith(OWN_SERVER):
            raise ForgeError(
                f"{self.url} is a server of ollama-forge, not Ollama: it says yes to creating a model and makes none",
                "set OLLAMA_HOST to where Ollama itself listens, or stop that server and start `ollama serve`",
            )
        try:
            return OllamaState(self.url, version=str(answer.raise_for_status().json()["version"]))
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            return OllamaState(self.url, problem=f"what answers at {self.url} is not Ollama")

    def shown(self, name: str) -> Shown | None:
        """The model of that name; None if there is none."""
        with self._in_one_line(f"showing {name}"):
            answer = self._client.post("/api/show", json={"model": name})
            if answer.status_code == httpx.codes.NOT_FOUND:
                return None
            told = _checked(answer).json()
            if not isinstance(told, dict):
                raise ValueError(f"it answered with a {type(told).__name__}")
            return Shown.of(name, told)

    def alike(self, name: str) -> str:
        """A question after the models of Ollama whose names are like ``name``; "" if there are none."""
        with self._in_one_line("listing its models"):
            told = _checked(self._client.get("/api/tags")).json()
        known = [str(entry.get("name")) for entry in (told.get("models") or ()) if isinstance(entry, dict)]
        return did_you_mean(name, [one.removesuffix(":latest") for one in known])

    def send(self, file: Path | FileBytes, digest: str) -> bool:
        """Upload the file as a blob; False if Ollama has it already."""
        content = file if isinstance(file, FileBytes) else FileBytes(file)
        name = content.path.name
        with self._in_one_line(f"taking {name}"):
            asked = self._client.head(f"/api/blobs/{digest}")
            if asked.status_code != httpx.codes.NOT_FOUND:
                _checked(asked)
                return False
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(content.size)}
            blocks = _blocks(content, f"sending {name} to Ollama, MB")
            _checked(self._client.post(f"/api/blobs/{digest}", content=blocks, headers=headers))
            return True

    def make(self, request: CreateRequest) -> str:
        """Create the model and show Ollama's progress.

        Returns:
            Ollama's name for the chat template that it recognised, for which it uses a form of its own; else "".

        Raises:
            ForgeError: it failed; Ollama may report that only in the last line of a 200 answer.
        """
        last: str | None = None
        recognised = ""
        with self._in_one_line(f"creating {request.model}"), ExitStack() as shown:
            for answer in self._request(
                ollama.ProgressResponse, "POST", "/api/create", json=request.body(), stream=True
            ):
                status = answer.status or ""
                if status != last:
                    shown.close()
                    advance = _following(shown, status, answer.total or 0)
                advance(answer.completed or 0)
                last = status
                recognised = status.removeprefix(_RECOGNISED) if status.startswith(_RECOGNISED) else recognised
        if last != "success":
            raise ForgeError(f"Ollama stopped creating {request.model} after {last!r}", "look into its log")
        return recognised

    def rendered(
        self, model: str, messages: Sequence[Mapping[str, str]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str | None:
        """The prompt that Ollama makes of a conversation; None if its version cannot show it.

        Raises:
            ForgeError: the model cannot be loaded, or Ollama refuses the conversation.
        """
        body = {"model": model, "messages": list(messages), "stream": False, "_debug_render_only": True}
        if tools:
            body["tools"] = list(tools)
        body["options"] = {"num_predict": 1}  # what a version that does not know the field generates
        with self._in_one_line("rendering a prompt"):
            told = _checked(self._client.post("/api/chat", json=body)).json()
            shown = told.get("_debug_info") if isinstance(told, dict) else None
            return str(shown["rendered_template"]) if isinstance(shown, dict) else None

    def why_silent(self, model: str) -> str:
        """Ask the model a short question; why it does not answer, "" if it does.

        An answer that Ollama cannot read as the form that its chat template asks for is an answer.

        Raises:
            ForgeError: Ollama went away.
        """
        messages = [{"role": "user", "content": "Say hello."}]
        request = {"model": model, "stream": False, "options": {"num_predict": 8, "temperature": 0}}
        reason = self._refusal("/api/chat", {**request, "messages": messages})
        if not reason or self._refusal("/api/chat", {**request, "messages": messages, "_debug_render_only": True}):
            return reason
        return self._refusal("/api/generate", {**request, "prompt": "Hello", "raw": True}) and reason

    def _refusal(self, path: str, body: Mapping[str, Any]) -> str:
        """Ollama's reason for refusing a request; "" if it does not."""
        with self._in_one_line("answering a question"):
            answer = self._client.post(path, json=body)
            try:
                _checked(answer)
            except ollama.ResponseError as error:
                return _first_line(error)
        return ""

    @contextmanager
    def _in_one_line(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ollama.ResponseError as error:
            raise ForgeError(
                f"Ollama failed while {doing}: {_first_line(error)}", "its log says more; nothing here was lost"
            ) from error
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _absent(f"no Ollama at {self.url}") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise ForgeError(
                f"Ollama at {self.url} broke off while {doing} ({_reason(error)})",
                "is it still running? nothing here was lost: repeat the command",
            ) from error
        except ValueError as error:
            raise ForgeError(f"{self.url} gave no answer of Ollama's while {doing}", str(error)[:200]) from error


def _following(shown: ExitStack, status: str, total: int) -> Callable[[int], None]:
    """Show a status of Ollama: as a line, or as a progress bar where it gives a total."""
    if not total:
        if not status.startswith(_LAYERS):
            say(f"ollama: {status}")
        return lambda done: None
    advance = shown.enter_context(bar(f"ollama: {status}, MB", max(total // _MB, 1)))
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        advance(done // _MB - told)
        told = done // _MB

    return tell


def digest_of(file: Path | FileBytes) -> str:
    """``sha256:<hex>`` of a file, with a bar."""
    digest = hashlib.sha256()
    content = file if isinstance(file, FileBytes) else FileBytes(file)
    for block in _blocks(content, f"hashing {content.path.name}, MB"):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _blocks(content: FileBytes, title: str) -> Iterator[bytes]:
    done = told = 0
    try:
        with bar(title, max(content.size // _MB, 1)) as advance:
            for block in content.blocks():
                yield block
                done += len(block)
                advance(done // _MB - told)
                told = done // _MB
    except OSError as error:
        raise ForgeError(
            f"{content.path} cannot be read: {error.strerror or error}", "check the path and the disk"
        ) from error


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise ollama.ResponseError(answer.text, answer.status_code)
    return answer


def _first_line(error: ollama.ResponseError) -> str:
    return (error.error.strip().splitlines() or [f"HTTP {error.status_code}"])[0][:300]


def _absent(problem: str) -> ForgeError:
    return ForgeError(problem, "start it with `ollama serve`, or set OLLAMA_HOST to where it listens")


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200] or type(error).__name__

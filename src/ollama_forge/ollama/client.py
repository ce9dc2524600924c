"""The client for a running Ollama: version, ``/api/show``, blob upload and ``/api/create``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import ollama

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.ollama.parameters import Parameters, read_shown
from ollama_forge.ollama_address import OWN_SERVER, is_loopback, ollama_url
from ollama_forge.progress import bar, say

FILES_SINCE = (0, 5, 5)  # `files` in create
RENDERER_SINCE = (0, 12, 0)  # `renderer` and `parser` in create
NO_TEMPLATE = "{{ .Prompt }}"  # what show gives where a model has none

_CONNECT_SECONDS = 5.0
_VERSION_SECONDS = 10.0
_BLOCK = 1 << 20
_MB = 1_000_000
_DIGEST = re.compile(r"sha256[-:]([0-9a-f]{64})")
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


@dataclass(frozen=True)
class Shown:
    """A model as ``/api/show`` describes it; its texts are exact.

    Attributes:
        template: its TEMPLATE, ``{{ .Prompt }}`` where it has none.
        messages: role and content.
        weights, adapters: digests of their blobs, ``sha256:<hex>``; projectors follow the model among the weights.
        quantization: the type of the weights, as Ollama names it.
        draft: whether a draft model belongs to it.
        requires: the oldest version of Ollama that runs it.
        capabilities: what Ollama lets it do: ``completion``, ``vision``, ``tools``, ….
    """

    name: str
    template: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: Parameters = field(default_factory=dict)
    system: str = ""
    license: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    weights: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    quantization: str = ""
    draft: bool = False
    requires: str = ""
    capabilities: tuple[str, ...] = ()

    @property
    def projectors(self) -> tuple[str, ...]:
        """Digests of the projectors."""
        return self.weights[1:]

    @property
    def has_template(self) -> bool:
        return bool(self.renderer or self.parser) or self.template.strip() not in ("", NO_TEMPLATE)

    @classmethod
    def of(cls, name: str, answer: dict[str, Any]) -> Shown:
        """Parse the JSON of ``/api/show``; its Modelfile is read only for what has no JSON field.

        The template in the JSON may be that of the GGUF file, which Ollama then uses; the Modelfile has the TEMPLATE.
        """
        modelfile, system = answer.get("modelfile") or "", answer.get("system") or ""
        template = answer.get("template") or ""
        head = Modelfile.parse(_head(modelfile, template, system))
        return cls(
            name=name,
            template=head.template or template,
            renderer=answer.get("renderer") or head.renderer,
            parser=answer.get("parser") or head.parser,
            parameters=read_shown(answer.get("parameters") or ""),
            system=system,
            license=answer.get("license") or "",
            messages=tuple((each.get("role", ""), each.get("content", "")) for each in answer.get("messages") or ()),
            weights=_digests(head.sources),
            adapters=_digests(head.adapters),
            quantization=(answer.get("details") or {}).get("quantization_level") or "",
            draft=any(command == "DRAFT" for command, _ in head.others),
            requires=answer.get("requires") or "",
            capabilities=tuple(answer.get("capabilities") or ()),
        )


@dataclass(frozen=True)
class CreateRequest:
    """The body of ``POST /api/create``; empty fields are not sent.

    Attributes:
        source: the Ollama model of which everything that is not given is inherited.
        files, adapters, drafts: name and digest of GGUF files that Ollama has as blobs; projectors are among ``files``.
    """

    model: str
    source: str = ""
    files: tuple[tuple[str, str], ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    drafts: tuple[tuple[str, str], ...] = ()
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: Parameters = field(default_factory=dict)
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    requires: str = ""
    quantize: str = ""

    def body(self) -> dict[str, Any]:
        given = {
            "model": self.model,
            "from": self.source,
            "files": dict(self.files),
            "adapters": dict(self.adapters),
            "draft_files": dict(self.drafts),
            "template": self.template,
            "system": self.system,
            "renderer": self.renderer,
            "parser": self.parser,
            "parameters": dict(self.parameters),
            "license": self.licenses[0] if len(self.licenses) == 1 else self.licenses,
            "messages": [{"role": role, "content": content} for role, content in self.messages],
            "requires": self.requires,
            "quantize": self.quantize,
        }
        return {key: value for key, value in given.items() if value}


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

    def send(self, path: Path, digest: str) -> bool:
        """Upload the file as a blob; False if Ollama has it already."""
        with self._in_one_line(f"taking {path.name}"):
            asked = self._client.head(f"/api/blobs/{digest}")
            if asked.status_code != httpx.codes.NOT_FOUND:
                _checked(asked)
                return False
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
            blocks = _blocks(path, f"sending {path.name} to Ollama, MB")
            _checked(self._client.post(f"/api/blobs/{digest}", content=blocks, headers=headers))
            return True

    def make(self, request: CreateRequest) -> None:
        """Create the model and show Ollama's progress.

        Raises:
            ForgeError: it failed; Ollama may report that only in the last line of a 200 answer.
        """
        last: str | None = None
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
        if last != "success":
            raise ForgeError(f"Ollama stopped creating {request.model} after {last!r}", "look into its log")

    @contextmanager
    def _in_one_line(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ollama.ResponseError as error:
            reason = (error.error.strip().splitlines() or [f"HTTP {error.status_code}"])[0][:300]
            raise ForgeError(
                f"Ollama failed while {doing}: {reason}", "its log says more; nothing here was lost"
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


def digest_of(path: Path) -> str:
    """``sha256:<hex>`` of a file, with a bar."""
    digest = hashlib.sha256()
    for block in _blocks(path, f"hashing {path.name}, MB"):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _blocks(path: Path, title: str) -> Iterator[bytes]:
    done = told = 0
    try:
        with path.open("rb") as file, bar(title, max(path.stat().st_size // _MB, 1)) as advance:
            while block := file.read(_BLOCK):
                yield block
                done += len(block)
                advance(done // _MB - told)
                told = done // _MB
    except OSError as error:
        raise ForgeError(f"{path} cannot be read: {error.strerror or error}", "check the path and the disk") from error


def _head(modelfile: str, template: str, system: str) -> str:
    """The Modelfile of ``/api/show`` without TEMPLATE and SYSTEM: their quoting is ambiguous, the JSON has them."""
    for command, text in (("TEMPLATE", template), ("SYSTEM", system)):
        for written in (f'{command} """{text}"""\n', f'{command} "{text}"\n', f"{command} {text}\n"):
            if written in modelfile:
                modelfile = modelfile.replace(written, "", 1)
                break
    return re.split(r"^(?:PARAMETER|LICENSE|MESSAGE) ", modelfile, maxsplit=1, flags=re.MULTILINE)[0]


def _digests(paths: tuple[str, ...]) -> tuple[str, ...]:
    found = (_DIGEST.search(path) for path in paths)
    return tuple(f"sha256:{match[1]}" for match in found if match)


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise ollama.ResponseError(answer.text, answer.status_code)
    return answer


def _absent(problem: str) -> ForgeError:
    return ForgeError(problem, "start it with `ollama serve`, or set OLLAMA_HOST to where it listens")


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200] or type(error).__name__

"""The connection to a model server: its address, its key, its requests, and their errors in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import httpx

from ollama_forge.errors import ForgeError, UsageError, error_line
from ollama_forge.ollama_address import is_loopback

_PATIENCE, _CONNECT = 600.0, 10.0  # seconds
_RETRIES = 2  # of a connection that fails
_EXAMPLE = "for example http://127.0.0.1:8000, or http://127.0.0.1:11434#MODEL"

T = TypeVar("T")
Asked = TypeVar("Asked")


class Connection:
    """A connection that threads may share.

    Args:
        url: the address, without ``/v1`` and without a slash at the end.
        key: the bearer token of all requests; None for none.
        name: what the server is called in messages; its address by default.
        patience: seconds to wait for an answer; None: without end.
    """

    def __init__(self, url: str, key: str | None = None, *, name: str = "", patience: float | None = _PATIENCE) -> None:
        self.url, self.key, self.name, self._patience = url, key, name or url, patience
        self.client = httpx.Client(
            **self.settings,
            transport=httpx.HTTPTransport(retries=_RETRIES) if self._is_here else None,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of an httpx client."""
        return {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(self._patience, connect=_CONNECT),
            "trust_env": not self._is_here,  # no proxy reaches this machine's own servers
            "follow_redirects": True,
        }

    @property
    def _is_here(self) -> bool:
        return is_loopback(httpx.URL(self.url).host)

    def request(self, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object at a route; with a body, it is posted.

        Raises:
            ForgeError: the server is not reached, refuses the request, or does not answer with an object.
        """
        try:
            answer = self._send(route, body)
        except httpx.HTTPError as error:
            raise self._failure(route, error) from error
        try:
            content = answer.json() if answer.content else {}
        except ValueError as error:
            raise self._failure(route, error) from error
        if answer.is_error or not isinstance(content, dict):
            reason = reason_of(content) or answer.reason_phrase
            raise ForgeError(
                f"{self.name} refuses {route}: {answer.status_code} {reason}", "check the address and the model's name"
            )
        return content

    def command(self, route: str, body: Mapping[str, Any]) -> None:
        """Post a body to a route whose answer is not JSON.

        Raises:
            ForgeError: the server is not reached, or refuses the request.
        """
        try:
            answer = self.client.post(route, json=body)
        except httpx.HTTPError as error:
            raise self._failure(route, error) from error
        if answer.is_error:
            try:
                reason = reason_of(answer.json())
            except ValueError:
                reason = answer.text.strip()[:300]
            raise ForgeError(f"{self.name} refuses {route}: {answer.status_code} {reason}", "read the server's log")

    def _send(self, route: str, body: Mapping[str, Any] | None) -> httpx.Response:
        method = "GET" if body is None else "POST"
        try:
            return self.client.request(method, route, json=body)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            return self.client.request(method, route, json=body)  # the server closed an idle connection just then

    def _failure(self, route: str, error: Exception) -> ForgeError:
        return ForgeError(
            f"{self.name} fails at {route} ({error_line(error)})", "check that the server runs, then start again"
        )

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str) -> tuple[Connection, str]:
    """The connection to ``URL`` or ``URL#MODEL``, and the name of the model; "" if there is none.

    The key is the environment's ``OPENAI_API_KEY``, if it is set.

    Raises:
        UsageError: the address is not a URL.
    """
    place, _, model = address.partition("#")
    url = place.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{address} is not the address of a server", _EXAMPLE)
    return Connection(url, os.environ.get("OPENAI_API_KEY", "").strip() or None), model


def pick_model(connection: Connection, model: str, known: Sequence[str]) -> str:
    """The model that is meant: the named one, or the only one.

    Raises:
        UsageError: the server does not have it, or has several and none is named.
    """
    named = model or (known[0] if len(known) == 1 else "")
    found = next((name for name in (named, f"{named}:latest") if name in known), None)
    if found is None:
        url = connection.url
        problem = f"{url} has no model {model}" if model else f"{url} has {len(known)} models"
        raise UsageError(problem, f"give {url}#MODEL; its models: {', '.join(sorted(known)[:10]) or 'none'}")
    return found


def reason_of(content: Any) -> str:
    """What a server's error says."""
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error or "")[:300]


def ask_all(
    ask: Callable[[Asked], T], asked: Sequence[Asked], at_once: int, progress: Callable[[int], None] | None = None
) -> list[T]:
    """The results of ``ask`` in order, several requests at a time; after a failure no further request is sent.

    Args:
        progress: called with the number of newly finished requests.
    """
    out: list[T] = []
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(ask, one) for one in asked]
        try:
            for each in waiting:
                out.append(each.result())
                if progress is not None:
                    progress(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return out

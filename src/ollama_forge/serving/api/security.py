"""Access control for all routes: the Host header, the Origin of web pages, the API key and the size of bodies."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_forge import __version__
from ollama_forge.serving.api.routing import Api, failure_message

DEFAULT_PORT = 11435
MAX_BODY = 128 << 20

_LOCAL = ("localhost", "127.0.0.1", "0.0.0.0")
_APPS = ("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")
_LOCAL_NAMES = ("localhost", "local", "internal")
_PRIVATE = [ipaddress.ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]
_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    "X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
    "X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_MAX_AGE = str(12 * 3600)


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, and which requests it accepts.

    Attributes:
        host, port: the address to bind.
        api_key: the key that clients must send; None: no key.
        origins: origins of web pages that may call, in addition to local ones; one ``*`` in each matches any text.
        max_body: maximum size of a request's body in bytes.
        write_timeout: seconds after which a client is dropped that took none of the bytes that wait for it.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    write_timeout: float = 60.0


class _TooLargeError(Exception):
    """The body of a request is larger than ``max_body``."""


class Origins:
    """The origins that may call: pages of this machine, desktop applications, and the patterns ``more``."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        local = [f"{scheme}://{host}{port}" for scheme in ("http", "https") for host in _LOCAL for port in ("", ":*")]
        patterns = [origin.strip() for origin in (*more, *local, *_APPS) if origin.strip()]
        self.all = "*" in patterns
        self._patterns = [
            re.compile(".*".join(map(re.escape, pattern.split("*", 1))), re.S | re.I) for pattern in patterns
        ]

    def allow(self, origin: str) -> bool:
        return self.all or any(pattern.fullmatch(origin) for pattern in self._patterns)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allow_host(header: str) -> bool:
    """Whether a Host header can mean a server on loopback; any other may come from a DNS rebinding attack."""
    host = _without_port(header)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower()
        own = socket.gethostname().lower()
        return name in ("", "localhost", own) or name.endswith(tuple(f".{end}" for end in _LOCAL_NAMES))
    private = any(address in net for net in _PRIVATE if net.version == address.version)
    return address.is_loopback or address.is_unspecified or private


def _without_port(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


class Guard:
    """Rejects requests that are not allowed, and answers unexpected errors without details of this machine.

    Args:
        api_of: the API that a path belongs to, which has its own form of errors.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, api_of: Callable[[str], Api]) -> None:
        self.app, self.settings, self.api_of = app, settings, api_of
        self.origins = Origins(settings.origins)
        self.check_host = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        foreign = origin and urlsplit(origin).netloc != headers.get("host")
        allowed = origin if foreign and self.origins.allow(origin) else ""
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                out = MutableHeaders(scope=message)
                out["server"] = f"ollama-forge/{__version__}"
                if allowed:
                    out["access-control-allow-origin"] = "*" if self.origins.all else allowed
                    out.add_vary_header("Origin")
            await send(message)

        refusal = self._refusal(scope, headers, bool(foreign), bool(allowed))
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        try:
            await self.app(scope, self._bounded(scope, receive), answer)
        except _TooLargeError:
            status, text = 413, f"the request is larger than {self.settings.max_body} bytes"
        except Exception as error:
            status, text = 500, failure_message(error)
            if begun:
                raise
        else:
            return
        await self.api_of(scope["path"]).failure(status, text)(scope, receive, answer)

    def _refusal(self, scope: Scope, headers: Headers, foreign: bool, allowed: bool) -> Response | None:
        if foreign and not allowed:
            return Response(status_code=403)
        if foreign and scope["method"] == "OPTIONS":
            return Response(status_code=204, headers=_preflight())
        if self.check_host and not allow_host(headers.get("host", "")):
            return Response(status_code=403)
        if not self._has_key(scope, headers):
            return self.api_of(scope["path"]).failure(401, "unauthorized: the API key is missing or wrong")
        length = headers.get("content-length", "")
        if self._is_bounded(scope) and length.isdigit() and int(length) > self.settings.max_body:
            return self.api_of(scope["path"]).failure(413, f"the request is larger than {self.settings.max_body} bytes")
        return None

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        if self.settings.api_key is None or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD")):
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        brought = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]  # Anthropic's
        return any(hmac.compare_digest(key.encode(), self.settings.api_key.encode()) for key in brought)

    def _is_bounded(self, scope: Scope) -> bool:
        return not scope["path"].startswith("/api/blobs/")  # blobs are hashed as they arrive, and not kept in memory

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        if not self._is_bounded(scope):
            return receive
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.settings.max_body:
                raise _TooLargeError
            return message

        return bounded


def _preflight() -> dict[str, str]:
    return {
        "access-control-allow-methods": _METHODS,
        "access-control-allow-headers": _HEADERS,
        "access-control-max-age": _MAX_AGE,
    }

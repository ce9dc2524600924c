"""Running the application: the socket first, then the model, and an end in which streams end cleanly."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ollama_forge import __version__
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say
from ollama_forge.serving.http.app import build_app
from ollama_forge.serving.http.security import is_loopback
from ollama_forge.serving.http.settings import ServeSettings
from ollama_forge.serving.served import ServedModel

GRACE = 3.0  # seconds in which answers may end by themselves
_LAST = 5  # seconds more in which they are told to
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that the port is ours while the model loads; clients wait meanwhile.

    Raises:
        ForgeError: the port is in use, or there is no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ForgeError(f"cannot listen at {host}: {error}", "give an address of this machine, or 0.0.0.0") from None
    try:
        if sys.platform != "win32":  # there the option lets two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = f"port {port} of {host} cannot be used: {error.strerror or error}"
        raise ForgeError(why, "another server runs there? choose another --port") from None
    return listening


def announce(name: str, settings: ServeSettings, listening: socket.socket) -> None:
    """Say where the model is served and how clients get there."""
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reached = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    key = "any key" if settings.api_key is None else "with the API key"
    say(f"{name} is served at http://{reached}:{port}")
    say(f"  ollama:           OLLAMA_HOST={reached}:{port} ollama run {name}")
    say(f"  OpenAI clients:   OPENAI_BASE_URL=http://{reached}:{port}/v1 ({key})")
    say(f"  Anthropic's:      ANTHROPIC_BASE_URL=http://{reached}:{port}")
    if not is_loopback(settings.host):
        keyless = "" if settings.api_key else " and nobody is asked for a key (--api-key)"
        say(f"warning: {settings.host} is reached from other machines{keyless}")


def serve(model: ServedModel, settings: ServeSettings, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; returns when what ran has ended."""
    server_of(model, settings).run(sockets=[listening])


def server_of(model: ServedModel, settings: ServeSettings) -> Server:
    config = uvicorn.Config(
        build_app(model, settings),
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(GRACE) + _LAST,
    )
    return Server(config, model)


class Server(uvicorn.Server):
    """Ends answers before it ends connections, and takes a signal as the wish to end, not as a failure."""

    def __init__(self, config: uvicorn.Config, model: ServedModel) -> None:
        super().__init__(config)
        self._model = model

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        try:
            before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever started us ends us
            yield
            return
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(GRACE)
        self._model.stopping = True


class Protocol(H11Protocol):
    """Says who answers also where a request is no HTTP."""

    def send_400_response(self, msg: str) -> None:
        body = msg.encode("ascii", "replace")
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
            f"Server: ollama-forge/{__version__}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

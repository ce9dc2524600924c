"""Runs the application: binds the socket before the model loads, and ends running streams before it stops."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ollama_forge import __version__
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say, warn
from ollama_forge.serving.api.app import build_app
from ollama_forge.serving.api.security import ServeSettings, is_loopback
from ollama_forge.serving.api.telemetry import log_requests
from ollama_forge.serving.registry import ModelRegistry
from ollama_forge.system import return_freed_memory

GRACE = 3.0  # seconds in which running answers may finish
_MORE_GRACE = 5  # more seconds, in which answers that still run end with an error
_BACKLOG = 2048
_BETWEEN_TRIMS = 10  # seconds; each trim takes milliseconds
_LOOKS = 8  # at a client that does not read, within the write timeout


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket before the model loads, so that clients can connect and wait.

    Raises:
        ForgeError: the port is in use, or ``host`` is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ForgeError(f"cannot listen at {host}: {error}", "give an address of this machine, or 0.0.0.0") from None
    try:
        if sys.platform != "win32":  # on Windows the option lets two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = f"port {port} of {host} cannot be used: {error.strerror or error}"
        raise ForgeError(why, "stop the server that uses the port, or choose another --port") from None
    return listening


def announce(name: str, settings: ServeSettings, listening: socket.socket, *, limits: str = "", more: int = 0) -> None:
    """Print the address of the server and how clients connect to it.

    Args:
        limits: what cannot be done with the model.
        more: how many other models are served.
    """
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reached = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    key = "any key" if settings.api_key is None else "with the API key"
    say(f"{name}{f' and {more} more' if more else ''} {'are' if more else 'is'} served at http://{reached}:{port}")
    if limits:
        say(f"  limits:             {limits}")
    say(f"  ollama:             OLLAMA_HOST={reached}:{port} ollama run {name}")
    say(f"  OpenAI clients:     OPENAI_BASE_URL=http://{reached}:{port}/v1 ({key})")
    say(f"  Anthropic clients:  ANTHROPIC_BASE_URL=http://{reached}:{port}")
    if not is_loopback(settings.host):
        keyless = "" if settings.api_key else ", and it needs no API key; set one with --api-key"
        warn(f"{settings.host} is reached from other machines{keyless}")


def serve(registry: ModelRegistry, settings: ServeSettings, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; return when all requests have ended. Each is logged in a line on stderr."""
    log_requests()
    server_of(registry, settings).run(sockets=[listening])


def server_of(registry: ModelRegistry, settings: ServeSettings) -> Server:
    """The server of the models of a registry; it does not run yet."""

    class Timed(Protocol):
        write_timeout = settings.write_timeout

    config = uvicorn.Config(
        build_app(registry, settings),
        http=Timed,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(GRACE) + _MORE_GRACE,
        callback_notify=_trim,
        timeout_notify=_BETWEEN_TRIMS,
    )
    return Server(config, registry)


async def _trim() -> None:
    """Return freed memory to the system: prompts of many lengths leave holes between what is in use."""
    await asyncio.to_thread(return_freed_memory)


class Server(uvicorn.Server):
    """Ends running answers before it closes connections, and treats SIGINT and SIGTERM as a normal end."""

    def __init__(self, config: uvicorn.Config, registry: ModelRegistry) -> None:
        super().__init__(config)
        self.last_notified = time.time()  # so that the first trim is not at the start
        self._registry = registry

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        try:
            before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # outside the main thread, the caller stops the server
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
        for model in self._registry.models:
            model.stopping = True


class Protocol(H11Protocol):
    """Drops clients that do not read, and sends the Server header also in the response to what is not valid HTTP.

    Attributes:
        write_timeout: seconds after which a connection is closed whose client took none of the bytes that wait for it.
            A client that takes some in that time is not dropped, however slow it is.
    """

    write_timeout: float
    _watching: asyncio.TimerHandle | None = None
    _left = 0  # bytes that the client had not taken at the last look
    _taken_at = 0.0  # the loop's time when it was last seen to take some

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # it closes when the client has read all of this
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._stop_watching()
        self._left, self._taken_at = unread_bytes(self.transport), self.loop.time()
        self._look_later()

    def _look_later(self) -> None:
        self._watching = self.loop.call_later(self.write_timeout / _LOOKS, self._look)

    def _look(self) -> None:
        before, self._left = self._left, unread_bytes(self.transport)
        if self._left < before:
            self._taken_at = self.loop.time()
        if self.loop.time() - self._taken_at >= self.write_timeout:
            self.transport.abort()
        else:
            self._look_later()

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    def send_400_response(self, msg: str) -> None:
        body = msg.encode("ascii", "replace")
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
            f"Server: ollama-forge/{__version__}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def unread_bytes(transport: asyncio.Transport) -> int:
    """Number of written bytes that the client has not received, as far as the system tells.

    They wait in the transport, then in the socket's send buffer. The transport alone would show a slow client's reading
    only every few hundred kilobytes, because the system asks for more bytes when much of the send buffer is free.
    """
    left = transport.get_write_buffer_size()
    opened = transport.get_extra_info("socket")
    if sys.platform == "linux" and opened is not None and (number := opened.fileno()) >= 0:
        import fcntl
        import termios

        left += struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))[0]
    return left

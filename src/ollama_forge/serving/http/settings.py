"""The settings of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PORT = 11435
MAX_BODY = 128 << 20


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, and which requests it accepts.

    Attributes:
        host, port: the address to bind.
        api_key: the key that clients must send; None: no key.
        origins: origins of web pages that may call, in addition to local ones; one ``*`` in each matches any text.
        max_body: maximum size of a request's body in bytes.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY

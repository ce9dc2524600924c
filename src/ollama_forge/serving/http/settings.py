"""What a server is told besides its model."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PORT = 11435
MAX_BODY = 128 << 20


@dataclass(frozen=True)
class ServeSettings:
    """Where and for whom.

    Attributes:
        api_key: what clients must bring as a bearer token; None: nothing.
        origins: more of the pages that may call, beside local ones; one ``*`` in each stands for anything.
        max_body: bytes that a request may have.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY

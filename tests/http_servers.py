"""A loopback HTTP server for tests that says nothing where a client breaks off or a handler is told to."""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """Its errors do not reach stderr, where a test may be reading what the program says."""

    def handle_error(self, request: Any, *_: Any) -> None:
        """Print nothing."""

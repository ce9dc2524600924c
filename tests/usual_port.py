"""The connections that this process opened to the port where a user's Ollama listens."""

from __future__ import annotations

from typing import Any

PORT = 11434
TEST = "test_the_suite_left_the_usual_port_alone"

opened: list[object] = []


def note(event: str, arguments: tuple[Any, ...], *, port: int = PORT, into: list[object] = opened) -> None:
    """An audit hook."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][1] == port:
        into.append(arguments[1])

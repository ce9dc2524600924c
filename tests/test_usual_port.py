"""The tests leave the user's Ollama alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

from ollama_forge.ollama.client import Client
from tests import usual_port


def test_connections_are_noted() -> None:
    """The hook sees a connection to another port, when told to look for that one."""
    noted: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        sys.addaudithook(partial(usual_port.note, port=address[1], into=noted))
        socket.create_connection(address).close()
    assert noted == [address]


def test_no_ollama_is_found_where_a_test_names_none() -> None:
    with Client() as client:
        assert client.url == "http://127.0.0.1:9"
        assert client.state().problem
    script = "from ollama_forge.ollama_address import ollama_url; print(ollama_url())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "http://127.0.0.1:9"  # a child has it too
    assert not Path(os.environ["OLLAMA_MODELS"]).exists()


def test_the_suite_left_the_usual_port_alone() -> None:
    """Runs last; see ``conftest.py``."""
    assert usual_port.opened == []

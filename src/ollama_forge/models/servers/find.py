"""Find out which kind of server answers at an address."""

from __future__ import annotations

from ollama_forge.errors import ForgeError
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.models.servers.connection import Connection, connect
from ollama_forge.models.servers.llama import LlamaServer
from ollama_forge.models.servers.token_server import TokenServer
from ollama_forge.models.servers.vllm import VllmServer


def find_server(address: str) -> TokenServer | ChatServer:
    """The model at ``URL`` or ``URL#MODEL``: of a vLLM, a llama-server, an Ollama, or another OpenAI-compatible server.

    Raises:
        UsageError: the address is not a URL, or the server does not have the model.
        ForgeError: no such server answers there.
    """
    connection, model = connect(address)
    return token_server(connection, model) or ChatServer.at(connection, model)


def token_server(connection: Connection, model: str) -> TokenServer | None:
    """The server behind a connection, if it takes token ids."""
    return VllmServer.at(connection, model) or LlamaServer.at(connection)


def find_token_server(address: str) -> TokenServer:
    """As ``find_server``, of the kinds that take token ids.

    Raises:
        UsageError: the address is not a URL, or the server does not have the model.
        ForgeError: neither a vLLM nor a llama-server answers there.
    """
    connection, model = connect(address)
    found = token_server(connection, model)
    if found is None:
        reason = "other servers take no token ids"
        try:
            connection.request("/v1/models")
        except ForgeError as error:
            reason = error.message
        raise ForgeError(
            f"neither a llama-server nor a vLLM answers at {connection.url}: {reason}",
            "for example http://127.0.0.1:8080, or http://127.0.0.1:8000#MODEL",
        )
    return found

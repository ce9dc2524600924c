"""Who answers in place of transformers: a vLLM that is started for one checkpoint at a time, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import longest_request
from ollama_forge.evaluation.tokens import check_server_tokens
from ollama_forge.models.chat_model import LoadSettings, load_tokenizer
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.models.servers.token_server import RemoteModel, TokenServer
from ollama_forge.models.servers.vllm_process import VllmSettings, vllm_server
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.progress import say
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.text.tokenizer import Tokenizer

Server = TokenServer | ChatServer


def server_identity(server: Server) -> dict[str, Any]:
    """What tells a model on a server from others, as JSON values."""
    if isinstance(server, ChatServer):
        return {key: value for key, value in asdict(server).items() if key != "key"}
    return {"url": server.connection.url, "kind": server.name, **server.described}


class VllmAnswers:
    """Starts a vLLM for one checkpoint at a time.

    Args:
        load: the dtype is vLLM's too, and the prompts are rendered alike.
        prompts: all prompts that may be asked, as the longest one bounds the context length.
    """

    def __init__(self, settings: VllmSettings, load: LoadSettings, prompts: Sequence[Prompt]) -> None:
        self.settings, self._load, self._prompts = settings, load, prompts
        self._running = ExitStack()
        self._model: RemoteModel | None = None
        self._checkpoint: Checkpoint | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on, as JSON values."""
        return {**asdict(self.settings), "python": None, "version": self.settings.version()}

    def get(self, checkpoint: Checkpoint) -> RemoteModel:
        """The vLLM of a checkpoint, which is started unless it runs.

        Raises:
            ForgeError: it does not start.
        """
        if self._model is None or self._checkpoint is not checkpoint:
            self.drop()
            tokenizer = load_tokenizer(checkpoint, None, self._load)
            server = self._running.enter_context(
                vllm_server(
                    checkpoint,
                    self.settings,
                    self._load,
                    context=longest_request(tokenizer, self._prompts),
                )
            )
            self._model, self._checkpoint = RemoteModel(server, tokenizer), checkpoint
            detect_thought(self._model)
        return self._model

    def drop(self) -> None:
        """End the vLLM that runs."""
        self._model = None
        self._running.close()


def with_tokens_of(tokenizer: Tokenizer, server: Server, address: str) -> Server:
    """A server that is asked with token ids, if they are those of a tokenizer; else the same one asked with messages.

    Args:
        address: ``URL`` or ``URL#MODEL``.

    Raises:
        ForgeError: the server fails.
    """
    if isinstance(server, ChatServer):
        return server
    problem = check_server_tokens(server, tokenizer) or _missing_ids(server)
    if problem is None:
        return server
    say(f"note: {address} {problem}; it is asked with messages, and its own template applies")
    return ChatServer.at(server.connection, address.partition("#")[2], by_openai=True)


def _missing_ids(server: TokenServer) -> str | None:
    """Why a server cannot be asked with token ids; None if it can."""
    try:
        server.complete([0], 1, ())
    except ForgeError as error:
        return f"takes no token ids ({error.message})"
    return None

"""A model on a server that takes and gives token ids, so that tokens and prompts stay the checkpoint's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

from ollama_forge.models.protocol import Decided
from ollama_forge.models.servers.connection import Connection, ask_all
from ollama_forge.text.tokenizer import Ids, Tokenizer


class TokenServer(Protocol):
    """A server whose prompts and answers are token ids.

    Attributes:
        name: of the program.
        context_length: maximum number of tokens of prompt and answer; None: the server does not say.
        at_once: number of requests that it works on at the same time.
    """

    @property
    def name(self) -> str: ...

    @property
    def connection(self) -> Connection: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def at_once(self) -> int: ...

    @property
    def described(self) -> Mapping[str, Any]:
        """What the server says of its model, as JSON values, so that another model is told from it."""

    def tokenize(self, text: str) -> Ids | None:
        """The server's tokens of a text, special tokens included; None if it does not tokenize."""

    def complete(self, prompt: Sequence[int], max_tokens: int, end_ids: Collection[int]) -> Ids:
        """The greedy continuation of a prompt, which may hold an end token.

        Raises:
            ForgeError: the server fails or refuses the request.
        """


@dataclass(frozen=True)
class RemoteModel:
    """An ``AnsweringModel`` on a server.

    Attributes:
        tokenizer: that of the checkpoint that the server runs.
    """

    streams: ClassVar[bool] = False

    server: TokenServer
    tokenizer: Tokenizer

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ids]:
        """See ``AnsweringModel.answer``. ``decided`` is ignored: checking it would take longer than it saves."""
        ask = partial(self._answer_one, max_new_tokens=max_new_tokens)
        return ask_all(ask, prompts, self.server.at_once, progress)

    def _answer_one(self, prompt: Ids, max_new_tokens: int) -> Ids:
        ends = self.tokenizer.end_ids
        ids = self.server.complete(prompt, max_new_tokens, ends)
        return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]

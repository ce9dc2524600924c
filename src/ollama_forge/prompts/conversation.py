"""A prompt of several messages, and files of such prompts (JSON Lines)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ollama_forge.errors import ForgeError
from ollama_forge.prompts.normalise import normalise

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One message: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with one of the user, for the model to answer.

    Attributes:
        kind: what is asked for, such as ``facts`` or ``code``.
        language: ISO code of the language of the last message.
    """

    kind: str
    messages: tuple[Message, ...]
    language: str = "en"

    @property
    def text(self) -> str:
        """All messages as one text, for hashes and comparisons."""
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


Prompt: TypeAlias = str | Conversation  # a single instruction, or a conversation


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """The messages of a prompt, for a chat template."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def text_of(prompt: Prompt) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else prompt.text


def request_of(prompt: Prompt) -> str:
    """What is answered: a single instruction, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content


def read_conversations(path: Path) -> tuple[Conversation, ...]:
    """Read a file with one JSON object per line: ``kind``, ``messages``, and ``language`` if it is not English.

    Raises:
        ForgeError: the file is missing or a line does not describe a conversation.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ForgeError(f"{path} cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError:
        raise ForgeError(f"{path} is not UTF-8", "save the file as UTF-8") from None
    return tuple(_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip())


def _conversation(path: Path, number: int, line: str) -> Conversation:
    try:
        data = json.loads(line)
        messages = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in data["messages"])
        found = Conversation(str(data.get("kind", "")), messages, str(data.get("language", "en")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = Conversation("", ())
    roles = [message.role for message in found.messages]
    if not roles or roles[-1] != "user" or set(roles) - set(ROLES) or not normalise(found.messages[-1].content):
        raise ForgeError(
            f"{path}, line {number} is not a conversation that ends with a message of the user",
            'expected: {"kind": "facts", "messages": [{"role": "user", "content": "..."}]}',
        )
    return found

"""The training prompts: the files beside this module, and the *fit* part of the curated pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.prompts.curated import curated_pairs
from ollama_forge.prompts.part import Part
from ollama_forge.prompts.split import part_of_pair

FOLDER = Path(__file__).resolve().parent
CONVERSATIONS = (FOLDER / "prompts_a.jsonl", FOLDER / "prompts_b.jsonl")
BORDERLINE = FOLDER / "borderline.jsonl"
HARMFUL = FOLDER / "harmful.txt"
HARMLESS = FOLDER / "harmless.txt"  # a first section in the forms of harmful.txt, a second one that sounds unsafe
Message = dict[str, str]
Conversation = tuple[Message, ...]
MAX_EXCHANGE = 240  # characters of a first exchange: a longer one costs time and teaches nothing more about refusing


@dataclass(frozen=True)
class TrainingPrompts:
    """The training prompts by kind.

    Attributes:
        varied: harmless conversations of all kinds, some with a system prompt or several turns.
        borderline: harmless conversations that sound unsafe.
        parallel: harmless instructions in the form of harmful ones: those of the fit part, and of ``harmless.txt``.
        harmful: harmful instructions: those of the fit part, and those of ``harmful.txt``.
    """

    varied: tuple[Conversation, ...]
    borderline: tuple[Conversation, ...]
    parallel: tuple[Conversation, ...]
    harmful: tuple[str, ...]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def training_prompts() -> TrainingPrompts:
    fit = [pair for pair in curated_pairs() if part_of_pair(pair.index) is Part.FIT]
    alike, sensitive = read_sections(HARMLESS)
    return TrainingPrompts(
        varied=tuple(conversation for path in CONVERSATIONS for conversation in read_conversations(path)),
        borderline=(*read_conversations(BORDERLINE), *((user(line),) for line in sensitive)),
        parallel=(*((user(pair.harmless),) for pair in fit), *((user(line),) for line in alike)),
        harmful=(*(pair.harmful for pair in fit), *(line for lines in read_sections(HARMFUL) for line in lines)),
    )


def read_sections(path: Path) -> list[list[str]]:
    """The lines of a text file, divided at the comment lines that open its sections."""
    sections: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            sections.append([])
        elif line.strip():
            sections[-1].append(line.strip())
    return sections


def read_conversations(path: Path) -> tuple[Conversation, ...]:
    """The ``messages`` of each line; the last message is the user's."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return tuple(tuple(json.loads(line)["messages"]) for line in lines if line.strip())


class Contexts:
    """System prompts and first exchanges of the varied conversations, to put before another instruction.

    Args:
        answers: the model's own answer to each of the varied conversations, for exchanges of one turn.
    """

    def __init__(self, varied: Sequence[Conversation], answers: Sequence[str]) -> None:
        self.systems = [c[0] for c in varied if c[0]["role"] == "system"]
        self.exchanges: list[Conversation] = []
        for conversation, answer in zip(varied, answers, strict=True):
            turns = [message for message in conversation if message["role"] != "system"]
            exchange = (*turns[:2],) if len(turns) > 1 else (turns[0], {"role": "assistant", "content": answer})
            if sum(len(message["content"]) for message in exchange) <= MAX_EXCHANGE:
                self.exchanges.append(exchange)

    def around(self, instruction: str, draw: random.Random) -> Conversation:
        """The instruction behind a system prompt, behind a first exchange, or alone, in three of four cases."""
        kind = draw.random()
        if kind < 1 / 8:
            return (draw.choice(self.systems), user(instruction))
        if kind < 1 / 4:
            return (*draw.choice(self.exchanges), user(instruction))
        return (user(instruction),)

"""The terminal chat: multi-turn, streamed, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from ollama_forge.checkpoints.source import resolve
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.names import run_folder
from ollama_forge.progress import say, step
from ollama_forge.serving.sampling import Conversation, Sampling

HELP = """\
/system TEXT     set the system prompt and start over (without TEXT: none)
/set NAME VALUE  temperature, top_k, top_p, seed, num_predict (without NAME: show them)
/clear           forget the conversation
/bye             leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(*, name: str | None, checkpoint: str | None, revision: str | None = None, load: LoadSettings) -> None:
    """Talk to the model that ``run`` made under ``name``, or to ``checkpoint``, until the input ends.

    Raises:
        UsageError: neither or both are given.
        ForgeError: there is no such checkpoint.
    """
    if (name is None) == (checkpoint is None):
        raise UsageError("give either --name or --checkpoint", "--name is what run was given")
    if name is not None:
        folder = run_folder(name) / "checkpoint"
        if not folder.is_dir():
            raise ForgeError(f"there is no {folder}", f"ollama-forge abliterate run --model … --name {name} makes it")
        checkpoint = str(folder)
    assert checkpoint is not None
    source = resolve(checkpoint, revision)
    with step(f"loading {Path(source.label).name}"):
        model = ChatModel.load(source, load)
    if sys.stdin.isatty():
        import readline  # noqa: F401 -- line editing for input()

        say("/help lists the commands, /bye leaves")
    Chat(model).loop(_lines())


def _lines() -> Iterator[str]:
    prompt = ">>> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/bye or Ctrl-D leaves")


class Chat:
    """One conversation with one model."""

    def __init__(self, model: ChatModel, out: TextIO = sys.stdout) -> None:
        self.model, self.out = model, out
        self.conversation = Conversation(model)
        self.sampling = Sampling()
        self.system = model.settings.system
        self.messages: list[dict[str, str]] = []

    def loop(self, lines: Iterable[str]) -> None:
        for line in lines:
            text = line.strip()
            if text in ("/bye", "/exit", "/quit"):
                return
            if text.startswith("/"):
                self.command(text)
            elif text:
                self.turn(text)

    def command(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        match word:
            case "/help" | "/?":
                say(HELP)
            case "/clear":
                self.messages.clear()
                say("forgotten")
            case "/system":
                self.system = rest.strip() or None
                self.messages.clear()
                say("system prompt set, conversation started over" if self.system else "no system prompt, started over")
            case "/set":
                self.set(rest.split())
            case _:
                say(f"unknown command {word}; /help lists them")

    def set(self, words: list[str]) -> None:
        kinds = {f.name: int if f.name in ("top_k", "seed", "num_predict") else float for f in fields(Sampling)}
        if not words:
            say(", ".join(f"{name} {getattr(self.sampling, name)}" for name in kinds))
            return
        if len(words) == 3 and words[0] == "parameter":  # as the ollama command spells it
            words = words[1:]
        if len(words) != 2 or words[0] not in kinds:
            say(f"/set NAME VALUE, NAME one of {', '.join(kinds)}")
            return
        try:
            value: Any = kinds[words[0]](words[1])
            self.sampling = replace(self.sampling, **{words[0]: value})
        except ValueError:
            say(f"{words[1]} is not a number")

    def turn(self, text: str) -> None:
        """Answer one message; what was said before Ctrl-C stays part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompt = self.model.encode(self.model.render([*system, *self.messages]))
        except ForgeError as error:
            self.messages.pop()
            say(f"error: {error.message}")
            return
        said = ""
        ids: list[int] = []
        try:
            for token in self.conversation.stream(prompt, self.sampling):
                ids.append(token)
                whole = self.model.decode(ids)
                if not whole.endswith("\ufffd"):  # half of a character waits for its other half
                    self.out.write(whole[len(said) :])
                    self.out.flush()
                    said = whole
        except KeyboardInterrupt:
            pass
        self.out.write("\n")
        self.out.flush()
        self.messages.append({"role": "assistant", "content": said})

"""The terminal chat: multi-turn, streamed, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import run_folder
from ollama_forge.progress import say, status
from ollama_forge.serving.asks import Message
from ollama_forge.serving.engines.base import Sampling
from ollama_forge.serving.talkers import DEFAULT_SERVER, Talker, Wishes, running_server

if TYPE_CHECKING:
    from ollama_forge.models.chat_model import LoadSettings

HELP = """\
/system TEXT     set the system prompt and start over (without TEXT: none)
/set NAME VALUE  an option of sampling, num_predict, num_ctx; think on, off or a level (without NAME: show them)
/clear           forget the conversation
/bye             leave (so does Ctrl-D); Ctrl-C stops an answer"""
_COUNTS = ("top_k", "seed", "repeat_last_n", "num_predict", "num_ctx")
_SAMPLING = tuple(f.name for f in fields(Sampling))
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(
    *,
    name: str | None,
    checkpoint: str | None,
    revision: str | None = None,
    load: LoadSettings,
    wishes: Wishes | None = None,
    images: Sequence[bytes] = (),
    server: str = DEFAULT_SERVER,
) -> None:
    """Talk to the model that ``run`` made under ``name``, or to ``checkpoint``, until the input ends.

    A server of this program that runs at ``server`` and serves ``name`` answers, where nothing is asked about loading.

    Args:
        images: what goes with the first message.

    Raises:
        UsageError: neither or both are given.
        ForgeError: there is no such checkpoint.
    """
    if (name is None) == (checkpoint is None):
        raise UsageError("give either --name or --checkpoint", "--name is what run was given")
    talker = _server_for(name, load, server) or _load(name, checkpoint, revision, load)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401 -- line editing for input()

        say("/help lists the commands, /bye leaves")
    try:
        Chat(talker, wishes=wishes, system=load.system, images=images).loop(_lines())
    finally:
        talker.close()


def _server_for(name: str | None, load: LoadSettings, server: str) -> Talker | None:
    if name is None or load != type(load)(system=load.system):
        return None
    found = running_server(server, name)
    if found is not None:
        say(f"{name} is served at {server}")
    return found


def _load(name: str | None, checkpoint: str | None, revision: str | None, load: LoadSettings) -> Talker:
    from ollama_forge.checkpoints.resolve import resolve
    from ollama_forge.serving.served import ServedModel
    from ollama_forge.serving.talkers import LocalTalker

    if name is not None:
        folder = run_folder(name) / "checkpoint"
        if not folder.is_dir():
            raise ForgeError(f"there is no {folder}", f"ollama-forge abliterate run --model … --name {name} makes it")
        checkpoint = str(folder)
    assert checkpoint is not None
    source = resolve(checkpoint, revision)
    label = name or Path(source.label).name
    with status(f"loading {label}"):
        return LocalTalker(ServedModel.load(source, label, load=replace(load, system=None), max_queue=1))


def _lines() -> Iterator[str]:
    prompt = ">>> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/bye or Ctrl-D leaves")


def read_format(value: str) -> str:
    """``--format``: ``json``, or the file that holds a JSON schema; the schema's text.

    Raises:
        UsageError: there is no such file, or no JSON object in it.
    """
    if value == "json":
        return '{"type":"object"}'
    try:
        schema = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--format {value}: {error}", "give json, or a file that holds a JSON schema") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{value} is not a JSON schema", "it must hold an object")
    return json.dumps(schema)


def read_images(paths: Sequence[str]) -> list[bytes]:
    """The bytes of image files.

    Raises:
        UsageError: one cannot be read.
    """
    try:
        return [Path(path).read_bytes() for path in paths]
    except OSError as error:
        raise UsageError(f"--image {error.filename} cannot be read: {error.strerror}", "give a .png or .jpg") from None


class Chat:
    """One conversation."""

    def __init__(
        self,
        talker: Talker,
        out: TextIO = sys.stdout,
        *,
        wishes: Wishes | None = None,
        system: str | None = None,
        images: Sequence[bytes] = (),
    ) -> None:
        self.talker, self.out = talker, out
        self.wishes = wishes or Wishes()
        self.system = system
        self.images = tuple(images)
        self.messages: list[Message] = []

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
        names = (*_SAMPLING, "num_predict", "num_ctx", "think")
        if not words:
            holders = ((self.wishes.sampling if name in _SAMPLING else self.wishes, name) for name in names)
            say(", ".join(f"{name} {getattr(holder, name)}" for holder, name in holders))
            return
        if len(words) == 3 and words[0] == "parameter":  # as the ollama command spells it
            words = words[1:]
        if len(words) != 2 or words[0] not in names:
            say(f"/set NAME VALUE, NAME one of {', '.join(names)}")
            return
        name, spelled = words
        if name == "think":
            self.wishes = replace(self.wishes, think={"on": True, "off": False}.get(spelled, spelled))
            return
        try:
            value: Any = int(spelled) if name in _COUNTS else float(spelled)
        except ValueError:
            say(f"{spelled} is not a number")
            return
        if name in _SAMPLING:
            self.wishes = replace(self.wishes, sampling=replace(self.wishes.sampling, **{name: value}))
        else:
            self.wishes = replace(self.wishes, **{name: value})

    def turn(self, text: str) -> None:
        """Answer one message; what was said before Ctrl-C stays part of the conversation."""
        self.messages.append(Message("user", text, images=self.images))
        system = [Message("system", self.system)] if self.system else []
        said = _Said(self.out)
        try:
            self.talker.answer([*system, *self.messages], self.wishes, said.show)
        except KeyboardInterrupt:
            pass
        except ForgeError as error:
            self.messages.pop()
            said.end()
            say(f"error: {error.message}")
            return
        self.images = ()  # they are part of the conversation now
        said.end()
        self.messages.append(Message("assistant", said.content, thinking=said.thinking))


class _Said:
    """Prints an answer as it comes: its thought dimmed on a terminal, in brackets elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._marks = (_DIM, _PLAIN) if out.isatty() else ("[", "]")
        self.thinking = self.content = ""

    def show(self, thinking: str, content: str) -> None:
        if thinking:
            self._out.write(thinking if self.thinking else self._marks[0] + thinking)
            self.thinking += thinking
        if content:
            if self.thinking and not self.content:
                self._out.write(self._marks[1] + "\n")
            self._out.write(content)
            self.content += content
        self._out.flush()

    def end(self) -> None:
        if self.thinking and not self.content:
            self._out.write(self._marks[1])
        if self.thinking or self.content:
            self._out.write("\n")
        self._out.flush()

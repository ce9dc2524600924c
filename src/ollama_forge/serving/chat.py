"""The terminal chat: it streams answers, remembers the conversation, and ends an answer, not itself, on Ctrl-C."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import run_output
from ollama_forge.progress import say, show, status
from ollama_forge.serving.api.ollama.options import Options
from ollama_forge.serving.chat_backends import DEFAULT_SERVER, AnswerEnd, ChatBackend, ChatSettings, running_server
from ollama_forge.serving.chat_output import AnswerPrinter, RepetitionError
from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.parameters import sampling_of
from ollama_forge.serving.requests import Message

if TYPE_CHECKING:
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.serving.live_source import LiveSource

HELP = """\
/set NAME VALUE  change a setting; VALUE default resets it, /set alone shows all of them
/set think on    think before answering; or off, low, medium, high, max
/system TEXT     set the system prompt and start over; without TEXT: no system prompt
/clear           forget the conversation
\"""              begins and ends a message of several lines
/bye             leave, as does Ctrl-D; Ctrl-C ends an answer"""
_COUNTS = ("top_k", "seed", "repeat_last_n", "num_predict", "num_ctx")
_SAMPLING = tuple(f.name for f in fields(SamplingParams))
_SETTINGS = (*_SAMPLING, "num_predict", "num_ctx", "think")
_STRENGTH = "abliteration_strength"  # a setting of live models
_LEVELS = ("low", "medium", "high", "max")
_THINK: dict[str, bool | str] = {"on": True, "off": False, **{level: level for level in _LEVELS}}
_SHOWN: dict[object, str] = {None: "default", True: "on", False: "off"}
_QUOTES = '"""'


def chat(
    *,
    name: str | None,
    checkpoint: str | None,
    revision: str | None = None,
    adapter: str | None = None,
    load: LoadSettings,
    settings: ChatSettings | None = None,
    images: Sequence[bytes] = (),
    server: str = DEFAULT_SERVER,
    live: LiveSource | None = None,
) -> None:
    """Talk to the model that ``run`` made under ``name``, or to ``checkpoint``, until the input ends.

    If a server of this program at ``server`` serves ``name`` and no option of loading was given, that server answers;
    else the model is loaded into this process.

    Args:
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        images: the bytes of image files, which are sent with the first message.
        live: the base model and the edit, which is applied at any strength; None for one model.

    Raises:
        UsageError: neither or both of ``name`` and ``checkpoint`` are given.
        ForgeError: there is no such checkpoint, or it cannot be loaded.
    """
    if (name is None) == (checkpoint is None):
        raise UsageError("give either --name or --checkpoint", "--name is what run was given")
    backend: ChatBackend | None = None if adapter else _server_for(name, load, server, live=live is not None)
    if backend is None:
        backend = _load(name, checkpoint, revision, load, adapter) if live is None else _load_live(name, live, load)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401 -- line editing for input()

        say("/help lists the commands, /bye leaves")
        if backend.live:
            say("its edit is live: /set abliteration_strength 0 for the base, 1 for the edited model")
    try:
        Chat(backend, settings=settings, system=load.system, images=images).loop(_lines())
    finally:
        backend.close()


def _server_for(name: str | None, load: LoadSettings, server: str, *, live: bool = False) -> ChatBackend | None:
    if name is None or load != type(load)(system=load.system):
        return None
    found = running_server(server, name)
    if found is not None and live and not found.live:
        return None
    if found is not None:
        say(f"{name} is served at {server}")
    return found


def _load(
    name: str | None, checkpoint: str | None, revision: str | None, load: LoadSettings, adapter: str | None
) -> ChatBackend:
    from ollama_forge.serving.chat_backends import LocalBackend
    from ollama_forge.serving.load_model import unloaded_model
    from ollama_forge.sources.resolve import resolve

    if name is not None:
        checkpoint = str(run_output(name))
    assert checkpoint is not None
    source = resolve(checkpoint, revision, trust_remote_code=load.trust_remote_code, adapter=adapter)
    label = name or Path(source.label).name
    with status(f"loading {label}"):
        return LocalBackend(unloaded_model(source, label, load=replace(load, system=None), max_queue=1).load())


def _load_live(name: str | None, live: LiveSource, load: LoadSettings) -> ChatBackend:
    from ollama_forge.serving.chat_backends import LocalBackend
    from ollama_forge.serving.load_model import unloaded_model

    label = name or live.edited.name
    with status(f"loading {label}"):
        model = unloaded_model(live.base, label, load=replace(load, system=None), max_queue=1, live=live)
        return LocalBackend(model.load())


def _lines() -> Iterator[str]:
    prompt = ">>> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            show("\n/bye or Ctrl-D leaves")


def read_format(value: str) -> str:
    """The text of the JSON schema that ``--format`` names: ``json`` for any object, or a file that holds a schema.

    Raises:
        UsageError: the file cannot be read, or holds no JSON object.
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
    """Read image files.

    Raises:
        UsageError: one of them cannot be read, or is no image.
    """
    from PIL import Image

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
            images.append(Path(path).read_bytes())
        except Exception as error:  # Pillow's readers raise what they like
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or no image"
            raise UsageError(f"--image {path} cannot be read: {reason}", "give a .png or .jpg") from None
    return images


class Chat:
    """One conversation."""

    def __init__(
        self,
        backend: ChatBackend,
        out: TextIO = sys.stdout,
        *,
        settings: ChatSettings | None = None,
        system: str | None = None,
        images: Sequence[bytes] = (),
    ) -> None:
        self.backend, self.out = backend, out
        settings = settings or ChatSettings()
        own = sampling_of(backend.parameters)
        self.settings = self.defaults = replace(settings, sampling=replace(settings.sampling, **own))
        self.system = system
        self.images = tuple(images)
        self.messages: list[Message] = []

    def loop(self, lines: Iterable[str]) -> None:
        """Answer each line and obey each command, until ``/bye`` or the end of the lines."""
        lines = iter(lines)
        for line in lines:
            text = line.strip()
            if text.startswith(_QUOTES):
                text = _quoted(text.removeprefix(_QUOTES), lines)
            elif text in ("/bye", "/exit", "/quit"):
                return
            elif text.startswith("/"):
                self.command(text)
                continue
            if text:
                self.turn(text)

    def command(self, text: str) -> None:
        """Obey a line that begins with ``/``."""
        word, _, rest = text.partition(" ")
        match word:
            case "/help" | "/?":
                show(HELP)
            case "/clear":
                self.messages.clear()
                show("the conversation is forgotten")
            case "/system":
                self.set_system(rest)
            case "/set":
                self.set(rest.split())
            case _:
                show(f"unknown command {word}; /help lists them")

    def set_system(self, text: str) -> None:
        """Change the system prompt, "" for none, and forget the conversation."""
        self.system = text.strip() or None
        self.messages.clear()
        show("system prompt set, conversation started over" if self.system else "no system prompt, started over")

    def set(self, words: list[str]) -> None:
        """Change or show settings, as spelled in this chat or in that of ``ollama run``."""
        settings = (*_SETTINGS, _STRENGTH) if self.backend.live else _SETTINGS
        match words[1:] if words[:1] == ["parameter"] else words:
            case []:
                show("\n".join(f"{name:<22}{self._setting(name)}" for name in settings))
            case ["think" | "nothink" as word]:
                self.settings = replace(self.settings, think=word == "think")
                show(f"think {self._setting('think')}")
            case ["system", *text]:
                self.set_system(" ".join(text))
            case [name] if name in settings:
                show(f"{name} {self._setting(name)}")
            case [name, spelled] if name in settings:
                try:
                    self._change(name, spelled)
                    show(f"{name} {self._setting(name)}")
                except ValueError as error:
                    show(str(error))
            case [name, *_] if name == _STRENGTH:
                show("this model has one strength; chat or serve with --live gives it any")
            case _:
                show(f"/set NAME VALUE, NAME one of {', '.join(settings)}")

    def _setting(self, name: str) -> str:
        value = getattr(self.settings.sampling if name in _SAMPLING else self.settings, name)
        return _SHOWN.get(value, str(value)) if name == "think" or value is None else str(value)

    def _change(self, name: str, spelled: str) -> None:
        """Set one setting; a number outside its range becomes the nearest in it, as in ``serve``.

        Raises:
            ValueError: it has no such value.
        """
        value: Any
        if spelled == "default":
            value = getattr(self.defaults.sampling if name in _SAMPLING else ChatSettings(), name)
        elif name == "think":
            if spelled not in _THINK:
                raise ValueError(f"think is one of {', '.join(_THINK)}")
            value = _THINK[spelled]
        else:
            options = Options.read({name: _number(name, spelled)})
            value = getattr(options.sampling if name in _SAMPLING else options, name)
        if name in _SAMPLING:
            self.settings = replace(self.settings, sampling=replace(self.settings.sampling, **{name: value}))
        else:
            self.settings = replace(self.settings, **{name: value})

    def turn(self, text: str) -> None:
        """Answer one message; what was said before Ctrl-C or a cut stays in the conversation."""
        self.messages.append(Message("user", _readable(text), images=self.images))
        system = [Message("system", _readable(self.system))] if self.system else []
        said = AnswerPrinter(self.out)
        note = ""
        try:
            ended = self.backend.answer([*system, *self.messages], self.settings, said.show)
            note = self._cut(ended) if ended.truncated else "" if said.content else "the model ended without an answer"
        except KeyboardInterrupt:
            pass
        except RepetitionError:
            note = "cut: the answer repeated itself without end; /set repeat_penalty 1.3 makes that rarer"
        except ForgeError as error:
            self.messages.pop()
            said.end()
            show(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
            return
        self.images = ()  # they are part of the conversation now
        said.end()
        if note:
            show(f"({note})")
        self.messages.append(Message("assistant", said.content, thinking=said.thinking))

    def _cut(self, ended: AnswerEnd) -> str:
        """Why an answer was cut, and what to do about it."""
        if 0 <= self.settings.num_predict <= ended.tokens:
            return f"cut after {self.settings.num_predict} tokens; /set num_predict -1 lifts this bound"
        if self.settings.num_ctx is not None:
            return f"cut: num_ctx {self.settings.num_ctx} is full; /set num_ctx raises it, /clear starts over"
        return "cut: the model's context is full; /clear starts over"


def _quoted(text: str, lines: Iterator[str]) -> str:
    """A message of several lines, which ends at the next ``\"""`` or with the input."""
    parts = [text]
    while not parts[-1].rstrip().endswith(_QUOTES):
        line = next(lines, None)
        if line is None:
            break
        parts.append(line)
    return "\n".join(parts).strip().removesuffix(_QUOTES).strip()


def _number(name: str, spelled: str) -> float:
    try:
        value = int(spelled) if name in _COUNTS else float(spelled)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{spelled} is not a {'whole ' if name in _COUNTS else ''}number")
    return value


def _readable(text: str) -> str:
    """``text`` with a question mark for each lone surrogate, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")

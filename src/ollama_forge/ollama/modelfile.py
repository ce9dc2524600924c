"""Ollama's Modelfile, read and written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollama_forge.errors import ForgeError

Pairs = tuple[tuple[str, str], ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_NAME = re.compile(r"([A-Za-z]+)[ \t]+")
_KEY = re.compile(r"(\w+)[ \t]+", re.ASCII)
_ROLE = re.compile(r"(system|user|assistant)[ \t]+")
_LINE = re.compile(r"[^\r\n]*")
_END_OF_BLOCK = re.compile(r'"""[ \t]*(?=[\r\n]|\Z)')
_END_OF_QUOTE = re.compile(r'"[ \t]*(?=[\r\n]|\Z)')
_WHITE = str.maketrans("", "", "\t\r\n")  # what counts as printable inside quotes, besides printable characters


class Unwritable(ForgeError):  # noqa: N818
    """A text that Ollama would change or cut when it reads it from a Modelfile; its API keeps it whole."""


@dataclass(frozen=True)
class Modelfile:
    """The commands of a Modelfile. ``sources`` are its FROM lines; ``others`` are commands without a field, by name.

    Attributes:
        parameters: name and value of each PARAMETER line, as text.
        messages: role and content.
    """

    sources: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    parameters: Pairs = ()
    licenses: tuple[str, ...] = ()
    messages: Pairs = ()
    others: Pairs = ()

    def text(self) -> str:
        """The file.

        Raises:
            Unwritable: a text that a Modelfile cannot hold.
        """
        single = (
            ("TEMPLATE", self.template),
            ("SYSTEM", self.system),
            ("RENDERER", self.renderer),
            ("PARSER", self.parser),
        )
        lines = [
            *(("FROM", source) for source in self.sources),
            *(("ADAPTER", adapter) for adapter in self.adapters),
            *(pair for pair in single if pair[1]),
            *((f"PARAMETER {key}", value) for key, value in self.parameters),
            *(("LICENSE", text) for text in self.licenses),
            *((f"MESSAGE {role}", content) for role, content in self.messages),
            *self.others,
        ]
        return "".join(f"{command} {quoted(value)}\n" for command, value in lines)

    @classmethod
    def parse(cls, text: str) -> Modelfile:
        """Read a Modelfile, by Ollama's rules for quotes.

        Raises:
            ForgeError: a line is no command; the message shows it.
        """
        found: dict[str, list[str]] = {}
        parameters, messages, others = [], [], []
        for name, key, value in _commands(text):
            if name == "PARAMETER":
                parameters.append((key, value))
            elif name == "MESSAGE":
                messages.append((key, value))
            elif name in ("REQUIRES", "DRAFT"):
                others.append((name, value))
            else:
                found.setdefault(name, []).append(value)
        last = {name: values[-1] for name, values in found.items()}
        return cls(
            sources=tuple(found.get("FROM", ())),
            adapters=tuple(found.get("ADAPTER", ())),
            template=last.get("TEMPLATE", ""),
            system=last.get("SYSTEM", ""),
            renderer=last.get("RENDERER", ""),
            parser=last.get("PARSER", ""),
            parameters=tuple(parameters),
            licenses=tuple(found.get("LICENSE", ())),
            messages=tuple(messages),
            others=tuple(others),
        )


_COMMANDS = (
    "FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "RENDERER", "PARSER",
    "PARAMETER", "LICENSE", "MESSAGE", "REQUIRES", "DRAFT",
)  # fmt: skip


def _commands(text: str) -> list[tuple[str, str, str]]:
    """Each command: its name in capitals, a PARAMETER's name or a MESSAGE's role ("" else), its value."""
    found: list[tuple[str, str, str]] = []
    place = 0
    while True:
        place = _after(_BLANK, text, place)
        if place == len(text):
            return found
        start = place
        match = _NAME.match(text, place)
        name = match[1].upper() if match else ""
        if match is None or name not in _COMMANDS:
            raise _no_command(text, start)
        place, key = match.end(), ""
        if name in ("PARAMETER", "MESSAGE"):
            match = (_KEY if name == "PARAMETER" else _ROLE).match(text, place)
            if match is None:
                raise _no_command(text, start)
            place, key = match.end(), match[1]
        value, place = _value(text, place)
        found.append((name, key, value))


def _value(text: str, place: int) -> tuple[str, int]:
    """The value that begins at ``place``, and where it ends."""
    for quote, end in (('"""', _END_OF_BLOCK), ('"', _END_OF_QUOTE)):
        if text.startswith(quote, place):
            inside = place + len(quote)
            match = end.search(text, inside)
            if match is None:
                raise _no_command(text, place)
            return text[inside : match.start()], match.end()
    end_of_line = _after(_LINE, text, place)
    return text[place:end_of_line].strip(), end_of_line


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _no_command(text: str, place: int) -> ForgeError:
    number = text.count("\n", 0, place) + 1
    line = text[place:].splitlines()[0][:60]
    return ForgeError(f"line {number} of the Modelfile cannot be read: {line!r}", "is a quote left open?")


def quoted(text: str) -> str:
    r"""``text`` as the value of a command: bare, or between ``\"\"\"``.

    Raises:
        Unwritable: Ollama's reader would end it early or drop a character.
    """
    if not text.translate(_WHITE).isprintable():
        raise Unwritable("a Modelfile cannot hold this text: Ollama drops its unprintable characters", "use the API")
    if _END_OF_BLOCK.search(text + "x"):  # a match at the very end is no end: the closing quotes follow it
        raise Unwritable('a Modelfile cannot hold this text: a line of it ends in """', "use the API")
    bare = text and text.strip() == text and text[0] != '"' and not re.search(r"[\t\r\n]", text)
    return text if bare else f'"""{text}"""'

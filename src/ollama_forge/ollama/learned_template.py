"""A Go template for Ollama, learned from a Jinja chat template by rendering probe conversations.

What stands before a message is taken to depend on its role and on the role before it. Where that does not hold of the
chat template, nothing is learned.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from ollama_forge.errors import ForgeError

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]

START, END = "", "end"  # what stands before the first message and after the last one
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_ROLES = {"u": USER, "a": ASSISTANT, "s": SYSTEM}
_BEFORE = {USER: ASSISTANT, ASSISTANT: USER, SYSTEM: START, END: USER}  # whose text stands for roles that no probe had
_WITH_SYSTEM = ("su", "suau")
_OPTIONAL = ("au", "sau", "uasu")  # conversations that many templates refuse
_LONG, _LONG_WITH_SYSTEM = "uauau", "suauau"
_ODD = 'a "{{ .Role }}" `b` {% c %}\n\n</d> \\n é 漢 🙂 e'
_WHITE = " \n{} \n"
_DATES = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y", "%b %d, %Y", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d")


class NotLearned(ForgeError):  # noqa: N818
    """A chat template that no Go template of this form says; the message is the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the chat template cannot be written in Ollama's form: {reason}", "Ollama may render it itself"
        )
        self.reason = reason


@dataclass(frozen=True)
class LearnedTemplate:
    """What a chat template writes around messages.

    Attributes:
        texts: the text between two messages, by the role of the first and of the second; ``START`` stands for none
            before, ``END`` for the end of the prompt, where the next answer begins.
    """

    texts: Mapping[tuple[str, str], str]

    @property
    def takes_system(self) -> bool:
        """Whether the chat template has a place for a first system message."""
        return (START, SYSTEM) in self.texts

    def text(self, before: str, role: str) -> str:
        """What stands between two messages of these roles."""
        return self.texts.get((before, role), self.texts.get((_BEFORE[role], role), ""))

    def render(self, messages: Messages) -> str:
        """The prompt that the Go template renders."""
        parts: list[str] = []
        before, held = START, ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == SYSTEM and (before, SYSTEM) not in self.texts:
                held += f"{content}\n\n"
                continue
            parts.append(self.text(before, role))
            if role == USER:
                parts.append(held)
                held = ""
            parts.append(content)
            before = role
        return "".join(parts) + ("" if before == ASSISTANT else self.text(before, END))

    def go(self) -> str:
        """The template in Ollama's language; its texts are quoted, so that nothing in them is read as an action.

        A conversation that ends with words of the assistant is continued. A system message that the chat template has
        no place for is put in front of the next message of the user.
        """
        hold = r'{{ $held = print $held .Content "\n\n" }}'
        placed = "{{ .Content }}{{ $before = .Role }}"
        after = [before for before, role in self.texts if role == SYSTEM]
        condition = f"eq $before {' '.join(_literal(before) for before in after)}"
        system = f"{{{{ if {condition} }}}}{self._before(SYSTEM)}{placed}{{{{ else }}}}{hold}{{{{ end }}}}"
        return (
            '{{ $before := "" }}{{ $held := "" }}{{ range .Messages }}'
            f'{{{{ if eq .Role "system" }}}}{system if after else hold}'
            f'{{{{ else if eq .Role "user" }}}}{self._before(USER)}{{{{ $held }}}}{{{{ $held = "" }}}}{placed}'
            f'{{{{ else if eq .Role "assistant" }}}}{self._before(ASSISTANT)}{placed}'
            f'{{{{ end }}}}{{{{ end }}}}{{{{ if ne $before "assistant" }}}}{self._before(END)}{{{{ end }}}}'
        )

    def _before(self, role: str) -> str:
        """The actions that write what stands before a message of this role."""
        usual = self.text(_BEFORE[role], role)
        others = [(before, text) for (before, own), text in self.texts.items() if own == role and text != usual]
        written = ""
        for before, text in others:
            written += f"{{{{ {'else if' if written else 'if'} eq $before {_literal(before)} }}}}{_write(text)}"
        return f"{written}{{{{ else }}}}{_write(usual)}{{{{ end }}}}" if written else _write(usual)


def learn(render: Render, beginning: str = "") -> LearnedTemplate:
    """Learn a template.

    Args:
        render: renders a conversation with the chat template up to where the next answer begins; ForgeError where the
            template refuses it.
        beginning: the beginning-of-text token if the file's tokenizer adds it to each prompt; the learned template
            leaves it out.

    Raises:
        NotLearned: a Go template of this form would render another text than the chat template.
    """
    texts: dict[tuple[str, str], str] = {}
    for roles in ("u", "uau"):
        found = _around(render, roles)
        if not _agree(texts, found):
            raise NotLearned("a later turn changes what stands around an earlier one")
        texts |= found
    takes_system = _shows_system(render)
    for roles in _WITH_SYSTEM if takes_system else ():
        found = _around(render, roles)
        if not _agree(texts, found):
            raise NotLearned("it moves the system message, or changes other turns by it")
        texts |= found
    for roles in _OPTIONAL if takes_system else _OPTIONAL[:1]:
        found = _optional(render, roles)
        if _agree(texts, found):
            texts |= found
    if any(without_dates(text) != text for text in texts.values()):
        raise NotLearned("it writes today's date")
    learned = LearnedTemplate(texts)
    _check(learned, render, takes_system)
    return LearnedTemplate({key: _without(beginning, key, text) for key, text in texts.items()})


def without_dates(text: str) -> str:
    """The text with today's date, yesterday's and tomorrow's replaced, in the forms that chat templates write."""
    for days, form in itertools.product((-1, 0, 1), _DATES):
        text = text.replace((date.today() + timedelta(days)).strftime(form), "<date>")
    return text


def _conversation(roles: str, contents: str = "{}") -> list[dict[str, str]]:
    """A conversation with these roles, whose contents are marks of their own in ``contents``."""
    return [
        {"role": _ROLES[letter], "content": contents.replace("{}", f"Probe{letter}{number}.")}
        for number, letter in enumerate(roles)
    ]


def _around(render: Render, roles: str) -> dict[tuple[str, str], str]:
    """What stands between the messages of a conversation, by their roles."""
    messages = _conversation(roles)
    try:
        rest = render(messages)
    except ForgeError as error:
        raise NotLearned(f"it refuses {_named(roles)} ({error.message})") from error
    found: dict[tuple[str, str], str] = {}
    before = START
    for message in messages:
        parts = rest.split(message["content"])
        if len(parts) != 2:
            changes = "leaves out or changes" if len(parts) == 1 else "repeats"
            raise NotLearned(f"it {changes} the content of a message of the {message['role']}, or moves it")
        text, rest = parts
        if found.setdefault((before, message["role"]), text) != text:
            raise NotLearned("what stands before a message depends on more than the two roles")
        before = message["role"]
    found[before, END] = rest
    return found


def _agree(texts: Mapping[tuple[str, str], str], found: Mapping[tuple[str, str], str]) -> bool:
    return all(texts.get(key, text) == text for key, text in found.items())


def _optional(render: Render, roles: str) -> dict[tuple[str, str], str]:
    try:
        return _around(render, roles)
    except NotLearned:
        return {}


def _shows_system(render: Render) -> bool:
    messages = _conversation("su")
    try:
        return messages[0]["content"] in render(messages)
    except ForgeError:
        return False


def _check(learned: LearnedTemplate, render: Render, takes_system: bool) -> None:
    """Compare with the chat template on longer conversations, and on contents that some templates change."""
    longest = _LONG_WITH_SYSTEM if takes_system else _LONG
    checks = [
        (_LONG, "{}", "it counts turns, or treats the first or the last one differently"),
        (longest, "{}", "the place of the system message depends on the number of turns"),
        (longest, _ODD.replace("a ", "{} ", 1), "it changes the text of messages"),
        *((longest, letter, f"it trims the contents of the {_ROLES[letter]}") for letter in dict.fromkeys(longest)),
    ]
    for roles, contents, reason in checks:
        messages = _conversation(roles, "{}" if contents in _ROLES else contents)
        if contents in _ROLES:
            messages = [
                {**each, "content": _WHITE.replace("{}", each["content"])} if each["role"] == _ROLES[contents] else each
                for each in messages
            ]
        try:
            rendered = render(messages)
        except ForgeError as error:
            raise NotLearned(f"it refuses {_named(roles)} ({error.message})") from error
        if rendered != learned.render(messages):
            raise NotLearned(reason)


def _named(roles: str) -> str:
    return f"a conversation of {', '.join(_ROLES[letter] for letter in roles)}"


def _without(beginning: str, key: tuple[str, str], text: str) -> str:
    return text.removeprefix(beginning) if beginning and key[0] == START else text


def _write(text: str) -> str:
    return f"{{{{ {_literal(text)} }}}}" if text else ""


def _literal(text: str) -> str:
    """A quoted string of Go; what does not print is escaped, as a Modelfile could not hold it."""
    if re.search("[\ud800-\udfff]", text):
        raise NotLearned("it writes half a surrogate pair")
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"

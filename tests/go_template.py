"""Renders the part of Ollama's template language that learned templates use, as Ollama does.

Written from the language's description: actions between ``{{`` and ``}}``, variables, ``range``, ``if`` … ``else if`` …
``else`` … ``end``, ``eq`` with several right sides, ``ne``, ``print``, quoted strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORD = re.compile(r'\s*(:=|=|"(?:[^"\\\n]|\\.)*"|\$\w+|\.\w+|\w+)')
_END = re.compile(r" -\}\}\s*|\s*\}\}")
_ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_PLAIN = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
Words = list[str]


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt. Neighbours of one role are joined by a blank line before, as Ollama does it."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    parts = _parts(template)
    tree, rest = _block(parts, 0)
    assert rest == len(parts), parts[rest:]
    values: dict[str, str] = {}
    dots = [{"Role": each["role"], "Content": each["content"]} for each in joined]
    return _run(tree, values, {"Messages": dots})


def _parts(template: str) -> list[str | Words]:
    """Texts, and actions as words. A dash inside the braces takes the white space beside them away."""
    parts: list[str | Words] = []
    place = 0
    while place < len(template):
        start = template.find("{{", place)
        if start < 0:
            parts.append(template[place:])
            break
        trims = template.startswith("{{- ", start)
        text = template[place:start].rstrip() if trims else template[place:start]
        if text:
            parts.append(text)
        place, words = start + (3 if trims else 2), []
        while not (end := _END.match(template, place)):
            word = _WORD.match(template, place)
            assert word, template[place : place + 40]
            words.append(word[1])
            place = word.end()
        parts.append(words)
        place = end.end()
    return parts


def _block(parts: list[str | Words], place: int) -> tuple[list[Any], int]:
    """The nodes up to an ``else`` or ``end`` that belongs to an outer action, and where it stands."""
    nodes: list[Any] = []
    while place < len(parts):
        part = parts[place]
        if isinstance(part, str) or part[0] not in ("if", "range", "else", "end"):
            nodes.append(part)
            place += 1
        elif part[0] in ("else", "end"):
            return nodes, place
        else:
            node, place = _control(part[0], part[1:], parts, place + 1)
            nodes.append(node)
    return nodes, place


def _control(kind: str, head: Words, parts: list[str | Words], place: int) -> tuple[Any, int]:
    body, place = _block(parts, place)
    other: list[Any] = []
    last = parts[place]
    assert isinstance(last, list)
    if last == ["end"]:
        return (kind, head, body, other), place + 1
    assert last[0] == "else"
    if last[1:]:  # the end of an "else if" is that of the whole
        node, place = _control(last[1], last[2:], parts, place + 1)
        return (kind, head, body, [node]), place
    other, place = _block(parts, place + 1)
    assert parts[place] == ["end"]
    return (kind, head, body, other), place + 1


def _run(nodes: Sequence[Any], values: dict[str, str], dot: Any) -> str:
    written = ""
    for node in nodes:
        if isinstance(node, str):
            written += node
        elif isinstance(node, tuple) and node[0] == "range":
            for each in _value(node[1][0], values, dot):
                written += _run(node[2], values, each)
        elif isinstance(node, tuple):
            assert node[0] == "if"
            written += _run(node[2] if _call(node[1], values, dot) else node[3], values, dot)
        elif len(node) > 2 and node[1] in (":=", "="):
            assert (node[0] in values) is (node[1] == "=")
            values[node[0]] = _call(node[2:], values, dot)
        else:
            written += _call(node, values, dot)
    return written


def _call(words: Words, values: dict[str, str], dot: Any) -> Any:
    if words[0] not in ("eq", "ne", "print"):
        [word] = words
        return _value(word, values, dot)
    found = [_value(word, values, dot) for word in words[1:]]
    if words[0] == "print":
        return "".join(found)
    return found[0] in found[1:] if words[0] == "eq" else found[0] != found[1]


def _value(word: str, values: dict[str, str], dot: Any) -> Any:
    if word.startswith('"'):
        return _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else _PLAIN[m[3]], word[1:-1])
    return values[word] if word.startswith("$") else dot[word.removeprefix(".")]

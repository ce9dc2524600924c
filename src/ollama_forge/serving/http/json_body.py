"""Decodes JSON as Go's ``encoding/json`` does: it accepts and rejects the same input, up to the same depth."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ollama_forge.serving.requests import BadRequest

MAX_DEPTH = 10_000
_SHALLOW = 200  # a depth that the recursive decoder of the standard library can always take
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\(?:{_PAIR}|(u[dD][89a-fA-F][0-9a-fA-F]{{2}})|.)", re.S)
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.S)
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_scanstring = json.decoder.scanstring  # type: ignore[attr-defined]
_WORDS = {"true": True, "false": False, "null": None}
_LONGEST_INTEGER = 400  # digits; longer integers do not fit the type of any field


def decode(body: bytes) -> Any:
    """Decode the first JSON value of ``body``; invalid UTF-8 and lone surrogates become U+FFFD.

    Raises:
        BadRequest: the body is empty, malformed, incomplete, or nested deeper than ``MAX_DEPTH``.
    """
    text = body.decode("utf-8", "replace")
    if "\\u" in text:
        text = _ESCAPE.sub(lambda escape: "\\ufffd" if escape[1] else escape[0], text)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    if start == len(text):
        raise BadRequest("missing request body")
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise BadRequest("exceeded max depth")
    try:
        return _decode_deep(text, start) if depth > _SHALLOW else _DECODER.raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid character {json.dumps(text[error.pos])} in the JSON of the request") from None
    except IndexError:
        raise BadRequest("unexpected EOF") from None


def _refuse_word(word: str) -> Any:
    raise BadRequest(f"invalid character '{word.lstrip('-')[0]}' looking for beginning of value")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


_DECODER = json.JSONDecoder(parse_constant=_refuse_word, parse_int=_integer)


def _depth(text: str) -> int:
    depth = deepest = 0
    if text.count("[") + text.count("{") <= _SHALLOW:
        return 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
            if depth <= 0:  # text after the first value is ignored
                break
    return deepest


def _decode_deep(text: str, at: int) -> Any:
    """Decode without recursion."""
    root: list[Any] = []
    stack: list[tuple[Any, str | None]] = [(root, None)]  # the open containers, and the next key of each
    while True:
        container, key = stack[-1]
        at = _skip(text, at)
        if text[at] in "[{":
            opened: Any = [] if text[at] == "[" else {}
            _put(container, key, opened)
            at = _skip(text, at + 1)
            if text[at] != ("]" if isinstance(opened, list) else "}"):
                key, at = (None, at) if isinstance(opened, list) else _key(text, at)
                stack.append((opened, key))
                continue
            at += 1
        else:
            value, at = _scalar(text, at)
            _put(container, key, value)
        while True:  # after a value: close containers, or go to the next value
            container, _ = stack[-1]
            if container is root:
                return root[0]
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
                key, at = (None, at) if isinstance(container, list) else _key(text, at)
                stack[-1] = (container, key)
                break
            if text[at] != ("]" if isinstance(container, list) else "}"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            stack.pop()
            at += 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _put(container: Any, key: str | None, value: Any) -> None:
    if isinstance(container, list):
        container.append(value)
    else:
        container[key] = value


def _key(text: str, at: int) -> tuple[str, int]:
    if text[at] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, at = _string(text, at)
    at = _skip(text, at)
    if text[at] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return key, at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    value, at = _scanstring(text, at + 1)
    return value, at


def _scalar(text: str, at: int) -> tuple[Any, int]:
    if text[at] == '"':
        return _string(text, at)
    match = _SCALAR.match(text, at)
    if match is None:
        raise json.JSONDecodeError("Expecting value", text, at)
    word = match[0]
    if word in _WORDS:
        return _WORDS[word], match.end()
    return (float(word) if re.search(r"[.eE]", word) else _integer(word)), match.end()

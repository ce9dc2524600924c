"""How calls are delimited in a model's output. A reader finds where a call ends; ``payloads`` reads what is inside."""

from __future__ import annotations

import re
from collections.abc import Callable

from ollama_forge.serving.tools.base import Call, Parsed, Read
from ollama_forge.serving.tools.payloads import (
    BrokenValueError,
    json_calls,
    loads,
    named_call,
    python_calls,
    value_end,
)

# -- between tags -----------------------------------------------------------------------------------------------------


def tagged(opening: str, closing: str, payload: Callable[[str], tuple[Call, ...]]) -> Read:
    """Calls are the whole text between two tags; at the end of an output the closing tag may be missing."""

    def read(text: str, ended: bool) -> Parsed | None:
        end = text.find(closing)
        if end < 0 and not ended:
            return None
        inner = text[len(opening) : end if end >= 0 else len(text)]
        return Parsed(end + len(closing) if end >= 0 else len(text), payload(inner))

    return read


def tagged_json(opening: str, closing: str) -> Read:
    """A JSON value between two tags, which its strings may contain; the closing tag may be missing at the end."""
    begin_pattern = re.compile(rf"{re.escape(opening)}\s*")

    def content(broken: str) -> Parsed:
        """A malformed block is content up to its closing tag; without a closing tag, all of it is."""
        end = broken.find(closing)
        return Parsed(end + len(closing) if end >= 0 else len(broken))

    def read(text: str, ended: bool) -> Parsed | None:
        begin = begin_pattern.match(text)
        assert begin is not None
        if not text.startswith(("{", "["), begin.end()):
            return None if begin.end() == len(text) and not ended else Parsed(len(opening))
        try:
            end = value_end(text, begin.end())
        except BrokenValueError as broken:
            return content(text[: broken.place])
        if end is None:
            return content(text) if ended else None
        calls = json_calls(loads(text[begin.end() : end]))
        rest = text[end:].lstrip()
        if rest.startswith(closing):
            return Parsed(len(text) - len(rest) + len(closing), calls)
        if not ended and closing.startswith(rest):
            return None
        return Parsed(end, calls)

    return read


# -- plain JSON, alone or in a code block -----------------------------------------------------------------------------

_FENCE = re.compile(r"```(?:json|tool_call|tool_code)?\s*")
_FENCE_BEGUN = re.compile(r"`{1,3}[a-z_]*\s*")
_VALUE = re.compile(r"\{\s*\"|\[\s*\{\s*\"")
_VALUE_BEGUN = re.compile(r"\{\s*|\[\s*(\{\s*)?")


def plain_json(text: str, ended: bool) -> Parsed | None:
    """JSON calls alone, in a list or in a code block, whose fences belong to the calls."""
    if not text.startswith("`"):
        return _json_value(text, 0, ended)
    fence = _FENCE.match(text)
    start = fence.end() if fence else 0
    if not text.startswith(("{", "["), start):
        return None if _FENCE_BEGUN.fullmatch(text) and not ended else Parsed(len("```"))
    inner = _json_value(text, start, ended)
    if inner is None or not inner.calls:
        return inner
    rest = text[inner.length :].lstrip()
    if rest.startswith("```"):
        return Parsed(len(text) - len(rest) + len("```"), inner.calls)
    return None if not ended and "```".startswith(rest) else inner


def _json_value(text: str, start: int, ended: bool) -> Parsed | None:
    """Read the object or list at ``start``: calls, or content up to its end; one character if none begins."""
    if not _VALUE.match(text, start):
        return None if not ended and _VALUE_BEGUN.fullmatch(text, start) else Parsed(start + 1)
    try:
        end = value_end(text, start)
    except BrokenValueError as broken:
        return Parsed(_line_end(text[: broken.place]))
    if end is None:
        return Parsed(_line_end(text)) if ended else None
    return Parsed(end, json_calls(loads(text[start:end])))


def _line_end(text: str) -> int:
    """The end of the line: malformed JSON is content up to there, and a call may follow."""
    end = text.find("\n")
    return end + 1 if end >= 0 else len(text)


# -- Llama ------------------------------------------------------------------------------------------------------------

PYTHON_TAG = "<|python_tag|>"
_PYTHON_BEGIN = re.compile(rf"{re.escape(PYTHON_TAG)}\s*")


def llama(text: str, ended: bool) -> Parsed | None:
    """JSON with or without ``<|python_tag|>`` before it, or Python after the tag up to the end of the output."""
    begin = _PYTHON_BEGIN.match(text)
    start = begin.end() if begin else 0
    if start == len(text):
        return Parsed(start) if ended else None
    if text[start] in "{[":
        return _json_value(text, start, ended)
    return Parsed(len(text), python_calls(text[start:])) if ended else None


# -- Mistral ----------------------------------------------------------------------------------------------------------

TOOL_CALLS = "[TOOL_CALLS]"
_MISTRAL_BEGIN = re.compile(rf"{re.escape(TOOL_CALLS)}\s*")
_MISTRAL_NAME = re.compile(r"([\w.\-]+)(?:\[CALL_ID\][\w\-]+)?(?:\[ARGS\])?\s*")
_LONGEST_NAME = 200


def mistral(text: str, ended: bool) -> Parsed | None:
    """``[TOOL_CALLS]`` before a JSON list of calls, or before each call ``name[ARGS]{…}``."""
    begin = _MISTRAL_BEGIN.match(text)
    assert begin is not None
    start = begin.end()
    if start == len(text):
        return None
    if text[start] in "{[":
        return _mistral_value(text, start, ended, None)
    brace = text.find("{", start)
    head = text[start : brace if brace >= 0 else len(text)]
    if "\n" in head.strip() or len(head) > _LONGEST_NAME:
        return Parsed(len(TOOL_CALLS))
    if brace < 0:
        return None
    name = _MISTRAL_NAME.fullmatch(head)
    return _mistral_value(text, brace, ended, name[1]) if name else Parsed(len(TOOL_CALLS))


def _mistral_value(text: str, start: int, ended: bool, name: str | None) -> Parsed | None:
    try:
        end = value_end(text, start)
    except BrokenValueError as broken:
        return Parsed(broken.place)
    if end is None:
        return Parsed(len(text)) if ended else None
    value = loads(text[start:end])
    return Parsed(end, json_calls(value) if name is None else named_call(name, value))


# -- DeepSeek ---------------------------------------------------------------------------------------------------------

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_BEGIN = re.compile(rf"(?:{CALLS_BEGIN}\s*)?{CALL_BEGIN}")
_DEEPSEEK_BEGUN = re.compile(rf"{CALLS_BEGIN}\s*")
_DEEPSEEK_BLOCK = re.compile(r"\s*([^\n]*?)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def deepseek(text: str, ended: bool) -> Parsed | None:
    """Calls between markers; the arguments are bare JSON (V3.1) or a code block after the name (V3, R1)."""
    begin = _DEEPSEEK_BEGIN.match(text)
    if begin is None:
        begun = _DEEPSEEK_BEGUN.match(text)
        waiting = begun is not None and CALL_BEGIN.startswith(text[begun.end() :])
        return None if waiting else Parsed(len(CALLS_BEGIN))
    close = text.find(CALL_END, begin.end())
    if close < 0:
        return Parsed(len(text), _deepseek_call(text[begin.end() :])) if ended else None
    call = _deepseek_call(text[begin.end() : close])
    end = close + len(CALL_END)
    rest = text[end:].lstrip()
    if rest.startswith(CALLS_END):
        return Parsed(len(text) - len(rest) + len(CALLS_END), call)
    if not ended and CALLS_END.startswith(rest):
        return None
    return Parsed(end, call)


def _deepseek_call(inner: str) -> tuple[Call, ...]:
    """The call between the markers; empty if it is malformed."""
    head, separator, rest = inner.partition(CALL_SEPARATOR)
    block = _DEEPSEEK_BLOCK.fullmatch(rest)
    name, spelled = (block[1], block[2]) if block else (head.strip(), rest)
    return named_call(name, loads(spelled)) if separator else ()


# -- Gemma ------------------------------------------------------------------------------------------------------------

_TOOL_CODE = "```tool_code"


def gemma(marked: dict[str, Read]) -> Read:
    """Python in a ``tool_code`` block, plain JSON, or what ``marked`` reads behind each of its opening markers."""

    def read(text: str, ended: bool) -> Parsed | None:
        for opening, read_marked in marked.items():
            if text.startswith(opening):
                return read_marked(text, ended)
        if text.startswith(_TOOL_CODE):
            close = text.find("```", len(_TOOL_CODE))
            if close < 0:
                return Parsed(len(text)) if ended else None
            calls = python_calls(text[len(_TOOL_CODE) : close])
            return Parsed(close + 3, calls) if calls else plain_json(text, ended)
        if text.startswith("```") and _TOOL_CODE.startswith(text) and not ended:
            return None
        return plain_json(text, ended)

    return read

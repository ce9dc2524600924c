"""Parameters of an Ollama model: typed from ``k=v``, and read back from what ``/api/show`` prints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ollama_forge.errors import UsageError

Value = bool | int | float | str | tuple[str, ...]
Parameters = Mapping[str, Value]

NO_PARAMETERS: Parameters = MappingProxyType({})

STOP = "stop"
_INT = (
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n",
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict",
)  # fmt: skip
_FLOAT = ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
_BOOL = ("use_mmap",)
KNOWN = (*_INT, *_FLOAT, *_BOOL, STOP)
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", re.DOTALL)
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def parse_assignments(assignments: Sequence[str]) -> dict[str, Value]:
    """``["temperature=0.5", "stop=</s>"]`` as Ollama wants it; ``stop`` may come several times, it is a list.

    Raises:
        UsageError: not ``k=v``, a parameter Ollama doesn't know, or a value of the wrong type.
    """
    parsed: dict[str, Value] = {}
    stops: list[str] = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--parameter {assignment} is not k=v", "for example --parameter temperature=0.5")
        if key not in KNOWN:
            raise UsageError(f"--parameter {key}: Ollama knows no such parameter", ", ".join(KNOWN))
        if key == STOP:
            stops.append(text)
        else:
            parsed[key] = _typed(key, text)
    return {**parsed, STOP: tuple(stops)} if stops else parsed


def _typed(key: str, text: str) -> Value:
    if key in _INT and _INTEGER.fullmatch(text):
        return int(text)
    if key in _BOOL and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if key in _FLOAT:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    kind = "a whole number" if key in _INT else "true or false" if key in _BOOL else "a number"
    raise UsageError(f"--parameter {key}={text}: {key} is {kind}", "for example temperature=0.5, num_ctx=8192")


def lines_of(parameters: Parameters) -> list[tuple[str, str]]:
    """Name and value as text, one pair for each value of a list."""
    lines = []
    for key, value in parameters.items():
        for each in value if isinstance(value, tuple) else (value,):
            lines.append((key, str(each).lower() if isinstance(each, bool) else str(each)))
    return lines


def read_shown(text: str) -> dict[str, Value]:
    """The ``parameters`` of ``/api/show``: a line for each value, texts in double quotes with Go's escapes."""
    found: dict[str, Value] = {}
    for line in text.split("\n"):
        key, _, written = line.partition(" ")
        value = _literal(written.strip(" "))
        if value is None:
            continue
        before = found.get(key)
        if key == STOP or before is not None:  # several lines of one key are a list
            held = before if isinstance(before, tuple) else () if before is None else (str(before),)
            found[key] = (*held, str(value))
        else:
            found[key] = value
    return found


def _literal(written: str) -> Value | None:
    """A literal of Go; None for one that is no parameter's (``<nil>``)."""
    if len(written) > 1 and written[0] == written[-1] == '"':
        return _ESCAPE.sub(_unescaped, written[1:-1])
    if written in ("true", "false"):
        return written == "true"
    if _INTEGER.fullmatch(written):
        return int(written)
    try:
        number = float(written)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _unescaped(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    return chr(int(digits, 16)) if digits else _LETTERS.get(match[4], match[4])

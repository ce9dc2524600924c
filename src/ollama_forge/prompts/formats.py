"""Parse the text of a list: plain lines, CSV and TSV, JSON, JSON Lines.

Every function takes the list's ``name`` for its messages and raises ForgeError for text in another format. The caller
has replaced ``\\r\\n`` by ``\\n``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.prompts.normalise import one_line

USUAL_COLUMNS = ("instruction", "prompt", "goal", "behavior", "question", "text")  # in order of preference
TAB = "\t"
_PLAIN_NAME = re.compile(r"[\w.-]*")
_MOST_NAMES = 12  # column names in a hint


def from_lines(name: str, text: str) -> list[str]:
    """Take every line as an instruction, except empty lines and comments (lines that start with ``#``)."""
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    suffix = _structured_suffix(lines)
    if suffix:
        raise ForgeError(
            f"{name} holds {suffix[1:].upper()}, not one instruction per line", f"rename it so that it ends in {suffix}"
        )
    return lines


def from_csv(name: str, text: str, column: str | None, delimiter: str) -> list[str]:
    """Read the instruction column of a table with a header row.

    A row may end before the header's last field, and it may have additional empty fields.
    """
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        kind = "TSV" if delimiter == TAB else "CSV"
        raise ForgeError(
            f"{name} is not a well-formed {kind} file (line {reader.line_num}: {error})",
            f"close every quoted field; a field holds at most {csv.field_size_limit():,} characters",
        ) from None
    if not rows:
        return []
    header = [field.strip() for field in rows[0][1]]
    place = header.index(_find_column(name, header, column))
    lines = []
    for number, row in rows[1:]:
        if any(row[len(header) :]):
            raise ForgeError(
                f"{name}, line {number}: {len(row)} fields under a header of {len(header)}",
                f"put quotes around fields that hold {_delimiter_name(delimiter)}",
            )
        if len(row) <= place:
            raise ForgeError(
                f"{name}, line {number}: the row ends before the column {_shortened(header[place])}",
                "put quotes around fields that hold a line end",
            )
        lines.append(row[place])
    return lines


def delimiter_of(text: str) -> str:
    """The delimiter of a ``.csv`` file: the first of comma, semicolon and tab that its header row contains."""
    header = text.lstrip("\n").partition("\n")[0]
    return next((delimiter for delimiter in ",;\t" if delimiter in header), ",")


def from_json(name: str, text: str, column: str | None) -> list[str]:
    """Read an array of strings or objects, or an object that holds such an array.

    If the object holds several arrays, ``column`` or a usual name selects one.
    """
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines files are often named .json
            return from_json_lines(name, text, column)
        raise ForgeError(
            f"{name} is not well-formed JSON (line {error.lineno}: {error.msg})",
            "correct the file at that line, or export it again",
        ) from None
    except RecursionError:
        raise ForgeError(f"{name} is nested too deeply", "give an array of strings or of objects") from None
    rows, column = _array(name, value, column)
    return [_instruction(name, number, row, column) for number, row in enumerate(rows, 1)]


def from_json_lines(name: str, text: str, column: str | None) -> list[str]:
    """Read one string or object per line."""
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parse_json(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, str | dict):
            raise ForgeError(
                f"{name}, line {number}: not a JSON object",
                "if the file is one JSON array, rename it so that it ends in .json"
                if line.lstrip()[0] == "["
                else "give one JSON object per line",
            )
        lines.append(_instruction(name, number, row, column))
    return lines


def _parse_json(text: str) -> Any:
    # parse_int: int() refuses more than 4,300 digits; strict=False: allow unescaped tabs and line ends in strings
    return json.loads(text, parse_int=float, strict=False)


def _array(name: str, value: Any, column: str | None) -> tuple[list[Any], str | None]:
    """The array of instructions, and the name of the instruction field in its objects if it is given."""
    if isinstance(value, list):
        return value, column
    arrays = {key: rows for key, rows in value.items() if isinstance(rows, list)} if isinstance(value, dict) else {}
    if not arrays:
        raise ForgeError(f"{name} holds no JSON array of instructions", "give an array of strings or of objects")
    if len(arrays) == 1:
        return next(iter(arrays.values())), column
    return arrays[_find_column(name, list(arrays), column)], None


def _instruction(name: str, number: int, row: Any, column: str | None) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ForgeError(
            f"{name}, row {number}: neither a string nor an object", "give an array of strings or of objects"
        )
    key = _find_column(f"{name}, row {number}", list(row), column)
    value = row[key]
    if not isinstance(value, str):
        raise ForgeError(f"{name}, row {number}: column {_shortened(key)} is not a string", "choose another --column")
    return value


def _find_column(location: str, names: list[str], column: str | None) -> str:
    """The name that equals ``column``; without ``column``, the first usual name, ignoring case."""
    for target in (column,) if column else USUAL_COLUMNS:
        found = [name for name in names if (name if column else name.strip().lower()) == target]
        if len(found) > 1:
            raise UsageError(f"{location}: {len(found)} columns are called {_shortened(target)}", "rename all but one")
        if found:
            return found[0]
    have = [_shortened(name) for name in names if name.strip()]
    more = ", …" if len(have) > _MOST_NAMES else ""
    raise UsageError(
        f"{location}: no column {_shortened(column) if column else 'that holds instructions'}",
        f"--column, one of: {', '.join(have[:_MOST_NAMES])}{more}" if have else "give names to the columns",
    )


def _shortened(name: str) -> str:
    return one_line(name)[:40]


def _delimiter_name(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", TAB: "a tab"}[delimiter]


def _structured_suffix(lines: list[str]) -> str | None:
    """The suffix for lines that are JSON, JSON Lines or a table with a header row; None for plain instructions."""
    if not lines:
        return None
    first = lines[0].strip()
    if first[0] in "[{":
        if first in ("[", "{", "[{") or _is_json("\n".join(lines)):
            return ".json"
        if all(_is_json(line) for line in lines):
            return ".jsonl"
    for delimiter, suffix in ((",", ".csv"), (";", ".csv"), (TAB, ".tsv")):
        fields = [field.strip(' "').lower() for field in first.split(delimiter)]
        if any(field in USUAL_COLUMNS for field in fields) and all(map(_PLAIN_NAME.fullmatch, fields)):
            return suffix
    return None


def _is_json(text: str) -> bool:
    try:
        return isinstance(_parse_json(text), list | dict)
    except (json.JSONDecodeError, RecursionError):
        return False

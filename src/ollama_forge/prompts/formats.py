"""Instructions from the text of a list: plain lines, CSV and TSV, JSON, JSON Lines.

Every function takes the list's ``name`` for its messages and raises ForgeError for text that is not of its form.
Lines end at ``\\n`` alone here: the reader of the file has turned ``\\r\\n`` into it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.prompts.normalise import one_line

USUAL_COLUMNS = ("instruction", "prompt", "goal", "behavior", "question", "text")  # the first one there is taken
TAB = "\t"
_PLAIN_NAME = re.compile(r"[\w.-]*")
_MOST_NAMES = 12  # in a hint


def from_lines(name: str, text: str) -> list[str]:
    """One instruction a line; lines that start with ``#`` are comments."""
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    suffix = _true_suffix(lines)
    if suffix:
        raise ForgeError(
            f"{name} holds {suffix[1:].upper()}, not one instruction a line", f"give it a name that ends in {suffix}"
        )
    return lines


def from_csv(name: str, text: str, column: str | None, delimiter: str) -> list[str]:
    """The instructions' column of a table with a header row.

    A row may lack fields at its end, and have more than the header where those are empty.
    """
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        kind = "TSV" if delimiter == TAB else "CSV"
        raise ForgeError(
            f"{name} is not a well-formed {kind} file (line {reader.line_num}: {error})",
            f"is a quote left open? a field ends at {csv.field_size_limit():,} characters",
        ) from None
    if not rows:
        return []
    header = [field.strip() for field in rows[0][1]]
    place = header.index(_choose(name, header, column))
    lines = []
    for number, row in rows[1:]:
        if any(row[len(header) :]):
            raise ForgeError(
                f"{name}, line {number}: {len(row)} fields under a header of {len(header)}",
                f"put quotes around fields that hold {_spoken(delimiter)}",
            )
        if len(row) <= place:
            raise ForgeError(
                f"{name}, line {number}: the row ends before the column {_short(header[place])}",
                "put quotes around fields that hold a line end",
            )
        lines.append(row[place])
    return lines


def delimiter_of(text: str) -> str:
    """What separates the fields of a ``.csv`` file: commas, else the semicolons or tabs of its header."""
    header = text.lstrip("\n").partition("\n")[0]
    return next((delimiter for delimiter in ",;\t" if delimiter in header), ",")


def from_json(name: str, text: str, column: str | None) -> list[str]:
    """An array of strings or objects, bare or the only (or the instructions') array in an object."""
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value a line: JSON Lines are often named .json
            return from_json_lines(name, text, column)
        raise ForgeError(
            f"{name} is not well-formed JSON (line {error.lineno}: {error.msg})", "is it cut off, or edited by hand?"
        ) from None
    except RecursionError:
        raise ForgeError(f"{name} is nested too deeply", "give an array of strings or of objects") from None
    rows, column = _array(name, value, column)
    return [_instruction(name, number, row, column) for number, row in enumerate(rows, 1)]


def from_json_lines(name: str, text: str, column: str | None) -> list[str]:
    """One string or object a line."""
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, str | dict):
            raise ForgeError(
                f"{name}, line {number}: not a JSON object",
                "is it one JSON array? give it a name that ends in .json"
                if line.lstrip()[0] == "["
                else "give one JSON object a line",
            )
        lines.append(_instruction(name, number, row, column))
    return lines


def _parsed(text: str) -> Any:
    # int() refuses more than 4,300 digits, and no number is an instruction; strings may hold bare tabs and line ends
    return json.loads(text, parse_int=float, strict=False)


def _array(name: str, value: Any, column: str | None) -> tuple[list[Any], str | None]:
    """The array of instructions, and the column in its objects."""
    if isinstance(value, list):
        return value, column
    arrays = {key: rows for key, rows in value.items() if isinstance(rows, list)} if isinstance(value, dict) else {}
    if not arrays:
        raise ForgeError(f"{name} holds no JSON array of instructions", "give an array of strings or of objects")
    if len(arrays) == 1:
        return next(iter(arrays.values())), column
    return arrays[_choose(name, list(arrays), column)], None


def _instruction(name: str, number: int, row: Any, column: str | None) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ForgeError(f"{name}, row {number}: neither text nor an object", "give an array of strings or of objects")
    key = _choose(f"{name}, row {number}", list(row), column)
    value = row[key]
    if not isinstance(value, str):
        raise ForgeError(f"{name}, row {number}: column {_short(key)} is not text", "choose another --column")
    return value


def _choose(where: str, names: list[str], column: str | None) -> str:
    """The name that ``column`` gives exactly, else the first usual one in whatever case."""
    for wanted in (column,) if column else USUAL_COLUMNS:
        found = [name for name in names if (name if column else name.strip().lower()) == wanted]
        if len(found) > 1:
            raise UsageError(f"{where}: {len(found)} columns are called {_short(wanted)}", "rename all but one")
        if found:
            return found[0]
    have = [_short(name) for name in names if name.strip()]
    more = ", …" if len(have) > _MOST_NAMES else ""
    raise UsageError(
        f"{where}: no column {_short(column) if column else 'that holds instructions'}",
        f"--column, one of: {', '.join(have[:_MOST_NAMES])}{more}" if have else "give the columns names",
    )


def _short(name: str) -> str:
    return one_line(name)[:40]


def _spoken(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", TAB: "a tab"}[delimiter]


def _true_suffix(lines: list[str]) -> str | None:
    """The suffix for lines that are unmistakably no instructions: JSON, or a table under a header row."""
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
        return isinstance(_parsed(text), list | dict)
    except (json.JSONDecodeError, RecursionError):
        return False

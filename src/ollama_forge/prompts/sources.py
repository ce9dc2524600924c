"""Instructions from a user's own files and folders: .txt, .jsonl, .csv."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from ollama_forge.errors import ForgeError, UsageError

_USUAL_COLUMNS = ("instruction", "prompt", "goal", "behavior", "text", "question")


def read_instructions(path: Path, column: str | None = None) -> list[str]:
    """The instructions of one file, in order.

    ``.jsonl``: one object a line; ``.csv``: a header row; in both, ``column`` names the field (else the first usual
    one that is there). Any other name: one instruction a line, lines that start with ``#`` skipped.

    Raises:
        ForgeError: missing, empty, binary or badly encoded file, or a row without the column.
    """
    text = _decoded(path)
    match path.suffix.lower():
        case ".jsonl":
            lines = _from_jsonl(path, text, column)
        case ".csv":
            lines = _from_csv(path, text, column)
        case _:
            lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    lines = [" ".join(line.split()) for line in lines]
    lines = [line for line in lines if line]
    if not lines:
        raise ForgeError(f"{path} holds no instruction", "one instruction a line; lines that start with # are skipped")
    return lines


def read_folder(folder: Path) -> list[str]:
    """All instructions of all ``.txt`` files of a folder, files in order of their names."""
    if not folder.is_dir():
        raise ForgeError(f"{folder} is not a folder", "give a folder that holds .txt files")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt" and path.is_file())
    if not files:
        raise ForgeError(f"{folder} holds no .txt file", "give a folder that holds .txt files")
    return [line for path in files for line in read_instructions(path)]


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ForgeError(f"the list {path} does not exist", "check the path") from None
    except OSError as error:
        raise ForgeError(f"cannot read the list {path}: {error.strerror or error}", "check the path") from error
    if b"\0" in data:
        raise ForgeError(f"{path} is not a text file", "give a list with one instruction a line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = data[: error.start].count(b"\n") + 1
        raise ForgeError(f"{path} is not UTF-8 (line {place})", "save the list as UTF-8") from None


def _pick(path: Path, number: int, row: dict[str, object], column: str | None) -> str:
    names = [column] if column else [name for name in row if str(name).lower() in _USUAL_COLUMNS]
    name = names[0] if names else None
    if name is None or name not in row:
        have = ", ".join(str(key) for key in row if key)
        raise UsageError(
            f"{path}, row {number}: no column {name or 'that holds instructions'}",
            f"--column, one of: {have}",
        )
    value = row[name]
    if not isinstance(value, str):
        raise ForgeError(f"{path}, row {number}: column {name} is not text", "choose another --column")
    return value


def _from_jsonl(path: Path, text: str, column: str | None) -> list[str]:
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, str):
            out.append(row)
        elif isinstance(row, dict):
            out.append(_pick(path, number, row, column))
        else:
            raise ForgeError(f"{path}, line {number}: not a JSON object", "one JSON object a line")
    return out


def _from_csv(path: Path, text: str, column: str | None) -> list[str]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ForgeError(f"{path} is not a well-formed CSV file ({error})", "is a quote left open?") from None
    return [_pick(path, number, dict(row), column) for number, row in enumerate(rows, 2)]

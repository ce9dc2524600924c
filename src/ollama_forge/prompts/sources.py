"""Read instructions from the user's files and folders: .txt, .csv, .tsv, .json, .jsonl."""

from __future__ import annotations

import codecs
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size
from ollama_forge.prompts.formats import TAB, delimiter_of, from_csv, from_json, from_json_lines, from_lines
from ollama_forge.prompts.normalise import one_line

LONGEST_INSTRUCTION = 131_072  # characters: the limit of a CSV field in Python's csv module
_LARGEST_FILE = 256_000_000
_BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with the mark of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_TEXT = (
    (b"PK\x03\x04", "a spreadsheet or an archive", "export the list as .csv"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet", "export the list as .csv"),
    (b"PAR1", "a Parquet file", "export the list as .jsonl"),
    (b"\x1f\x8b", "a gzip file", "decompress it"),
)


def read_instructions(path: Path, column: str | None = None) -> list[str]:
    """Read the instructions of one file, in order, each as one line.

    The suffix determines the format. ``.json``: an array of strings or objects, or an object that holds such an array;
    ``.jsonl`` and ``.ndjson``: one string or object per line; ``.csv`` and ``.tsv``: a table with a header row; any
    other: one instruction per line, except lines that start with ``#``. Lines end at ``\\n`` or ``\\r\\n``. The
    encoding is UTF-8 unless a byte-order mark names another one.

    Args:
        column: name of the instruction field in objects and tables; by default the first usual name.

    Raises:
        ForgeError: the file is missing, empty, too large, not text, wrongly encoded or malformed, its content does not
            match its suffix, or an instruction is longer than 131,072 characters.
        UsageError: a row lacks the column, or no column has a usual name.
    """
    name, text = str(path), _read_text(path)
    match path.suffix.lower():
        case ".json":
            lines, form = from_json(name, text, column), "an array of strings or of objects"
        case ".jsonl" | ".ndjson":
            lines, form = from_json_lines(name, text, column), "one JSON object per line"
        case ".csv" | ".tsv" as suffix:
            delimiter = TAB if suffix == ".tsv" else delimiter_of(text)
            lines, form = from_csv(name, text, column, delimiter), "a header row, then one instruction per row"
        case _:
            lines, form = from_lines(name, text), "one instruction per line; lines that start with # are skipped"
    lines = [line for line in map(one_line, lines) if line]
    if not lines:
        raise ForgeError(f"{path} holds no instruction", f"expected: {form}")
    longest = max(map(len, lines))
    if longest > LONGEST_INSTRUCTION:
        raise ForgeError(
            f"{path} holds an instruction of {longest:,} characters, more than {LONGEST_INSTRUCTION:,}",
            f"check that the line ends are not missing; expected: {form}",
        )
    return lines


def read_folder(folder: Path) -> list[str]:
    """Read the instructions of all ``.txt`` files in a folder, in the order of the file names."""
    try:
        if not folder.is_dir():
            raise ForgeError(f"{folder} is not a folder", "give a folder that holds .txt files")
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt" and path.is_file())
    except OSError as error:
        raise ForgeError(
            f"cannot read the folder {folder}: {error.strerror or error}", "check its permissions"
        ) from error
    if not files:
        raise ForgeError(f"{folder} holds no .txt file", "give a folder that holds .txt files")
    return [line for path in files for line in read_instructions(path)]


def _read_text(path: Path) -> str:
    """Read and decode a file; remove byte-order marks and replace ``\\r\\n`` by ``\\n``."""
    text = _decode_text(path, _read_bytes(path)).replace("\ufeff", "").replace("\r\n", "\n")
    if "\r" in text and "\n" not in text:
        raise ForgeError(f"the lines of {path} end with carriage returns only", r"save it with line ends \n or \r\n")
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise ForgeError(f"{path} is a web page, not a list", "download the raw file")
    return text.replace("\r", " ")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ForgeError(
                f"cannot read the list {path}: it is a folder",
                "give a folder of .txt files with --harmful-dir or --harmless-dir",
            )
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ForgeError(f"the list {path} does not exist", "check the path") from None
    except PermissionError as error:
        raise ForgeError(f"cannot read the list {path}: {error.strerror}", "check its permissions") from error
    except (OSError, ValueError) as error:  # ValueError: the path contains NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgeError(f"cannot read the list {one_line(str(path))}: {reason}", "check the path") from error
    if len(data) > _LARGEST_FILE:
        raise ForgeError(f"{path} is larger than {human_size(_LARGEST_FILE)}", "give a shorter list")
    return data


def _decode_text(path: Path, data: bytes) -> str:
    for start, kind, hint in _NOT_TEXT:
        if data.startswith(start):
            raise ForgeError(f"{path} is not a text file but {kind}", hint)
    mark, encoding = next(((m, e) for m, e in _BYTE_ORDER_MARKS if data.startswith(m)), (b"", "utf-8"))
    if encoding == "utf-8" and b"\0" in data:
        raise ForgeError(f"{path} is not a text file", "give a list with one instruction a line, saved as UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: len(mark) + error.start].count(b"\n") + 1
        where = f" (line {line})" if encoding == "utf-8" else ", which its byte-order mark claims"
        raise ForgeError(f"{path} is not {encoding.upper()}{where}", "save the list as UTF-8") from None
    if "\0" in text:
        raise ForgeError(f"{path} is not a text file", "give a list with one instruction a line, saved as UTF-8")
    return text

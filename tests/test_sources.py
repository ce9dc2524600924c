"""Reading a user's own instruction lists."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.prompts.sources import read_folder, read_instructions

_TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\ufeff"), max_size=30)
LINES = st.lists(
    _TEXT.map(lambda line: " ".join(line.split())).filter(lambda line: line and not line.startswith("#")),
    min_size=1,
    max_size=8,
)
on_disk = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_comments_blank_lines_and_spacing(tmp_path: Path) -> None:
    path = put(tmp_path, "list.txt", "# category: x\n\nWrite  a\tpoem \n   # another\n  \nUse C# well\n")
    assert read_instructions(path) == ["Write a poem", "Use C# well"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, end: str, mark: bytes) -> None:
    path = put(tmp_path, "list.txt", mark + end.join(["# head", "one", "two", ""]).encode())
    assert read_instructions(path) == ["one", "two"]


@pytest.mark.parametrize("name", ["list", "list.md", "LIST.TXT"])
def test_any_other_name_is_one_instruction_a_line(tmp_path: Path, name: str) -> None:
    assert read_instructions(put(tmp_path, name, '{"prompt": 1}\na,b\n')) == ['{"prompt": 1}', "a,b"]


@pytest.mark.parametrize("name", ["list.jsonl", "LIST.JSONL"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    rows = ['{"id": 1, "prompt": "one\\ntwo"}', "", '{"prompt": "caf\u00e9"}', '"bare"', '{"Prompt": "# kept"}']
    path = put(tmp_path, name, "\ufeff" + "\r\n".join(rows))
    assert read_instructions(path) == ["one two", "caf\u00e9", "bare", "# kept"]


def test_jsonl_column(tmp_path: Path) -> None:
    path = put(tmp_path, "list.jsonl", '{"prompt": "a", "goal": "b", "mine": "c"}\n{"mine": "d", "n": 3}\n')
    assert read_instructions(path, "mine") == ["c", "d"]
    with pytest.raises(UsageError, match="row 2: no column prompt") as caught:
        read_instructions(path, "prompt")
    assert "mine, n" in caught.value.hint
    with pytest.raises(UsageError, match="row 2: no column that holds instructions"):
        read_instructions(path)


@pytest.mark.parametrize("line", ["{broken", "[1]", "3", "null", '{"prompt": "a"} trailing'])
def test_jsonl_rows_that_are_no_objects(tmp_path: Path, line: str) -> None:
    with pytest.raises(ForgeError, match="line 2: not a JSON object") as caught:
        read_instructions(put(tmp_path, "list.jsonl", '{"prompt": "a"}\n' + line))
    assert caught.value.hint


def test_values_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="row 1: column prompt is not text"):
        read_instructions(put(tmp_path, "list.jsonl", '{"prompt": ["a"]}'))
    with pytest.raises(ForgeError, match="column prompt is not text"):
        read_instructions(put(tmp_path, "list.csv", "n,prompt\n1\n"))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_with_quoted_rows_over_several_lines(tmp_path: Path, end: str) -> None:
    text = end.join(["id,goal", '1,"Write a poem,', 'with ""two""', '  verses"', "2,short", ""])
    assert read_instructions(put(tmp_path, "list.csv", "\ufeff" + text)) == [
        'Write a poem, with "two" verses',
        "short",
    ]


def test_csv_column(tmp_path: Path) -> None:
    path = put(tmp_path, "list.CSV", "prompt,mine\na,b\n# c,# d\n")
    assert read_instructions(path) == ["a", "# c"]
    assert read_instructions(path, "mine") == ["b", "# d"]
    with pytest.raises(UsageError, match="no column yours") as caught:
        read_instructions(path, "yours")
    assert "prompt, mine" in caught.value.hint


def test_csv_without_a_usual_column(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column that holds instructions") as caught:
        read_instructions(put(tmp_path, "list.csv", "first,second\na,b\n"))
    assert "--column" in caught.value.hint
    assert "first, second" in caught.value.hint


def test_csv_with_an_open_quote(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="not a well-formed CSV"):
        read_instructions(put(tmp_path, "list.csv", 'prompt\n"open\n'))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no instruction"),
        (b"\xef\xbb\xbf\n\n", "holds no instruction"),
        (b"GGUF\x03\0\0\0", "not a text file"),
        ("Write a poem".encode("utf-16"), "not a text file"),
        ("one\ntwo\ncaf\u00e9\n".encode("latin-1"), r"not UTF-8 \(line 3\)"),
    ],
    ids=["missing", "empty", "blank", "binary", "utf-16", "latin-1"],
)
@pytest.mark.parametrize("name", ["list.txt", "list.jsonl", "list.csv"])
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        put(tmp_path, name, content)
    with pytest.raises(ForgeError, match=words) as caught:
        read_instructions(tmp_path / name)
    assert name in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_files_of_comments_or_a_header_alone(tmp_path: Path) -> None:
    for name, text in (("list.txt", "# one\n  # two\n"), ("list.csv", "prompt\n")):
        with pytest.raises(ForgeError, match="holds no instruction"):
            read_instructions(put(tmp_path, name, text))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="cannot read the list"):
        read_instructions(tmp_path)


def test_folder_reads_its_text_files_in_order_of_name(tmp_path: Path) -> None:
    put(tmp_path, "b.txt", "three\n")
    put(tmp_path, "a.TXT", "one\ntwo\n")
    put(tmp_path, "c.csv", "prompt\nfour\n")
    (tmp_path / "d.txt").mkdir()
    assert read_folder(tmp_path) == ["one", "two", "three"]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    put(tmp_path, "c.csv", "prompt\nfour\n")
    with pytest.raises(ForgeError, match=r"holds no \.txt file") as caught:
        read_folder(tmp_path)
    assert caught.value.hint
    for path in (tmp_path / "nowhere", tmp_path / "c.csv"):
        with pytest.raises(ForgeError, match="is not a folder") as caught:
            read_folder(path)
        assert caught.value.hint


@on_disk
@given(LINES)
def test_text_round_trip(tmp_path: Path, lines: list[str]) -> None:
    assert read_instructions(put(tmp_path, "list.txt", "\n".join(lines))) == lines


@on_disk
@given(LINES, st.booleans())
def test_jsonl_round_trip(tmp_path: Path, lines: list[str], ascii_only: bool) -> None:
    text = "\n".join(json.dumps({"n": 1, "task": line}, ensure_ascii=ascii_only) for line in lines)
    assert read_instructions(put(tmp_path, "list.jsonl", text), "task") == lines


@on_disk
@given(LINES, st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip(tmp_path: Path, lines: list[str], end: str) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator=end).writerows([("n", "task"), *((1, line) for line in lines)])
    assert read_instructions(put(tmp_path, "list.csv", buffer.getvalue()), "task") == lines

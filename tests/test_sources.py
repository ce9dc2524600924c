"""Reading a user's own instruction lists."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.prompts import sources
from ollama_forge.prompts.sources import read_folder, read_instructions

_TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\ufeff"), max_size=30)
LINES = st.lists(
    _TEXT.map(lambda line: " ".join(line.split())).filter(lambda line: line and not line.startswith("#")),
    min_size=1,
    max_size=8,
)
USUAL = st.sampled_from(["prompt", "instruction", "text"])
on_disk = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_comments_blank_lines_and_spacing(tmp_path: Path) -> None:
    path = put(tmp_path, "list.txt", "# category: x\n\nWrite  a\tpoem \n   # another\n  \nUse C# well\n")
    assert read_instructions(path) == ["Write a poem", "Use C# well"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
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


@pytest.mark.parametrize("line", ["{broken", "[1]", "3", "null", '{"prompt": "a"} trailing', "[" * 100_000])
def test_jsonl_rows_that_are_no_objects(tmp_path: Path, line: str) -> None:
    with pytest.raises(ForgeError, match="line 2: not a JSON object") as caught:
        read_instructions(put(tmp_path, "list.jsonl", '{"prompt": "a"}\n' + line))
    assert caught.value.hint


def test_values_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="row 1: column prompt is not a string"):
        read_instructions(put(tmp_path, "list.jsonl", '{"prompt": ["a"]}'))
    with pytest.raises(ForgeError, match="line 2: the row ends before the column prompt"):
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
        ("Write a poem".encode("utf-16-le"), "not a text file"),
        (b"\xff\xfea", "not UTF-16"),
        (b"\xff\xfe\0\0", "not a text file|holds no instruction"),
        (b"PK\x03\x04\x14\0", "a spreadsheet"),
        (b"PAR1\x15", "a Parquet file"),
        (b"<!DOCTYPE html>\n<p>Sign in", "a web page"),
        (b"prompt\rone\rtwo", "carriage returns"),
        ("one\ntwo\ncaf\u00e9\n".encode("latin-1"), r"not UTF-8 \(line 3\)"),
    ],
    ids=[
        "missing",
        "empty",
        "blank",
        "binary",
        "no mark",
        "odd utf-16",
        "utf-32 of nothing",
        "zip",
        "parquet",
        "html",
        "old mac",
        "latin-1",
    ],
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
    with pytest.raises(ForgeError, match=r"cannot read the list .* it is a folder") as caught:
        read_instructions(tmp_path)
    assert "--harmful-dir" in caught.value.hint


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / "nul\0.txt", tmp_path / ("long" * 200)):
        with pytest.raises(ForgeError, match="cannot read the list") as caught:
            read_instructions(path)
        assert caught.value.hint == "check the path"

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = put(tmp_path, "list.txt", "one\n")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ForgeError, match="Permission denied") as caught:
        read_instructions(path)
    assert caught.value.hint == "check its permissions"
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ForgeError, match="cannot read the folder"):
        read_folder(tmp_path)


def test_a_file_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "list.txt", "1234567\n")
    monkeypatch.setattr(sources, "_LARGEST_FILE", 8)
    assert read_instructions(path) == ["1234567"]
    monkeypatch.setattr(sources, "_LARGEST_FILE", 7)
    with pytest.raises(ForgeError, match="larger than 7 B"):
        read_instructions(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "# head\r\nWrite a poem\r\ncaf\u00e9 \U0001f600\r\n"),
        ("list.csv", "id;prompt\r\n1;Write a poem\r\n2;caf\u00e9 \U0001f600\r\n"),
        ("list.json", '["Write a poem", "caf\u00e9 \U0001f600"]'),
    ],
)
def test_byte_order_marks_tell_the_encoding(tmp_path: Path, encoding: str, name: str, text: str) -> None:
    assert read_instructions(put(tmp_path, name, f"\ufeff{text}".encode(encoding))) == [
        "Write a poem",
        "caf\u00e9 \U0001f600",
    ]


@pytest.mark.parametrize(
    "value",
    [
        ["one", "two"],
        [{"text": "x", "prompt": "one", "id": 7}, {"prompt": "two", "category": None}],
        {"version": 1, "data": [{"goal": "one"}, {"goal": "two"}]},
        {"id": [1, 2], "prompt": ["one", "two"]},
        {"anything": ["one", "two"]},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json(tmp_path: Path, value: object, indent: int | None) -> None:
    path = put(tmp_path, "list.json", json.dumps(value, indent=indent))
    assert read_instructions(path) == ["one", "two"]
    for name in ("list.txt", "list", "list.md"):  # never the prompts "[", "{", ...
        with pytest.raises(ForgeError, match="JSON, not one instruction per line") as caught:
            read_instructions(put(tmp_path, name, path.read_bytes()))
        assert ".json" in caught.value.hint


def test_json_columns(tmp_path: Path) -> None:
    path = put(tmp_path, "list.json", json.dumps({"bad": [{"task": "a", "text": "b"}], "good": [{"text": "c"}]}))
    with pytest.raises(UsageError) as caught:
        read_instructions(path)
    assert "bad, good" in caught.value.hint
    assert read_instructions(path, "good") == ["c"]
    rows = put(tmp_path, "rows.json", json.dumps([{"task": "a", "text": "b"}]))
    assert read_instructions(rows, "task") == ["a"]
    with pytest.raises(UsageError, match="row 1: no column prompt"):
        read_instructions(rows, "prompt")


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    lines = '{"prompt": "one"}\n{"prompt": "two"}\n'
    assert read_instructions(put(tmp_path, "list.json", lines)) == ["one", "two"]
    assert read_instructions(put(tmp_path, "list.ndjson", lines)) == ["one", "two"]
    with pytest.raises(ForgeError, match="JSONL, not one instruction per line"):
        read_instructions(put(tmp_path, "list.txt", lines))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('["one", "tw', "not well-formed JSON"),
        ("[" * 100_000, "nested too deeply|not well-formed"),
        ('{"a": ' * 100_000, "nested too deeply|not well-formed"),
        ('[{"prompt": 3}]', "column prompt is not a string"),
        ("[3]", "row 1: neither a string nor an object"),
        ("3", "no JSON array"),
        ('{"prompt": "one"}', "no JSON array"),
        ("[]", "holds no instruction"),
        ('[""]', "holds no instruction"),
    ],
)
def test_json_that_is_no_list(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ForgeError, match=words) as caught:
        read_instructions(put(tmp_path, "list.json", text))
    assert caught.value.hint


def test_numbers_of_any_size_beside_an_instruction(tmp_path: Path) -> None:
    row = '{"id": ' + "7" * 10_000 + ', "prompt": "one"}'
    assert read_instructions(put(tmp_path, "list.jsonl", row)) == ["one"]
    assert read_instructions(put(tmp_path, "list.json", f"[{row}]")) == ["one"]


@pytest.mark.parametrize("header", ["text,instruction", "question,Prompt", "id,text,goal"])
def test_the_usual_column_goes_by_meaning(tmp_path: Path, header: str) -> None:
    row = ",".join(["other"] * header.count(",") + ["meant"])
    assert read_instructions(put(tmp_path, "list.csv", f"{header}\n{row}\n")) == ["meant"]
    fields = dict(zip(header.split(","), row.split(","), strict=True))
    assert read_instructions(put(tmp_path, "list.jsonl", json.dumps(fields))) == ["meant"]


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("prompt,prompt\na,b\n", "2 columns are called prompt", "rename"),
        ("prompt\nWrite, a poem\n", "line 2: 2 fields under a header of 1", "quotes around fields that hold a comma"),
        ("id;prompt\n1;a;b\n", "line 2: 3 fields under a header of 2", "hold a semicolon"),
        ("prompt\n" + "long " * 40_000, "not a well-formed CSV", "131,072 characters"),
    ],
)
def test_tables_that_do_not_hold_together(tmp_path: Path, text: str, words: str, hint: str) -> None:
    with pytest.raises(ForgeError, match=words) as caught:
        read_instructions(put(tmp_path, "list.csv", text))
    assert hint in caught.value.hint


def test_rows_may_lack_or_add_empty_fields_at_their_end(tmp_path: Path) -> None:
    assert read_instructions(put(tmp_path, "list.csv", "prompt,note\na,x\nb\nc,,,\n\n")) == ["a", "b", "c"]


def test_tab_separated(tmp_path: Path) -> None:
    text = "id\tprompt\n1\tMix, then stir\n2\tcount\n"
    assert read_instructions(put(tmp_path, "list.tsv", text)) == ["Mix, then stir", "count"]
    assert read_instructions(put(tmp_path, "list.csv", text)) == ["Mix, then stir", "count"]


@pytest.mark.parametrize("header", ["goal,target", ",Goal,Category", "id;prompt", "id\tprompt", "Instruction"])
def test_a_table_under_another_name_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(ForgeError, match=r"[CT]SV, not one instruction per line"):
        read_instructions(put(tmp_path, "list.txt", f"# of mine\n{header}\na,b\n"))
    prose = ["Write a text, please", "Answer the question", "[Verse] Write a song", "{name} is sad. Cheer her up"]
    assert read_instructions(put(tmp_path, "prose.txt", "\n".join(prose))) == prose


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    inside = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"
    lines = [f"first{char}half" for char in inside] + ["\ufeff# no instruction", "\ufeffmarked in\ufeffside"]
    expected = ["first half"] * len(inside) + ["marked inside"]
    assert read_instructions(put(tmp_path, "list.txt", "\n".join(lines))) == expected
    table = "\r\n".join(["prompt", *lines[:-2], lines[-1]])
    assert read_instructions(put(tmp_path, "list.csv", table)) == expected
    rows = "\n".join(json.dumps(line, ensure_ascii=False) for line in [*lines[:-2], lines[-1]])
    assert read_instructions(put(tmp_path, "list.jsonl", rows)) == expected


def test_half_a_surrogate_pair_and_control_characters(tmp_path: Path) -> None:
    path = put(tmp_path, "list.jsonl", r'{"prompt": "Write \ud83d"}' + "\n" + r'"a\u0000b\u001b[1m\u007f\ud83d\ude00"')
    assert read_instructions(path) == ["Write ?", "a b [1m \U0001f600"]


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl", "list.json"])
def test_an_instruction_longer_than_any_context(tmp_path: Path, name: str) -> None:
    long = "word " * 30_000
    with pytest.raises(ForgeError, match="149,999 characters") as caught:
        read_instructions(
            put(tmp_path, name, long if name == "list.txt" else json.dumps(long if "l" in name[-1] else [long]))
        )
    assert "line ends" in caught.value.hint


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
    with pytest.raises(ForgeError, match="cannot read the folder"):
        read_folder(tmp_path / ("long" * 200))
    for path in (tmp_path / "nowhere", tmp_path / "c.csv"):
        with pytest.raises(ForgeError, match="is not a folder") as caught:
            read_folder(path)
        assert caught.value.hint


@on_disk
@given(LINES)
def test_text_round_trip(tmp_path: Path, lines: list[str]) -> None:
    assume(not lines[0].startswith(("[", "{")))  # such lines may be JSON, which a list of lines is not read as
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


_JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | USUAL, inner, max_size=4),
)
_CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(st.characters(), max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]), st.text(max_size=40)).map(
        lambda p: p[1].encode(p[0])
    ),
    _JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(_JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.text(st.sampled_from('prompt,;\t"\n\r id12\ufeff\u2028'), max_size=60).map(str.encode),
    st.text(st.sampled_from('prompt,"\n 12'), max_size=40).map(lambda rows: f"prompt,text\n{rows}".encode()),
)


@settings(on_disk, max_examples=500)
@given(_CONTENTS, st.sampled_from(["txt", "csv", "tsv", "json", "jsonl", "md"]), st.none() | st.just("prompt"))
def test_any_bytes_are_a_list_or_an_expected_failure(
    tmp_path: Path, content: bytes, suffix: str, column: str | None
) -> None:
    lines, failure = [], None
    try:
        lines = read_instructions(put(tmp_path, f"list.{suffix}", content), column)
    except ForgeError as error:
        failure = error
    assert bool(lines) == (failure is None)
    if failure is not None:
        assert failure.hint
        assert len(f"{failure.message}{failure.hint}".splitlines()) == 1
    for line in lines:
        assert line.encode()
        assert line.splitlines() == [line]
        assert line == line.strip()
        assert "\0" not in line

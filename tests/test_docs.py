"""The docs: the site builds, and commands and options in them exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

from ollama_forge.cli.base import DefaultGroup
from ollama_forge.cli.main import cli
from tests.docs_blocks import ROOT, Block, blocks, pages, prose

NEEDS = {"cluster", "docker", "gpu", "hub", "network", "ollama"}  # what the tests have not
LANGUAGES = {"diff", "json", "python", "sh", "synopsis", "text", "toml"}
OTHERS = {"ollama", "curl", "codex", "claude", "pip", "uv", "python3", "docker"}  # programs whose options are not ours

OF_VLLM = {"--enable-lora", "--gpu-memory-utilization", "--quantization"}  # which the docs speak of


def commands(group: click.Group, name: str = "ollama-forge") -> Iterator[tuple[str, click.Command]]:
    yield name, group
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


COMMANDS = dict(commands(cli))


def shown(text: str, synopsis: bool = False) -> Iterator[list[str]]:
    """The words of each command of this program in a text of the shell; lines that end in a backslash are joined."""
    text = re.sub(r"\n +", " ", text) if synopsis else text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.partition("   #")[0], comments=not synopsis) if "ollama-forge " in line else []
        if "ollama-forge" in words:
            yield words[words.index("ollama-forge") :]


def options_of(command: click.Command) -> set[str]:
    """The options of a command, and ``--help``."""
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}


def command_of(words: list[str]) -> click.Command:
    depth = max((n for n in (1, 2, 3) if " ".join(words[:n]) in COMMANDS), default=0)
    return COMMANDS[" ".join(words[:depth])]


BY_LAST_WORDS = {re.sub("^ollama-forge (abliterate )?", "", name): command for name, command in COMMANDS.items()}
OPTIONS = {option for command in COMMANDS.values() for option in options_of(command)}
ALL = [block for page in pages() for block in blocks(page)]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_says_what_it_needs_and_its_commands_exist(block: Block) -> None:
    assert block.language in LANGUAGES
    assert not block.needs or block.needs in NEEDS
    commands_shown = [] if block.language == "text" else list(shown(block.text, block.language == "synopsis"))
    for words in commands_shown:
        command = command_of(words)
        named = {option for word in words for option in re.findall(r"^\[?(--[a-z0-9-]+)", word)}
        assert named <= options_of(command), words
        assert not isinstance(command, click.Group) or isinstance(command, DefaultGroup), f"{words} is no command"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_command_hides_in_an_indented_block(page: Path) -> None:
    """A block that is not fenced would neither be run nor say what it needs."""
    lines = ["", *prose(page)]
    alone = [line for before, line in pairwise(lines) if not before.strip() and line.startswith("    ")]
    assert [line for line in alone if not line.lstrip().startswith(("-", "*"))] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_option_that_is_named_exists(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    named = {option for line in lines for option in re.findall(r"`(--[a-z0-9][a-z0-9-]*)", line)}
    theirs = {option for line in lines if OTHERS & set(line.split()) for option in re.findall("--[a-z-]+", line)}
    assert named - OPTIONS - theirs - OF_VLLM == set()
    for words in re.findall(r"`((?:[a-z-]+ )+[^`]*--[^`]*)`", "\n".join(prose(page))):
        named_command = re.match(r"(?:ollama-forge )?(?:abliterate )?((?:(?:runs|cache) rm )?[a-z-]+)", words)
        command = named_command and BY_LAST_WORDS.get(named_command[1])
        if command:  # `run --strengthen` in a sentence
            assert set(re.findall(r"(?<=\s)--[a-z0-9][a-z0-9-]*", words)) <= options_of(command), words

"""The docs: the site builds, and commands and options in them exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ollama_forge.cli.main import cli
from tests.docs_blocks import ROOT, Block, blocks, pages

NEEDS = {
    "a terminal", "an environment of its own", "cluster", "gpu", "hub", "network", "ollama", "the server above", "time"
}  # fmt: skip
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


def shown(text: str) -> Iterator[list[str]]:
    """The words of each command of this program in a text of the shell; lines that end in a backslash are joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition("   #")[0], comments=True) if "ollama-forge " in line else []
        if "ollama-forge" in words:
            yield words[words.index("ollama-forge") :]


def options_of(command: click.Command) -> set[str]:
    """The options of a command, and ``--help``."""
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}


def command_of(words: list[str]) -> click.Command:
    depth = max((n for n in (1, 2, 3) if " ".join(words[:n]) in COMMANDS), default=0)
    return COMMANDS[" ".join(words[:depth])]


OPTIONS = {option for command in COMMANDS.values() for option in options_of(command)}
ALL = [block for page in pages() for block in blocks(page)]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_says_what_it_needs_and_its_commands_exist(block: Block) -> None:
    assert block.language, "a block without a language"
    assert not block.needs or block.needs in NEEDS
    for words in shown(block.text):
        command = command_of(words)
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options_of(command)
        assert not isinstance(command, click.Group), f"{words} is no command"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_option_that_is_named_exists(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    named = {option for line in lines for option in re.findall(r"`(--[a-z0-9][a-z0-9-]*)", line)}
    theirs = {option for line in lines if OTHERS & set(line.split()) for option in re.findall("--[a-z-]+", line)}
    assert named - OPTIONS - theirs - OF_VLLM == set()
    for line in lines:
        if line.startswith("    ollama-forge "):  # a synopsis: what is in it may stand in brackets
            words = line.partition("   #")[0].split()
            assert set(re.findall(r"--[a-z0-9][a-z0-9-]*", " ".join(words))) <= options_of(command_of(words)), line

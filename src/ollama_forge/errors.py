"""Exceptions for expected failures, the exit statuses, and hints for missing packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit status of a command; ``EXIT_STATUSES`` says what each one means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130


EXIT_STATUSES: Mapping[ExitStatus, str] = {  # docs/command-line.md has the same table
    ExitStatus.DONE: "the command did what it was asked to",
    ExitStatus.FAILED: "the command failed; stderr says why and what to do",
    ExitStatus.USAGE: "an option or argument is wrong; nothing was done",
    ExitStatus.INTERRUPTED: "the command was interrupted with Ctrl-C; a run goes on when it is repeated",
}


class ForgeError(Exception):
    """An expected failure. The CLI prints it without traceback and exits with 1.

    Names that come from a file may hold line ends, and characters that control a terminal: those are escaped.

    Attributes:
        message: what is wrong, in one line.
        hint: what the user can do, in one line.
    """

    exit_status = ExitStatus.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = printable(hint)


def printable(text: str) -> str:
    r"""``text`` with characters that are not printable as their escapes, such as ``\x1b``."""
    if text.isprintable():
        return text
    escape = "unicode_escape"
    return "".join(one if one.isprintable() else one.encode(escape).decode() for one in text)


class UsageError(ForgeError):
    """An invalid option or argument. The CLI exits with 2."""

    exit_status = ExitStatus.USAGE


class MemoryTooSmall(ForgeError):  # noqa: N818
    """A model does not fit the free memory."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters; its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def error_line(error: BaseException) -> str:
    """``first_line``, preceded by the class name if the message needs it (``KeyError: 'x'``)."""
    text = first_line(error)
    name = type(error).__name__
    return (
        text
        if isinstance(error, OSError | ValueError | ImportError | RuntimeError) or text == name
        else f"{name}: {text}"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean A or B?`` with the names most like ``name``; "" if none is like it."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def install_hint(*extras: str) -> str:
    """The command that installs this program from its clone with ``extras`` (``abliterate``, ``llamacpp``).

    The package of the same name on the package index is another program, so no hint mentions it.
    """
    listed, flags = ",".join(extras), " ".join(f"--extra {extra}" for extra in extras)
    return (
        f"in the clone of this program: pip install -c constraints.txt -e '.[{listed}]' "
        f"(to use a GPU, without -c constraints.txt), or: uv sync {flags}"
    )


def require_abliterate(command: str) -> None:
    """Check that the packages of the extra ``abliterate`` are installed, without importing them.

    Args:
        command: the command that needs them, for the message.

    Raises:
        ForgeError: a package is missing.
    """
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ForgeError(
            f"{command} needs the extra 'abliterate' (missing: {', '.join(missing)})", install_hint("abliterate")
        )

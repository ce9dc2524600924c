"""The expected failures, how to install what a command lacks, and the check for the packages it needs."""

from __future__ import annotations

import importlib.util


class ForgeError(Exception):
    """An expected failure: ``message`` says what is wrong, ``hint`` what to do. The CLI exits with 1."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ForgeError):
    """An option or argument that can never work. The CLI exits with 2."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters; the exception's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def error_line(error: BaseException) -> str:
    """``first_line``, preceded by the exception's kind where the text alone says little (``KeyError: 'x'``)."""
    text = first_line(error)
    name = type(error).__name__
    return (
        text
        if isinstance(error, OSError | ValueError | ImportError | RuntimeError) or text == name
        else f"{name}: {text}"
    )


def install_hint(*extras: str) -> str:
    """How to install this program with ``extras`` (``abliterate``, ``llamacpp``), from its clone.

    The package of the same name on the package index is another program, so no message names that.
    """
    listed, flags = ",".join(extras), " ".join(f"--extra {extra}" for extra in extras)
    return (
        f"in the clone of this program: pip install -c constraints.txt -e '.[{listed}]' "
        f"(to use a GPU, without -c constraints.txt), or: uv sync {flags}"
    )


def require_abliterate(command: str) -> None:
    """Check that the packages of the extra ``abliterate`` are installed, without importing them.

    Raises:
        ForgeError: some are missing.
    """
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ForgeError(
            f"{command} needs the extra 'abliterate' (missing here: {', '.join(missing)})", install_hint("abliterate")
        )

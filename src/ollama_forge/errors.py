"""The one hierarchy of expected failures, and the check for the extras that heavier commands need."""

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
    """What a library's exception says, in one line of at most 300 characters."""
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


def require_abliterate(command: str) -> None:
    """Raise unless the packages of the extra ``abliterate`` can be imported; importing none of them."""
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ForgeError(
            f"{command} needs the extra 'abliterate' (missing here: {', '.join(missing)})",
            "pip install 'ollama-forge[abliterate]'",
        )

"""Check that two models answer the same token ids: the same vocabulary, and the same prompts from the chat template."""

from __future__ import annotations

from collections.abc import Mapping

from ollama_forge.errors import ForgeError
from ollama_forge.text.tokenizer import Tokenizer

_USER = {"role": "user", "content": "Name a colour."}
_PROBES: dict[str, list[Mapping[str, str]]] = {
    "a prompt": [_USER],
    "a prompt after a first exchange": [_USER, {"role": "assistant", "content": "Blue."}, _USER],
    "a prompt with a system message": [{"role": "system", "content": "Be brief."}, _USER],
}
_EXCERPT = 60  # characters of a rendered prompt in a message


def require_same_prompts(base: Tokenizer, other: Tokenizer, label: str) -> None:
    """Check that a model has the base's vocabulary and chat template.

    Args:
        label: the name of the other model, for the message.

    Raises:
        ForgeError: they differ; the message says where.
    """
    found = _vocabulary_difference(base, other) or _template_difference(base, other)
    if found is not None:
        raise ForgeError(f"{label} cannot be compared with the base: {found}", "give --base the model it was made of")


def _vocabulary_difference(base: Tokenizer, other: Tokenizer) -> str | None:
    ours, theirs = base.backend.get_vocab(), other.backend.get_vocab()
    differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    if not differing:
        return None
    token = differing[0]
    ids = " and ".join("none" if (found := ids.get(token)) is None else str(found) for ids in (ours, theirs))
    return f"the ids of {len(differing):,} tokens differ, such as those of {token!r} ({ids})"


def _template_difference(base: Tokenizer, other: Tokenizer) -> str | None:
    for name, messages in _PROBES.items():
        ours, theirs = (_rendered(tokenizer, messages) for tokenizer in (base, other))
        if ours != theirs:
            where = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(min(ours, theirs))
            )
            start = max(0, where - _EXCERPT // 3)
            parts = " and ".join(repr(text[start : start + _EXCERPT]) for text in (ours, theirs))
            return f"its chat template renders {name} differently: {parts}"
    return None


def _rendered(tokenizer: Tokenizer, messages: list[Mapping[str, str]]) -> str:
    """The prompt; a refusal of the template counts as a rendering of its own."""
    try:
        return tokenizer.render(messages)
    except ForgeError as error:
        return f"(refused: {error.message})"

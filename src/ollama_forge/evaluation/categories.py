"""The classes of the answers to harmful prompts by category of misuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ollama_forge.evaluation.counts import Counts
from ollama_forge.prompts.curated import categories

ByCategory = dict[str, dict[str, Counts]]
"""Category of misuse -> row name -> classes of the answers."""


def by_category(prompts: Sequence[str], rows: Mapping[str, Counts]) -> ByCategory:
    """Divide the classes of the answers to harmful prompts by the prompts' categories in the curated list.

    Args:
        prompts: the harmful prompts.
        rows: for each row, the classes of its answers to these prompts in order, or to the first ones alone.

    Returns:
        The categories in alphabetical order. Prompts that are not curated belong to none.
    """
    found = categories(prompts)
    return {
        category: {
            name: Counts("".join(letter for letter, own in zip(counts.classes, found, strict=False) if own == category))
            for name, counts in rows.items()
        }
        for category in sorted({own for own in found if own is not None})
    }

"""The measurements in a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = (
    "model",
    "harmful refused",
    "safe but sound unsafe, refused",
    "harmless refused",
    "degenerate",
    "answer KL",
    "first-token KL",
)


def measurement_lines(rows: Mapping[str, Mapping[str, Any]], noise_floor: Mapping[str, Any] | None) -> list[str]:
    """The table of the measurements in Markdown, with what they do not say.

    Args:
        rows: measurements by row name, as in ``report.json``.
        noise_floor: the damage of rounding the base to 8 bits; None if it was not measured.
    """
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER))]
    for name, row in rows.items():
        answers = row["general"]
        cells = (
            name,
            _refused(row["harmful"]),
            _refused(row["over_refusal"]),
            _refused(row["harmless"]),
            f"{answers['degenerate']}/{answers['total']}" if answers["total"] else "",
            *_damage(row["damage"]),
        )
        lines.append(_line(cells))
    if noise_floor is not None:
        lines.append(_line(("base rounded to 8 bits", *[""] * 4, *_damage(noise_floor))))
    control = "`random direction` is the same edit with a random direction. " if "random direction" in rows else ""
    return [
        *lines,
        "",
        "Measured on prompts that took no part in computing or choosing the edit, with 95 % intervals over prompts. "
        f"{control}KL is the divergence from the base on general prompts, in nats: a token of the base's own answers, "
        "and at the first token. Degenerate answers (loops, word salad) are those to general prompts.",
        "",
        "Refusals are told by rules from the first 128 tokens of a greedy answer. The figures do not say whether an "
        "answer is correct, nor what the edit does to long answers, to other languages or to knowledge that these "
        "prompts do not touch.",
        "",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _refused(counts: Mapping[str, Any]) -> str:
    if not counts["total"]:
        return ""
    rate = counts["refusal_rate"]
    return f"{counts['refusal']}/{counts['total']} ({rate['low']:.0%} to {rate['high']:.0%})"


def _damage(damage: Mapping[str, Any]) -> tuple[str, str]:
    return _nats(damage["answer_kl"]), _nats(damage["first_token_kl"])


def _nats(kl: Mapping[str, Any] | None) -> str:
    if kl is None:
        return ""
    return "0" if kl["high"] == 0 else f"{kl['value']:.3f} ({kl['low']:.3f} to {kl['high']:.3f})"

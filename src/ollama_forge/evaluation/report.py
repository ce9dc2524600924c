"""What a run shows and keeps: ``report.json`` (described in docs/report.md) and the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.evaluation.verify import Check
from ollama_forge.files import write_json

SCHEMA = 1
_HEADER = ("model", "harmful refused", "harmless refused", "degenerate (harmless)", "first-token KL")


@dataclass(frozen=True)
class ShippedFile:
    """The GGUF file of a run.

    Attributes:
        quantised_by: ``embedded``, or the tool that did it.
        pre_tokenizer_fallback: the rules that stand in for ones the converter does not know; None where it does.
        tokenizer_of_source: whether its tokenizer is that of a GGUF source, not made from the checkpoint's.
    """

    path: Path
    quant: str
    size: int
    quantised_by: str
    pre_tokenizer_fallback: str | None
    tokenizer_of_source: bool = False

    @property
    def row(self) -> str:
        """Its name among the measurements."""
        return f"GGUF ({self.quant})"

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "quant": self.quant,
            "bytes": self.size,
            "quantised_by": self.quantised_by,
            "pre_tokenizer_fallback": self.pre_tokenizer_fallback,
            "tokenizer_of_source": self.tokenizer_of_source,
        }


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        rows: what was measured on report prompts, under ``base``, ``random direction``, ``edited`` and ``GGUF (TYPE)``.
        file: the GGUF file, None where there is none; ``file_problem`` says why.
        tokens: None where the file's tokens were not checked.
        ollama: ``made``, what Ollama said of the model it made (null where it made none), and ``problem``, why.
        modelfile: for ``ollama create``, beside the file.
        to_type: commands that register the file, where that is left to do.
    """

    model: str
    name: str
    fingerprint: str
    prompts: dict[str, dict[str, int]]
    lists: dict[str, dict[str, str]]
    notes: list[str]
    choice: dict[str, Any]
    rows: dict[str, Measurement]
    checks: list[Check] | None
    seconds: dict[str, float]
    folder: Path
    file: ShippedFile | None = None
    file_problem: str = ""
    tokens: TokenCheck | None = None
    ollama: Mapping[str, Any] = field(default_factory=dict)
    modelfile: Path | None = None
    to_type: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether every check of the written weights passed."""
        return self.checks is not None and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": __version__,
            "model": self.model,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "prompts": self.prompts,
            "lists": self.lists,
            "notes": self.notes,
            "choice": self.choice,
            "measurements": {name: row.to_json() for name, row in self.rows.items()},
            "verification": None
            if self.checks is None
            else {"passed": self.verified, "checks": [check.to_json() for check in self.checks]},
            "gguf": {
                **({} if self.file is None else self.file.to_json()),
                "problem": self.file_problem,
                "tokens": None if self.tokens is None else self.tokens.to_json(),
            },
            "ollama": dict(self.ollama),
            "seconds": self.seconds,
        }

    def file_lines(self) -> list[str]:
        """What a reader must know of the GGUF file."""
        if self.file is None:
            return [f"no GGUF file: {self.file_problem}"]
        lines = []
        if self.file.pre_tokenizer_fallback:
            lines.append(
                "warning: llama.cpp's converter does not know this tokenizer's rules; "
                f"{self.file.pre_tokenizer_fallback!r} stands in for them"
            )
        return [*lines, *_token_lines(self.tokens, self.file.tokenizer_of_source)]

    def ollama_lines(self) -> list[str]:
        """What became of the model in Ollama, and what to type next for it."""
        made = self.ollama.get("made")
        if made is None:
            if not self.to_type:
                return []
            return [f"not in Ollama ({self.ollama['problem']}); to register it:", *(f"  {c}" for c in self.to_type)]
        notes = [f"note: {note}" for note in made["notes"]]
        wrong = [f"warning: {difference}" for difference in made["differences"]]
        return [
            f"in Ollama: {made['name']} ({made['quantization']})",
            *notes,
            *wrong,
            f"run it: ollama run {self.name}",
        ]

    def save(self) -> None:
        write_json(self.folder / "report.json", self.to_json())

    def table(self) -> list[tuple[str, ...]]:
        """Header and rows as text."""
        out: list[tuple[str, ...]] = [_HEADER]
        for name, row in self.rows.items():
            kl = "0" if name == "base" else f"{row.kl.value:.3f} ({row.kl.low:.3f} to {row.kl.high:.3f})"
            out.append(
                (
                    name,
                    _rate(row.harmful.refusal, row.harmful.total, row.harmful.refused),
                    _rate(row.harmless.refusal, row.harmless.total, row.harmless.refused),
                    _rate(row.harmless.degenerate, row.harmless.total, row.harmless.broken),
                    kl,
                )
            )
        return out


def _rate(count: int, total: int, rate: Estimate) -> str:
    return f"{count}/{total} ({rate.low:.0%} to {rate.high:.0%})"


def _token_lines(check: TokenCheck | None, of_source: bool) -> list[str]:
    if check is None:
        return ["tokens unchecked: pip install 'ollama-forge[llamacpp]' to have them compared"]
    if not check.mismatches:
        return [f"tokens: {check.texts} texts, all as in the checkpoint"]
    lines = [f"tokens: {check.mismatches} of {check.texts} texts differ from the checkpoint's, such as"]
    for each in check.examples:
        lines.append(f"  {each.text!r}: {' '.join(each.found)!r} instead of {' '.join(each.expected)!r}"[:400])
    if of_source:
        lines.append(
            "the file has its source's own tokenizer; it is the unpacked checkpoint that reads these otherwise"
        )
    elif check.garbled:
        lines.append(
            f"warning: this file garbles text ({check.garbled} of {check.texts} texts in more than whitespace); "
            "chat and serve use the checkpoint's own tokenizer and don't"
        )
    return lines

"""The report of a run: ``report.json`` (described in docs/report.md), its page, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.directions.separation import Separation
from ollama_forge.edits.layer_changes import LayerChange
from ollama_forge.errors import install_hint
from ollama_forge.evaluation.categories import ByCategory, by_category
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import Damage, Measurement
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.evaluation.verify import Check
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.files import write_json, write_text
from ollama_forge.models.machine import Machine
from ollama_forge.ollama.register import Registered
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.records import finite, to_json
from ollama_forge.reporting import render
from ollama_forge.search.ladder import Choice

SCHEMA = 2
_NOT_AVAILABLE = "not available"
_NOT_ASKED = "not asked"
_ANSWERS = (
    "model",
    "harmful refused",
    "deflected",
    "in context",
    "over-refused",
    "harmless refused",
    "degenerate",
)
_DAMAGE = ("model", "answer KL", "95th percentile", "first-token KL", "answer NLL under base", "perplexity")


@dataclass(frozen=True)
class Report:
    """The results of one run.

    Attributes:
        rows: measurements on report prompts by row name: ``base``, ``random direction``, ``edited``, ``GGUF (TYPE)``,
            ``in Ollama``.
        noise_floor: the damage that rounding the base model to 8 bits does; None if it was not measured.
        checks: the checks of the written weights; None if they were not verified.
        files: the GGUF files; if there are none, ``file_problem`` says why.
        tokens: the check of the file's tokens; None if it was not done.
        registered: the model in Ollama; if None, ``ollama_problem`` says why.
        written: the edited checkpoint's folder, or the GGUF files of a GGUF source, or both.
        edit_file: the edit file.
        modelfile: path of the Modelfile for ``ollama create``.
        commands: shell commands that register the file; empty if it is registered.
        certificate: what is proven of the architecture, as ``describe_certificate`` gives it.
        separation: how well the direction of each layer and position separates select prompts; None if not measured.
        changes: how much the edit changed the matrices of each layer.
        settings: the settings of the run.
        machine: the machine that it ran on.
    """

    model: str
    name: str
    fingerprint: str
    split: PromptSplit
    choice: Choice
    rows: Mapping[str, Measurement]
    noise_floor: Damage | None
    checks: tuple[Check, ...] | None
    seconds: Mapping[str, float]
    folder: Path
    written: tuple[Path, ...] = ()
    edit_file: Path | None = None
    files: tuple[QuantisedFile, ...] = ()
    file_problem: str = ""
    tokens: TokenCheck | None = None
    registered: Registered | None = None
    ollama_problem: str = ""
    modelfile: Path | None = None
    commands: tuple[str, ...] = field(default=())
    certificate: Mapping[str, Any] | None = None
    separation: Separation | None = None
    changes: tuple[LayerChange, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Machine | None = None

    @property
    def file(self) -> QuantisedFile | None:
        """The GGUF file that is registered in Ollama, the first one."""
        return self.files[0] if self.files else None

    @property
    def verified(self) -> bool | None:
        """Whether every check of the written weights passed; None if they were not verified."""
        return None if self.checks is None else all(check.passed for check in self.checks)

    @property
    def categories(self) -> ByCategory:
        """The answers to harmful prompts by category of misuse; empty without measurements."""
        return by_category(self.split.report.harmful, {name: row.harmful for name, row in self.rows.items()})

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``; what is not a number, or infinite, is null there."""
        content = {
            "schema": SCHEMA,
            "version": __version__,
            "model": self.model,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "prompts": self.split.counts(),
            "lists": self.split.hashes(),
            "notes": list(self.split.notes),
            "certificate": self.certificate,
            "choice": to_json(self.choice),
            "measurements": {name: to_json(row) for name, row in self.rows.items()},
            "noise_floor": None if self.noise_floor is None else to_json(self.noise_floor),
            "categories": {
                category: {name: to_json(counts) for name, counts in rows.items()}
                for category, rows in self.categories.items()
            },
            "separation": None if self.separation is None else to_json(self.separation),
            "layer_changes": [to_json(change) for change in self.changes],
            "verification": None
            if self.checks is None
            else {"passed": self.verified, "checks": [to_json(check) for check in self.checks]},
            "gguf": {
                **({} if self.file is None else self.file.described()),
                "others": [file.described() for file in self.files[1:]],
                "problem": self.file_problem,
                "tokens": None if self.tokens is None else to_json(self.tokens),
            },
            "ollama": {
                "made": None if self.registered is None else self.registered.described(),
                "problem": self.ollama_problem or None,
            },
            "settings": dict(self.settings),
            "machine": None if self.machine is None else to_json(self.machine),
            "seconds": dict(self.seconds),
        }
        return {key: finite(value) for key, value in content.items()}

    def certificate_lines(self) -> list[str]:
        """Lines to print about what is proven of the architecture; none without a certificate."""
        if self.certificate is None:
            return []
        unproven = self.certificate["unproven"]
        if not unproven:
            return [f"architecture: {self.certificate['tier']}"]
        return [
            f"architecture: {self.certificate['tier']}; not proven and not edited: "
            f"{self.certificate['unproven_matrices']:,} matrices",
            *(f"  {reason}" for reason in dict.fromkeys(unproven.values())),
        ]

    def file_lines(self) -> list[str]:
        """Lines to print about the GGUF file and its tokens."""
        if self.file is None:
            return [f"no GGUF file: {self.file_problem}"]
        lines = []
        if self.file.pre_tokenizer_fallback:
            lines.append(
                "warning: llama.cpp's converter does not know this tokenizer's rules; "
                f"the file uses those of {self.file.pre_tokenizer_fallback!r} instead"
            )
        return [*lines, *_token_lines(self.tokens, self.file.tokenizer_of_source)]

    def ollama_lines(self) -> list[str]:
        """Lines to print about the model in Ollama, with the next commands."""
        made = self.registered
        if made is None:
            if not self.commands:
                return []
            return [f"not in Ollama ({self.ollama_problem}); register it with:", *(f"  {c}" for c in self.commands)]
        return [
            f"in Ollama: {made.name} ({made.shown.quantization})",
            *(f"note: {note}" for note in made.notes),
            *made.prompts.lines(),
            *(f"warning: {difference}" for difference in made.differences),
            f"run it: ollama run {self.name}",
        ]

    def save(self) -> None:
        """Write ``report.json``, and ``report.html`` from it."""
        content = self.to_json()
        write_json(self.folder / "report.json", content)
        write_text(self.folder / "report.html", render(content))

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """Tables as text by title, each a header and one line per measurement; none without measurements."""
        return tables(self.rows, self.noise_floor)


def tables(rows: Mapping[str, Measurement], noise_floor: Damage | None) -> dict[str, list[tuple[str, ...]]]:
    """Tables as text by title, each a header and one line per measurement; none without measurements."""
    if not rows:
        return {}
    answers: list[tuple[str, ...]] = [_ANSWERS]
    damage: list[tuple[str, ...]] = [_DAMAGE]
    for name, row in rows.items():
        answers.append((name, *_answer_cells(row)))
        if row.damage != Damage():
            damage.append((name, *_damage_cells(row.damage)))
    if noise_floor is not None:
        damage.append(("base rounded to 8 bits", *_damage_cells(noise_floor)))
    return {"answers to report prompts, 95 % intervals": answers, "damage on general report prompts": damage}


def _answer_cells(row: Measurement) -> tuple[str, ...]:
    in_context, broken = row.second_turn + row.system_prompt, row.harmless + row.general
    return (
        _rate(row.harmful.refusal, row.harmful.total, row.harmful.refusal_rate),
        f"{row.harmful.deflection}/{row.harmful.total}",
        f"{in_context.refusal}/{in_context.total}" if in_context.total else _NOT_ASKED,
        _rate(row.over_refusal.refusal, row.over_refusal.total, row.over_refusal.refusal_rate),
        _rate(row.harmless.refusal, row.harmless.total, row.harmless.refusal_rate),
        f"{broken.degenerate}/{broken.total}",
    )


def _damage_cells(damage: Damage) -> tuple[str, ...]:
    nll = "" if damage.answer_nll is None else f"{damage.answer_nll.value:.3f}"
    return (
        _nats(damage.answer_kl),
        _NOT_AVAILABLE if damage.answer_kl_p95 is None else f"{damage.answer_kl_p95:.3f}",
        _nats(damage.first_token_kl),
        nll,
        _NOT_AVAILABLE if damage.perplexity is None else f"{damage.perplexity:.2f}",
    )


def _nats(found: Estimate | None) -> str:
    if found is None:
        return _NOT_AVAILABLE
    return "0" if found.high == 0 else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _rate(count: int, total: int, rate: Estimate) -> str:
    if not total:
        return _NOT_ASKED
    return f"{count}/{total} ({rate.low:.0%} to {rate.high:.0%})"


def _token_lines(check: TokenCheck | None, of_source: bool) -> list[str]:
    if check is None:
        return [f"tokens not checked: the check needs xllamacpp; {install_hint('abliterate', 'llamacpp')}"]
    if not check.mismatches:
        return [f"tokens: all {check.texts} texts agree with the checkpoint's tokenizer"]
    lines = [f"tokens: {check.mismatches} of {check.texts} texts differ from the checkpoint's tokenizer, such as"]
    for example in check.examples:
        found, expected = " ".join(example.found), " ".join(example.expected)
        lines.append(f"  {example.text!r}: {found!r} instead of {expected!r}"[:400])
    if check.composed:
        lines.append(
            f"{check.composed} of them differ by Unicode composition alone: the checkpoint's tokenizer makes "
            "one character of a letter and its accents, and llama.cpp does not; text that is composed already gets "
            "the same tokens"
        )
    if of_source:
        lines.append(
            "the file keeps the tokenizer of its GGUF source; the tokenizer of the decoded checkpoint differs from it"
        )
    elif check.garbled:
        lines.append(
            f"warning: this file garbles text: {check.garbled} of {check.texts} texts differ in more than whitespace; "
            "chat and serve use the checkpoint's own tokenizer and are not affected"
        )
    return lines

"""What ``inspect`` prints: a few lines about the model, a table for each kind of layer, and what is not edited."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ollama_forge.architectures.certificate.certificate import Certificate, Tier
from ollama_forge.architectures.model_map import Role
from ollama_forge.inspection import Inspection
from ollama_forge.inspection.inspection import MatrixRow, NormRow

_COLUMNS = ("role", "tensor", "shape", "stored", "stream", "norm", "edited")
_MOST_RANGES = 6


def print_inspection(found: Inspection) -> None:
    """Print an inspection on stdout: with tables on a terminal, else as plain lines with aligned columns."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for line in _summary(found):
        say(line)
    for title, rows in _sections(found):
        say("")
        if sys.stdout.isatty():
            say(title)
            table = Table(*_COLUMNS, box=None, padding=(0, 2, 0, 0), header_style="bold")
            for row in rows:
                table.add_row(*row)
            console.print(table, markup=False)
        else:
            for line in _aligned(title, rows):
                say(line)
    for line in _closing(found):
        say(line)


def _summary(found: Inspection) -> Iterator[str]:
    yield found.model + (f" ({found.revision})" if found.revision else "")
    if found.sizes is not None:
        sizes = found.sizes
        parts = [f"{sizes.layers} layers", f"d_model {sizes.d_model:,}", f"vocabulary {sizes.vocabulary:,}"]
        parts += [f"{sizes.experts} experts a layer"] if sizes.experts else []
        parts += [f"{_count(sizes.parameters)} parameters", "tied head" if found.tied else "head of its own"]
        yield f"architecture: {found.model_type}: {', '.join(parts)}"
    yield f"tier: {found.tier.value}{_measured(found.certificate)}"
    yield from (f"  {reason}" for reason in found.reasons)
    if found.matrices:
        settings = found.settings
        edited = sum(row.experts or 1 for row in found.matrices if row.strength is not None)
        total = sum(row.experts or 1 for row in found.matrices)
        norms = ", norms preserved" if settings.norm_preserving else ""
        yield (
            f"edit: {settings.factors} on {', '.join(settings.targets)}, strength {settings.strength:g}{norms}: "
            f"{edited:,} of {total:,} matrices"
        )
    if found.unused is not None and found.unused.count:
        groups = ", ".join(f"{name} ({count:,})" for name, count in found.unused.groups.items())
        tensors = "1 tensor" if found.unused.count == 1 else f"{found.unused.count:,} tensors"
        size = f"{tensors}, {_count(found.unused.parameters)} parameters"
        yield f"copied without a role: {size}: {groups}"


def _measured(certificate: Certificate | None) -> str:
    """The certificate's figures: the most that an edit of all matrices of a kind left on the twin."""
    if certificate is None:
        return ""
    parts = []
    for leaks, what in (
        (certificate.writers, "an edit of all writers left {:.1g} of the stream"),
        (certificate.readers, "one of all readers {:.1g} of what a layer adds"),
    ):
        if leaks:
            parts.append(what.format(max(leak.after for leak in leaks)))
    return f" (on its twin, {' and '.join(parts)})" if parts else ""


def _count(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


# Sections: a table for each kind of layer


def _sections(found: Inspection) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and rows for each group of layers that differ in their numbers alone, and for what is outside them."""
    groups: dict[tuple[MatrixRow, ...], list[list[MatrixRow]]] = {}
    layers: dict[int | None, list[MatrixRow]] = {}
    for row in found.matrices:
        layers.setdefault(row.layer, []).append(row)
    outside = layers.pop(None, [])
    for rows in layers.values():
        groups.setdefault(tuple(_without_layer(row) for row in rows), []).append(rows)
    for alike, members in groups.items():
        prefix = _common_prefix([row.tensor for row in alike])
        numbers = [rows[0].layer for rows in members if rows[0].layer is not None]
        cells = [_cells(row, prefix, _edited([rows[index] for rows in members])) for index, row in enumerate(alike)]
        yield f"{_layers(numbers)}: {prefix}", cells
    if outside:
        yield "outside the layers:", [_cells(row, "", _edited([row])) for row in outside]


def _without_layer(row: MatrixRow) -> MatrixRow:
    """The row with ``N`` for the layer's number, and without what may differ between layers of one kind."""

    def renamed(name: str) -> str:
        return ".".join("N" if part == str(row.layer) else part for part in name.split("."))

    norms = tuple(replace(norm, tensor=norm.tensor and renamed(norm.tensor)) for norm in row.norms)
    bias = row.bias and renamed(row.bias)
    return replace(row, layer=-1, tensor=renamed(row.tensor), norms=norms, bias=bias, strength=None, reason=None)


def _common_prefix(names: Sequence[str]) -> str:
    """The parts, with a final dot, that all names start with."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _cells(row: MatrixRow, prefix: str, edited: str) -> tuple[str, ...]:
    shape = (row.experts, *row.shape) if row.experts is not None else row.shape
    return (
        row.role,
        _short(row.tensor, prefix),
        " x ".join(str(size) for size in shape),
        row.storage,
        "writes" if row.writes else "reads",
        ", ".join(_norm(norm, prefix) for norm in row.norms) or ("none" if row.writes else "none (bare stream)"),
        edited,
    )


def _short(tensor: str, prefix: str) -> str:
    return tensor.removeprefix(prefix).removesuffix(".weight")


def _norm(norm: NormRow, prefix: str) -> str:
    gain = "1" if norm.tensor is None else _short(norm.tensor, prefix) + (f" + {norm.offset:g}" if norm.offset else "")
    return gain + (" (centred)" if norm.centred else "" if norm.normalises else " (bare gain)")


def _edited(rows: Sequence[MatrixRow]) -> str:
    """At what strength these rows, one per layer, are edited."""
    strengths = sorted({row.strength for row in rows if row.strength is not None})
    if not strengths:
        return "-"
    text = f"{strengths[0]:.3g}" + (f" to {strengths[-1]:.3g}" if len(strengths) > 1 else "")
    numbers = [row.layer for row in rows if row.strength is not None and row.layer is not None]
    return text if len(numbers) in (0, len(rows)) else f"{text} in {_ranges(numbers)}"


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"


def _ranges(numbers: Iterable[int]) -> str:
    """``0-2, 4, 6-8``; of many ranges the first ones and the last."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return ", ".join(texts if len(texts) <= _MOST_RANGES else [*texts[: _MOST_RANGES - 1], "…", texts[-1]])


def _aligned(title: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (_COLUMNS, *rows)) for column in range(len(_COLUMNS))]
    yield title
    for row in (_COLUMNS, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


# What is not edited, and warnings


def _closing(found: Inspection) -> Iterator[str]:
    reasons = list(_reasons(found))
    if reasons:
        yield "\nnot edited:"
        yield from (f"  {reason}" for reason in reasons)
    for loud in found.loud:
        if not loud.post_norms:
            yield (
                f"note: the norm in front of the {loud.part}'s readers amplifies channel {loud.channel}, "
                f"{loud.ratio:.1f} times the layer's median (median of the layers; up to {loud.largest:.1f})"
            )
    yield from (f"warning: {warning}" for warning in found.warnings)
    if found.tier is Tier.PARTIAL:
        yield "apply, run and compute-dir edit the proven part with --allow-partial"


def _reasons(found: Inspection) -> Iterator[str]:
    roles = [row.role for row in found.matrices if Role(row.role) not in found.settings.roles]
    if roles:
        yield f"{', '.join(dict.fromkeys(roles))}: not in --targets {','.join(found.settings.targets)}"
    others: dict[str, set[int]] = {}
    for row in found.matrices:
        if row.reason is not None and row.role not in roles:
            layers = others.setdefault(row.reason, set())
            if row.layer is not None:
                layers.add(row.layer)
    for reason, layers in others.items():
        yield f"{_layers(sorted(layers))}: {reason}" if layers else reason

"""What the edit changed in the weights, and what was checked of them."""

from __future__ import annotations

from ollama_forge.reporting.axes import Scale, x_axis, y_axis
from ollama_forge.reporting.blocks import WIDTH, definitions, figure, figures, section, table
from ollama_forge.reporting.entry import Entry, count, general, small_percent, words
from ollama_forge.reporting.marks import SERIES, legend, line, mark
from ollama_forge.reporting.markup import Child, Html, tag

_LEFT, _RIGHT = 46.0, WIDTH - 14.0
_ROLES = {
    "o": "attention output",
    "down": "MLP output",
    "q": "query",
    "k": "key",
    "v": "value",
    "qkv": "query, key and value",
    "mixer": "other input of a token mixer",
    "gate": "MLP gate",
    "up": "MLP input",
    "gate_up": "MLP gate and input",
    "router": "router",
    "embedding": "embedding",
    "position": "position embedding",
    "unembedding": "unembedding",
}


def weights(report: Entry) -> Html | None:
    """The section on the edited weights; None if the report is of no edit."""
    if not report["choice"]:
        return None
    return section(
        "Weights", _verification(report), _certificate(report["certificate"]), figures(_changes(report)), _files(report)
    )


def _verification(report: Entry) -> Child:
    found = report["verification"]
    if not found:
        return tag("p", "The written weights were not verified.")
    passed = found["passed"].value is True
    text = "Every check of the written weights passed." if passed else "A check of the written weights failed."
    lines = [
        (
            words(check["name"]),
            "passed" if check["passed"].value else tag("strong", "failed"),
            general(check["worst"]),
            general(check["bound"]),
            words(check["where"]) if check["where"] else "",
        )
        for check in found["checks"]
    ]
    header = ("check", "result", "worst value", "bound", "where")
    return (tag("p", text), table("Checks of the written weights", header, lines))


def _certificate(certificate: Entry) -> Child:
    if not certificate:
        return None
    reasons = certificate["unproven"] or certificate["reasons"]
    listed = [entry for _, entry in reasons.items()] if isinstance(reasons.value, dict) else list(reasons)
    distinct = {str(entry.value): entry for entry in listed}
    return (
        tag(
            "p",
            "Architecture: ",
            tag("strong", words(certificate["tier"])),
            "; matrices left as they are because an edit of them is not proven to be right: ",
            count(certificate["unproven_matrices"]),
            ".",
        ),
        tag("ul", (tag("li", words(entry)) for entry in distinct.values())) if distinct else None,
    )


def _changes(report: Entry) -> Html | None:
    """The relative change of the matrices of each layer."""
    roles: dict[str, list[Entry]] = {}
    for change in report["layer_changes"]:
        roles.setdefault(str(change["role"].value), []).append(change)
    layered = {role: [change for change in found if change["layer"].value is not None] for role, found in roles.items()}
    layered = {role: found for role, found in layered.items() if found}
    if not layered:
        return None
    every = [change for found in layered.values() for change in found]
    last = int(
        max([*(change["layer"].number for change in every), len(report["separation"]["layers"].value or []) - 1])
    )
    x = Scale.of_layers(last, _LEFT, _RIGHT)
    y = Scale.of([100 * change["change"].number for change in every], 34.0 + 180, 34.0)
    drawn: list[Child] = [x_axis(x, y.start, "layer"), y_axis(y, _LEFT, "change, % of the norm", grid_to=_RIGHT)]
    series = {role: (place + 2) % SERIES for place, role in enumerate(layered)}
    for role, found in layered.items():
        points = [(x(change["layer"].number), y(100 * change["change"].number)) for change in found]
        drawn += [line(series[role], points), *(mark(series[role], *point) for point in points)]
    title = "Change per layer"
    lines = [
        (
            count(change["layer"]) if change["layer"].value is not None else "none",
            _ROLES.get(str(change["role"].value), str(change["role"].value)),
            small_percent(change["change"]),
            count(change["matrices"]),
        )
        for found in roles.values()
        for change in found
    ]
    return figure(
        title,
        "For each layer and kind of edited matrix, how far the edit moved it, as a share of its norm.",
        drawn,
        y.start + 42,
        figures=table(title, ("layer", "matrix", "change", "matrices"), lines),
        caption="|W\u2032 \u2212 W| / |W| in Frobenius norms: root mean square over the matrices of a kind in a layer.",
        legend=legend([(series[role], _ROLES.get(role, role), False) for role in layered]),
    )


def _files(report: Entry) -> Child:
    gguf, made = report["gguf"], report["ollama"]["made"]
    rows: list[tuple[Child, Child]] = []
    for entry in [gguf, *gguf["others"]]:
        if entry["file"]:
            quantised = ("quantised by ", words(entry["quantised_by"])) if entry["quantised_by"] else "not quantised"
            content: Child = (words(entry["quant"]), ", ", count(entry["bytes"]), " bytes, ", quantised)
            rows.append((("GGUF file ", words(entry["file"])), content))
    if gguf["problem"]:
        rows.append(("no GGUF file", words(gguf["problem"])))
    if gguf["tokens"]:
        tokens = gguf["tokens"]
        content = (count(tokens["mismatches"]), " of ", count(tokens["texts"]), " texts are tokenized differently")
        rows.append(("tokens of the file", content))
    if made:
        rows.append(("in Ollama", words(made["name"])))
    elif report["ollama"]["problem"]:
        rows.append(("not in Ollama", words(report["ollama"]["problem"])))
    return definitions(rows) if rows else None

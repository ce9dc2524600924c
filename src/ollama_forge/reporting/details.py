"""Settings, provenance, and what the measures do not say."""

from __future__ import annotations

from collections.abc import Iterator

from ollama_forge.reporting.blocks import definitions, section, table
from ollama_forge.reporting.entry import Entry, count, decimal, general, shown, words
from ollama_forge.reporting.markup import Child, Html, separated, tag

_PARTS = ("fit", "select", "report")


def settings(report: Entry) -> Html | None:
    """The section on the settings of the run and of the chosen edit; None if the report has none."""
    chosen = [(f"edit: {key}", value) for key, value in _flat(report["choice"]["settings"])]
    rows = [*chosen, *_flat(report["settings"])]
    if not rows:
        return None
    lines = [
        (tag("code", key), separated(map(general, value), ", ") if isinstance(value.value, list) else general(value))
        for key, value in rows
    ]
    return section(
        "Settings", tag("details", tag("summary", "All settings"), table("Settings", ("name", "value"), lines))
    )


def _flat(entry: Entry, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """The entries of nested objects that hold a value or a list, with their path."""
    for key, value in entry.items():
        if isinstance(value.value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def provenance(report: Entry) -> Html:
    """The section on where the figures come from: program, model, prompts, machine and time."""
    rows: list[tuple[Child, Child]] = [("program", ("ollama-forge ", words(report["version"])))]
    for key, name in (("model", "source"), ("base", "base")):
        if report[key]:
            rows.append((name, words(report[key])))
    if report["fingerprint"]:
        rows.append(("fingerprint of its weights", tag("code", words(report["fingerprint"]))))
    rows += _machine(report["machine"])
    return section("Provenance", definitions(rows), _candidates(report), _prompts(report), _seconds(report["seconds"]))


def _machine(machine: Entry) -> list[tuple[Child, Child]]:
    if not machine:
        return []
    memory = decimal(machine["memory"], 0)
    rows: list[tuple[Child, Child]] = [
        ("system", words(machine["system"])),
        ("processor", words(machine["processor"])),
        ("cores, threads of torch", (count(machine["cores"]), ", ", count(machine["threads"]))),
        ("memory", (memory, " bytes")),
        ("computed in, on", (words(machine["dtype"]), ", ", words(machine["device"]))),
    ]
    if machine["accelerator"]:
        rows.append(("accelerator", words(machine["accelerator"])))
    rows += [(name, words(version)) for name, version in machine["versions"].items() if version]
    return rows


def _candidates(report: Entry) -> Child:
    rows = [
        (name, words(entry["kind"]), (words(value), ". ", words(entry["note"]) if entry["note"] else None))
        for name, entry in report["candidates"].items()
        for _, value in list(_flat(entry["identity"]))[:1]
    ]
    return table("Measured models", ("model", "kind", "identity"), rows) if rows else None


def _prompts(report: Entry) -> Child:
    """The number and the hash of each list; a run has them by part, a comparison has one part."""
    prompts, lists = report["prompts"], report["lists"]
    parts = [part for part in _PARTS if isinstance(prompts[part].value, dict)]
    if parts:
        named = [
            (part, name, prompts[part][name], lists[part][name]) for part in parts for name, _ in prompts[part].items()
        ]
    else:
        named = [("report", name, number, lists[name]) for name, number in prompts.items()]
    lines = [
        (f"{part}: {name.replace('_', ' ')}", count(number), tag("code", shown(digest, str(digest.value)[:16])))
        for part, name, number, digest in named
    ]
    return table("Prompts", ("list", "prompts", "SHA-256, its start"), lines) if lines else None


def _seconds(seconds: Entry) -> Child:
    lines = [(name, decimal(value, 1)) for name, value in seconds.items()]
    made = table("Seconds of each stage in this command", ("stage", "seconds"), lines)
    return tag("details", tag("summary", "Time of each stage"), made) if lines else None


def limits(report: Entry) -> Html:
    """The section on what the measures do not say."""
    items: list[Child] = [
        (
            tag("strong", "Refusals"),
            " are told from other answers by rules, from the first 128 tokens of a greedy answer. The rules read "
            "English best. They do not judge whether an answer is correct, or would be of use.",
        ),
        (
            tag("strong", "Damage"),
            " is measured on short answers to general prompts. It says little of long answers, of long contexts, of "
            "reasoning or of knowledge that the prompts do not touch. The KL figures are lower bounds: the base keeps "
            "its 512 most probable tokens.",
        ),
        (
            tag("strong", "Intervals"),
            " cover the choice of prompts alone. The curated harmful prompts were written together, and those of the "
            "report part resemble the others: other wordings may be refused more, or less.",
        ),
        (
            tag("strong", "No difference found"),
            " is not a proof that there is none: a list of a few hundred prompts shows differences of some points.",
        ),
    ]
    names = [name for name, _ in report["measurements"].items()]
    if any(name.startswith("random direction") for name in names):
        items.append(
            (
                tag("strong", "The control"),
                " is one random direction. It shows what a change of this size does, not how much directions differ.",
            )
        )
    if any(name.startswith("GGUF") for name in names):
        items.append(
            (
                tag("strong", "GGUF rows"),
                " are answered by llama.cpp, and by fewer prompts where it is slow. Their divergence is that of the "
                "decoded weights.",
            )
        )
    return section("Limits", tag("ul", (tag("li", item) for item in items)))

"""The model card (README.md) of an edited checkpoint, made from its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.architectures.certificate.certificate import Tier
from ollama_forge.checkpoints.companions import CARD, PROVENANCE
from ollama_forge.edits.card_table import measurement_lines

_LICENSE_KEYS = ("license", "license_name", "license_link")


def read_license(folder: Path) -> dict[str, str]:
    """The licence in the metadata of the model card in ``folder``.

    Returns:
        Those of ``license``, ``license_name`` and ``license_link`` that the card states; empty without a readable card.
    """
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard((folder / CARD).read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data
    except Exception:  # no card, or damaged YAML
        return {}
    return {key: value for key in _LICENSE_KEYS if isinstance(value := getattr(stated, key, None), str)}


def model_card(record: Mapping[str, Any]) -> str:
    """The text of the model card.

    Args:
        record: the content of ``abliteration.json``; that of GGUF files has an entry ``files``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = record["source"]
    gguf = "files" in record
    data = ModelCardData(
        base_model=source["model"] if source["kind"] == "hub" else None,
        library_name=None if gguf else "transformers",
        tags=["abliteration", "ollama-forge", *(["gguf"] if gguf else [])],
        **(source.get("license") or {}),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(record)}"))


def _body(record: Mapping[str, Any]) -> str:
    source, rows = record["source"], record.get("measurements") or {}
    changed = sum(entry.get("experts", 1) for entry in record["changed"].values())
    lines = [
        f"# {source['model']}, edited",
        "",
        f"ollama-forge {record['version']} edited the weights of `{source['model']}` along its refusal direction "
        f"(factors: {record['factors']}; {changed:,} matrices changed). `{PROVENANCE}` holds the "
        "settings, the change of each tensor and the hashes of the lists.",
        "",
        *_certificate_lines(record.get("certificate")),
        *_leak_lines(record["changed"]),
        _verified_line(record.get("verified")),
        "",
    ]
    if rows:
        lines += measurement_lines(rows, record.get("noise_floor"))
    lines += _ollama_lines(record.get("ollama"))
    lines += [
        "This is a research artefact. The licence of the base model applies to it. Its users are responsible for how "
        "they use it.",
        "",
    ]
    return "\n".join(lines)


def _ollama_lines(made: Mapping[str, Any] | None) -> list[str]:
    """How Ollama's prompts compare with the chat template's; nothing where Ollama has no such model."""
    if made is None:
        return []
    prompts = made["prompts"]
    if not prompts["compared"]:
        return [f"In Ollama its prompts were not compared: {prompts['problem']}.", ""]
    tool = ", one of them with a tool" if prompts["with_tools"] else ""
    told = f"{prompts['equal']} of {prompts['compared']} conversations{tool}"
    return [f"Ollama renders the prompts of the chat template in {told}.", ""]


def _certificate_lines(certificate: Mapping[str, Any] | None) -> list[str]:
    """What is proven of the architecture; nothing without a certificate."""
    if certificate is None:
        return []
    if certificate["tier"] == Tier.PROVEN:
        return ["Tier: proven. On a small twin of this architecture, an edit of all its matrices left nothing.", ""]
    count, reasons = certificate["unproven_matrices"], certificate["unproven"].values()
    left = f"{count:,} matrices were left as they are, because an edit of them is not proven to be right"
    lacking = "Not all that reads or writes the residual stream is known, and the rest was left as it is"
    return [
        f"**Tier: {certificate['tier']}.** {f'{left} (`{PROVENANCE}` names them)' if count else lacking}:",
        "",
        *(f"- {reason}" for reason in dict.fromkeys(reasons or certificate["reasons"])),
        "",
    ]


def _leak_lines(changed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How much of the edit rounding undid in matrices that are stored in a packed form."""
    leaks: dict[str, list[float]] = {}
    for matrix in changed.values():
        if "leak" in matrix:
            leaks.setdefault(matrix["stored_as"], []).append(matrix["leak"])
    lines = []
    for form, values in sorted(leaks.items()):
        what = f"{len(values)} of these matrices are stored as {form}"
        lines += [f"{what}; rounding to it undid at most {max(values):.2%} of an edit.", ""]
    return lines


def _verified_line(verified: object) -> str:
    if verified is None:
        return "The edit was not verified on the written weights."
    return (
        "The edit was verified on the written weights." if verified else "**Unverified: a check of the edit failed.**"
    )

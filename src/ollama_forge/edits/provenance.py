"""The provenance of an edited model, ``abliteration.json``, and the model card that is made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, PROVENANCE
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.apply import AppliedEdit, describe_changes
from ollama_forge.edits.expert_groups import equal, grouped
from ollama_forge.edits.model_card import model_card, read_license
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.settings import EditSettings
from ollama_forge.files import read_json, write_json, write_text
from ollama_forge.records import to_json

_LICENSE_KEYS = {"license": "general.license", "license_name": "general.license.name",
                 "license_link": "general.license.link"}  # fmt: skip


def describe_edit(
    checkpoint: Checkpoint,
    model: ModelMap,
    plan: EditPlan,
    settings: EditSettings | None,
    direction: RefusalDirection | None,
) -> dict[str, Any]:
    """What is known of an edit before it is applied: its source, its method and settings, and its direction."""
    return {
        "tool": "ollama-forge",
        "version": __version__,
        "source": {
            "model": checkpoint.public_name,
            "kind": checkpoint.kind,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "model_type": model.model_type,
            "license": _license(checkpoint),
        },
        "factors": plan.factors,
        "settings": to_json(settings) if settings else {},
        "fitted_to": plan.fitted_to,
        "direction": _describe_direction(direction),
    }


def write_provenance(
    described: Mapping[str, Any],
    model: ModelMap,
    plan: EditPlan,
    applied: AppliedEdit,
    path: Path,
    card: Path | None,
    *,
    output: Mapping[str, Any],
    left_out: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the provenance of an applied edit, and the model card that is made from it.

    Args:
        described: what ``describe_edit`` returned.
        card: the path of the model card; None to write none.
        output: entries about what was written.
        left_out: names of the source's files that were not copied.
        provenance: further entries, such as ``certificate`` and ``measurements``.
    """
    record = {
        **described,
        **output,
        "changed": describe_changes(applied, model),
        "changed_biases": sorted(applied.record.bias_shifts),
        "skipped": grouped(model, plan.skipped, equal),
        "left_out": list(left_out),
        "certificate": None,
        "verified": None,
        "measurements": None,
        **(provenance or {}),
    }
    write_json(path, record)
    if card is not None:
        write_text(card, model_card(record))


def update_provenance(folder: Path, **entries: Any) -> None:
    """Set entries in the provenance of an output folder, and rewrite its card.

    Args:
        entries: such as ``verified``, ``measurements`` and ``noise_floor``.
    """
    record = {**read_json(folder / PROVENANCE), **entries}
    write_json(folder / PROVENANCE, record)
    write_text(folder / CARD, model_card(record))


def _license(checkpoint: Checkpoint) -> dict[str, str]:
    """The licence that the source's model card, or the metadata of its GGUF file, states."""
    if isinstance(checkpoint, GgufCheckpoint):
        stated = {key: checkpoint.file.get(entry) for key, entry in _LICENSE_KEYS.items()}
        return {key: value for key, value in stated.items() if isinstance(value, str)}
    return read_license(checkpoint.folder)


def _describe_direction(direction: RefusalDirection | None) -> dict[str, Any] | None:
    if direction is None:
        return None
    return {
        "method": direction.method,
        "layer": direction.layer,
        "position": direction.position,
        "count": len(direction.vectors),
        "per_layer": direction.per_layer,
        **direction.details,
    }

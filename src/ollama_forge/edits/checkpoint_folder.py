"""An edited checkpoint as a whole folder: weights, companions, provenance and model card; its factors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.apply import AppliedEdit, apply_plan, describe_changes
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import folder_in_one_piece, human_size, read_json, write_json, write_text
from ollama_forge.records import to_json
from ollama_forge.system import free_space

PROVENANCE = "abliteration.json"
CARD = "README.md"


def edit_file(folder: Path) -> Path:
    """Where the factors of the checkpoint in ``folder`` lie: beside it, as loaders glob inside."""
    return folder.with_name(folder.name + ".edit.safetensors")


def check_output(folder: Path, needed: int) -> None:
    """Raise where ``folder`` must not be replaced, or its disk has no room for ``needed`` bytes.

    Only a folder that this program wrote (or an empty one) is ever replaced.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "give a folder for the edited checkpoint")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file():
        raise UsageError(f"{folder} holds something else than an edited checkpoint", "give a new folder")
    free = free_space(folder)
    if needed > free:
        raise ForgeError(
            f"the edited checkpoint needs {human_size(needed)}, {human_size(free)} are free at {folder}",
            "free some room or choose another folder",
        )


def output_size(checkpoint: Checkpoint, out_dtype: str) -> int:
    """Bytes that the edited checkpoint will take, an upper bound."""
    return checkpoint.parameters * 2 if out_dtype == "bf16" else checkpoint.tensors.total_size


def write_checkpoint(
    checkpoint: Checkpoint,
    model: ModelMap,
    plan: EditPlan,
    folder: Path,
    *,
    settings: EditSettings | None,
    out_dtype: str = "bf16",
    direction: RefusalDirection | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> AppliedEdit:
    """Apply ``plan`` and write the result to ``folder`` in one piece, the edit's factors beside it.

    Raises:
        ForgeError: no room, a damaged source, or a write that fails; ``folder`` is then as it was.
    """
    check_output(folder, output_size(checkpoint, out_dtype))
    if folder.exists() and folder.resolve() == checkpoint.folder.resolve():
        raise UsageError(f"{folder} is the model itself", "give another folder for the edited checkpoint")
    described = to_json(settings) if settings else {}
    with folder_in_one_piece(folder) as partial:
        applied = apply_plan(checkpoint, model, plan, partial, out_dtype, described)
        record = {
            "tool": "ollama-forge",
            "version": __version__,
            "source": {
                "model": checkpoint.public_name,
                "kind": checkpoint.kind,
                "revision": checkpoint.revision,
                "fingerprint": checkpoint.fingerprint,
                "model_type": model.model_type,
            },
            "factors": plan.factors,
            "settings": described,
            "out_dtype": out_dtype,
            "direction": _describe_direction(direction),
            "changed": describe_changes(applied.record),
            "changed_biases": sorted(applied.record.bias_shifts),
            "skipped": plan.skipped,
            "verified": None,
            "measurements": None,
            **(provenance or {}),
        }
        write_json(partial / PROVENANCE, record)
        write_text(partial / CARD, model_card(record))
    applied.record.save(edit_file(folder))
    return applied


def stamp(folder: Path, **entries: Any) -> None:
    """Add what was found out after writing (``verified``, ``measurements``) to a checkpoint's provenance and card."""
    record = {**read_json(folder / PROVENANCE), **entries}
    write_json(folder / PROVENANCE, record)
    write_text(folder / CARD, model_card(record))


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


def model_card(record: Mapping[str, Any]) -> str:
    """The README.md of an edited checkpoint, from its provenance."""
    source, rows = record["source"], record.get("measurements") or {}
    hub = source["kind"] == "hub"
    lines = [
        "---",
        *([f"base_model: {source['model']}"] if hub else []),
        "tags: [abliteration, ollama-forge]",
        "---",
        "",
    ]
    lines += [
        f"# {source['model']}, edited",
        "",
        f"The refusal direction of `{source['model']}` was edited in the weights by ollama-forge {record['version']} "
        f"(factors: {record['factors']}; {len(record['changed'])} matrices changed). `{PROVENANCE}` has every setting, "
        "the change of each tensor and the hashes of the lists.",
        "",
        _verified_line(record.get("verified")),
        "",
    ]
    if rows:
        lines += ["| model | harmful refused | harmless refused | first-token KL |", "|---|---|---|---|"]
        for name, row in rows.items():
            bad, good, kl = row["harmful"], row["harmless"], row["first_token_kl"]
            lines.append(
                f"| {name} | {bad['refusal']}/{bad['total']} | {good['refusal']}/{good['total']} "
                f"| {kl['value']:.3f} ({kl['low']:.3f} to {kl['high']:.3f}) |"
            )
        lines += ["", "Measured on prompts that took no part in computing or choosing the edit.", ""]
    lines += [
        "This is a research artefact. The licence of the base model applies to it, and whoever uses it answers for "
        "what is done with it.",
        "",
    ]
    return "\n".join(lines)


def _verified_line(verified: object) -> str:
    if verified is None:
        return "The edit was not verified on the written weights."
    return (
        "The edit was verified on the written weights." if verified else "**Unverified: a check of the edit failed.**"
    )

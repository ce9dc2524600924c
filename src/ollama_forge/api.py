"""``compute_dir`` and ``apply``: the functions behind the commands of the same names."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ollama_forge import __version__
from ollama_forge.architectures.model_map import Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.loaded_model import load_model
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.proven import describe_certificate, examine
from ollama_forge.edits.registry import check_bits, check_edit, method, registered_method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_workers import NO_SHARDS, NO_SHARDS_HINT, ShardSettings
from ollama_forge.edits.source_files import source_entry, source_location
from ollama_forge.edits.undo import Undone
from ollama_forge.edits.undo import keep_undo as write_undo_of
from ollama_forge.edits.undo import undo as undo_edit
from ollama_forge.errors import UsageError
from ollama_forge.export.adapters.registry import adapter_format
from ollama_forge.export.edited_gguf import GgufEdit, write_edited_file, write_edited_folder
from ollama_forge.files import require_place
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.progress import say
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.records import to_json
from ollama_forge.sources.resolve import resolve, resolve_gguf


@dataclass(frozen=True)
class ComputedDirection:
    """The direction, its file, and the edit file with fitted factors (None if the method has no fit)."""

    direction: RefusalDirection
    path: Path
    edit_path: Path | None


def edit_file_beside(path: Path) -> Path:
    """``refusal.pt`` -> ``refusal.edit.safetensors``."""
    return path.with_suffix(".edit.safetensors")


def compute_dir(
    model: str,
    output: Path,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    prompts: PromptSettings | None = None,
    load: LoadSettings | None = None,
    direction: DirectionSettings | None = None,
    edit: EditSettings | None = None,
    allow_partial: bool = False,
    cluster: Cluster | None = None,
) -> ComputedDirection:
    """Compute the refusal direction and write it to ``output`` (``.pt``) with its sidecar.

    Args:
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        edit: settings of the edit to prepare. The method sets the default number of pairs; if it fits factors to the
            model, they are written to an edit file beside ``output``.
        allow_partial: accept a model of which only a part is proven; factors are fitted to that part.
        cluster: its workers load copies of the model, which run the prompts.

    Raises:
        UsageError: a setting is unknown or not supported; it is raised before anything is fetched.
        ForgeError: the model or a list is missing, the model cannot be loaded or is not proven, or ``output`` cannot be
            written.
    """
    prompts, load, direction = prompts or PromptSettings(), load or LoadSettings(), direction or DirectionSettings()
    if output.suffix != ".pt":
        raise UsageError(f"--output {output} does not end in .pt", "for example --output refusal.pt")
    require_place(output)
    edit = edit or EditSettings()
    check_edit(edit)
    load.check()
    check_bits(edit, load.bits)
    uncapped = replace(prompts, max_measured=0)  # no note on select and report prompts, which are not used here
    split = uncapped.load(registered_method(edit.factors).pairs)
    loaded = load_model(
        model, load, revision=revision, adapter=adapter, edit=edit, allow_partial=allow_partial, cluster=cluster
    )
    fit, fingerprint = loaded.fitting(split).fit, loaded.source.fingerprint
    computed = compute_direction(loaded.chat, fit, direction, fingerprint=fingerprint, seed=prompts.seed)
    fitted = loaded.fit(edit, computed, fit, prompts.seed)
    computed.save(output)
    if not fitted:
        return ComputedDirection(computed, output, None)
    plan = loaded.plan(edit, computed, fitted)
    matrices = {
        name: MatrixRecord(factors.L, factors.K, plan.edits[name].strength, plan.edits[name].rescale)
        for name, factors in fitted.by_tensor.items()
    }
    record = EditRecord(edit.factors, fingerprint, matrices, settings=to_json(edit), fitted_to=fitted.fitted_to)
    record.save(edit_file_beside(output))
    return ComputedDirection(computed, output, edit_file_beside(output))


@dataclass(frozen=True)
class GgufOptions:
    """What ``apply`` writes for a GGUF source, beside the defaults.

    Attributes:
        output: the file to write, instead of a folder.
        quants: types to encode all tensors in, one file for each; empty for one file in the source's own types.
        imatrix: an importance matrix for ``quants``.
        keep_checkpoint: also write the edited checkpoint, to ``checkpoint`` in the folder.
        base: the Hugging Face release that the file was made from. Its config and tensor names are used, and a
            direction or an edit file that was computed on it is accepted.
    """

    output: Path | None = None
    quants: tuple[str, ...] = ()
    imatrix: Path | None = None
    keep_checkpoint: bool = False
    base: str | None = None

    def check(self, output_dir: Path | StoreFolder | None, adapter: str | None, *, keep_undo: bool) -> None:
        """Raise UsageError if options exclude each other."""
        if (output_dir is None) == (self.output is None):
            raise UsageError("give either --output-dir or --output", "--output FILE.gguf is for a GGUF source")
        if self.output is not None and (self.keep_checkpoint or len(self.quants) > 1):
            raise UsageError(
                "--output takes one file alone", "use --output-dir for several types and --keep-checkpoint"
            )
        if self.imatrix is not None and not self.quants:
            raise UsageError("--imatrix is for --quant", "leave it out: without --quant, tensors keep their types")
        if keep_undo and self.quants:
            raise UsageError(
                "with --quant every tensor gets another type, so that --keep-undo would keep a second copy of the file",
                "leave --keep-undo out, and keep the file itself",
            )
        if adapter is not None and self.base is not None:
            raise UsageError(
                "--base is for a GGUF file, into which --adapter cannot be merged", "leave out one of them"
            )

    def check_source(
        self, source: Checkpoint, out_dtype: str, shards: ShardSettings | None, cluster: Cluster | None
    ) -> None:
        """Raise UsageError for options that have no meaning for the source."""
        if not isinstance(source, GgufCheckpoint):
            if self != GgufOptions():
                raise UsageError(
                    f"{source.label} is not a GGUF file, which --output, --quant and --keep-checkpoint are for",
                    "leave them out; run makes a GGUF file of a checkpoint",
                )
        elif shards is not None and shards != ShardSettings():
            raise UsageError(NO_SHARDS, NO_SHARDS_HINT)
        elif cluster is not None:
            raise UsageError("a GGUF file is written as one, by one machine", "leave out --ray")
        elif out_dtype != "auto" and not (self.keep_checkpoint and out_dtype == "bf16"):
            raise UsageError(
                f"--out-dtype {out_dtype} has no meaning for a GGUF file",
                "tensors keep their types unless --quant is given, and --keep-checkpoint writes bf16",
            )


def apply(
    model: str,
    output_dir: Path | StoreFolder | None = None,
    *,
    refusal_pt: Path | None = None,
    edit_file: Path | None = None,
    per_layer: bool | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    settings: EditSettings | None = None,
    out_dtype: str = "auto",
    gguf: GgufOptions | None = None,
    allow_partial: bool = False,
    trust_remote_code: bool = False,
    keep_undo: bool = False,
    shards: ShardSettings | None = None,
    cluster: Cluster | None = None,
) -> tuple[Checkpoint | StoreFolder, AppliedEdit]:
    """Write the edited model tensor by tensor, without loading it: a checkpoint, or a GGUF file for a GGUF source.

    Args:
        output_dir: the folder to write, here or in an object store; None if ``gguf`` has an ``output``.
        refusal_pt: the file of the direction to edit out; exactly one of ``refusal_pt`` and ``edit_file`` is given.
        edit_file: an edit file that ``compute_dir`` or an earlier ``apply`` wrote.
        per_layer: whether ``refusal_pt`` holds one direction for each layer (True) or joint directions (False); None if
            the file says so.
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        settings: settings of the edit with ``refusal_pt``; None for the documented default.
        out_dtype: the rule for storage types: ``auto``, ``keep`` or ``bf16`` (see ``edits/out_dtype.py``).
        gguf: options for a GGUF source.
        allow_partial: accept a model of which only a part is proven, and edit that part.
        trust_remote_code: execute the model's own Python code if transformers has no class for the model.
        keep_undo: write ``<output>.undo`` too, with which ``undo`` needs no source.
        shards: how the shards of a checkpoint are written; None for one after the other, without links.
        cluster: its workers write the shards of a checkpoint, one each, on storage that all see.

    Returns:
        The edited checkpoint (that of the first GGUF file) or its folder in an object store, and the record of the
        edit.

    Raises:
        UsageError: both or none of the files are given, the method does not support a setting, or the method needs
            fitted factors, which only an edit file holds; or an option has no meaning for the source.
        ForgeError: the direction is of another model, the architecture cannot be learned or is not proven, weights are
            damaged, or the disk is full.
    """
    gguf = gguf or GgufOptions()
    gguf.check(output_dir, adapter, keep_undo=keep_undo)
    if cluster is not None and shards is not None and shards.workers > 1:
        raise UsageError("--workers and --ray exclude each other", "leave out --workers: the cluster has its own")
    if (refusal_pt is None) == (edit_file is None):
        raise UsageError("give either --refusal-pt or --edit", "compute-dir writes both files")
    if edit_file is not None and (settings is not None or per_layer is not None):
        raise UsageError("an edit file has its own settings", "leave out the options of the edit, or --edit")
    if edit_file is None:
        settings = settings or EditSettings()
        check_edit(settings)
    base = None if gguf.base is None else resolve(gguf.base, trust_remote_code=trust_remote_code)
    if base is None:
        source = resolve(model, revision, trust_remote_code=trust_remote_code, adapter=adapter)
    else:
        source = resolve_gguf(model, revision, base)
    gguf.check_source(source, out_dtype, shards, cluster)
    if isinstance(output_dir, StoreFolder) and (keep_undo or isinstance(source, GgufCheckpoint)):
        raise UsageError(
            "a checkpoint alone is written to an object store, no GGUF file and no undo file",
            "give a folder of this machine, and upload what it holds then",
        )
    examined = examine(source, trust_remote_code=trust_remote_code)
    model_map = examined.require_proven(source.label, settings, allow_partial=allow_partial)
    known = {source.fingerprint} if base is None else {source.fingerprint, base.fingerprint}
    direction = None
    if edit_file is not None:
        record = EditRecord.load(edit_file)
        plan = record.plan(model_map, record.fingerprint if record.fingerprint in known else source.fingerprint)
    else:
        assert refusal_pt is not None
        assert settings is not None
        direction = RefusalDirection.load(refusal_pt, model_map.d_model, model_map.n_layers, per_layer=per_layer)
        if direction.details.get("model_fingerprint") not in (None, *known):
            say(f"note: {refusal_pt} was computed from another model of the same dimensions")
        read = vector_reader(source.tensors)
        plan = method(settings.factors).plan(model_map, direction, FittedFactors(), settings, read)
    shared = model_map.tied or model_map.copies
    if shared and any(e.matrix.role is Role.EMBEDDING for e in plan.edits.values()):
        say("note: the unembedding is tied to the embedding, so it is edited too")
    provenance = {"certificate": describe_certificate(examined)}
    written: Checkpoint | StoreFolder
    if isinstance(source, GgufCheckpoint):
        assert not isinstance(output_dir, StoreFolder)
        edit = GgufEdit(source, model_map, plan, settings, direction, provenance, gguf.imatrix)
        written, applied = _write_gguf(edit, output_dir, gguf)
    else:
        assert output_dir is not None
        written = Checkpoint(output_dir, str(output_dir), "folder") if isinstance(output_dir, Path) else output_dir
        applied = write_checkpoint(
            source,
            model_map,
            plan,
            output_dir,
            settings=settings,
            out_dtype=out_dtype,
            direction=direction,
            provenance=provenance,
            shards=shards,
            cluster=cluster,
        )
    if keep_undo and isinstance(written, Checkpoint):
        write_undo_of(source, written.path if isinstance(written, GgufCheckpoint) else written.folder)
    return written, applied


def _write_gguf(edit: GgufEdit, folder: Path | None, options: GgufOptions) -> tuple[Checkpoint, AppliedEdit]:
    if folder is not None:
        made = write_edited_folder(edit, folder, options.quants, keep_checkpoint=options.keep_checkpoint)
    else:
        assert options.output is not None
        made = write_edited_file(edit, options.output, next(iter(options.quants), None))
    return edit.checkpoint.with_file(made.files[0]), made.applied


def undo(output: Path, target: Path, *, source: str | None = None) -> Undone:
    """Write the source of an edited checkpoint or GGUF file, byte for byte, checked by hash.

    Args:
        output: what ``apply`` or ``run`` wrote: a folder, or a ``.gguf`` file.
        target: the folder to write, or the ``.gguf`` file if the source is one.
        source: the model that was edited; None to look where it lay, and then for the undo file.

    Raises:
        UsageError: ``target`` exists, or cannot hold the source.
        ForgeError: the source is not to be found or has changed and there is no undo file, the undo file is damaged, or
            the disk is full. Nothing is then written.
    """
    place = None
    if source is not None:
        place = Path(source).expanduser()
        if not place.exists():
            entry = source_entry(output)
            place = source_location(resolve(source, entry.revision if entry.kind == "hub" else None))
    return undo_edit(output, target, source=place)


def export_adapter(
    edit_file: Path,
    model: str,
    output: Path,
    *,
    form: str = "peft",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the factors of an edit file as an adapter of the model that it edits.

    Args:
        output: the folder of a PEFT adapter, or the ``.gguf`` file of a GGUF adapter.
        form: ``peft`` or ``gguf``.

    Raises:
        UsageError: ``form`` is unknown, or ``output`` is not of that form or would be overwritten.
        ForgeError: the edit is of another model, or no adapter can express it; or the disk is full.
    """
    writer = adapter_format(form)
    writer.check_output(output)
    record = EditRecord.load(edit_file)
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    if record.fingerprint != source.fingerprint:
        say(f"note: the edit was computed from another file than {source.label}; its names and shapes are compared")
    model_map = examine(source, trust_remote_code=trust_remote_code).model_map
    entries = {"version": __version__, "base": source.public_name, "factors": record.factors}
    return writer.write(record, source, model_map, output, {**entries, "settings": json.dumps(dict(record.settings))})

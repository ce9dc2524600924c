"""``inspect``: map a model, certify its architecture, and say what an edit would change; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ollama_forge.architectures.certificate.certificate import Tier
from ollama_forge.architectures.model_map import Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.hub import TransferError, card_base_model
from ollama_forge.checkpoints.hub_headers import HubCheckpoint
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.proven import Examined, examine
from ollama_forge.edits.registry import check_edit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.inspection.inspection import Inspection, MatrixRow, Sizes
from ollama_forge.inspection.loud_channels import LOUD, LoudChannel, loud_channels, norm_tensors
from ollama_forge.inspection.rows import matrix_rows, unused_tensors
from ollama_forge.sources.resolve import look_up, require_editable, resolve


def inspect(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    settings: EditSettings | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Find out how a model is built, how much of that is proven, and what an edit would change.

    Of a model on the Hub, the config, the headers of the shards and the gains of the norms are read.

    Args:
        revision: branch, tag or commit of a Hub id.
        adapter: folder or Hub id of a PEFT adapter to merge into the model first, which is then downloaded as a whole.
        settings: settings of the edit; None for the documented default.
        trust_remote_code: execute the model's own Python code if transformers has no class for the model.

    Raises:
        UsageError: the method does not support a setting.
        ForgeError: the model does not exist or cannot be read. One that cannot be edited is of the tier ``refused``.
    """
    settings = settings or EditSettings()
    check_edit(settings)
    if adapter is None:
        checkpoint = look_up(model, revision, trust_remote_code=trust_remote_code)
    else:
        checkpoint = resolve(model, revision, trust_remote_code=trust_remote_code, adapter=adapter)
    try:
        require_editable(checkpoint, _base_model(checkpoint))
        examined = examine(checkpoint, trust_remote_code=trust_remote_code)
    except TransferError:
        raise
    except ForgeError as error:
        reason = f"{error.message} ({error.hint})" if error.hint else error.message
        model_type = str(checkpoint.config.get("model_type", ""))
        return Inspection(checkpoint.label, checkpoint.revision, model_type, Tier.REFUSED, (reason,), None, settings)
    return _inspection(checkpoint, examined, settings)


def _base_model(checkpoint: Checkpoint) -> str | None:
    listed = checkpoint.listed if isinstance(checkpoint, HubCheckpoint) else None
    return card_base_model(checkpoint.folder) if listed is None else listed.base_model


def _inspection(checkpoint: Checkpoint, examined: Examined, settings: EditSettings) -> Inspection:
    model, tensors = examined.model_map, checkpoint.tensors
    rows = matrix_rows(model, tensors, settings)
    loud = loud_channels(model, _read_vectors(tensors, norm_tensors(model)).__getitem__)
    return Inspection(
        model=checkpoint.label,
        revision=checkpoint.revision,
        model_type=model.model_type,
        tier=examined.tier,
        reasons=examined.reasons,
        certificate=examined.certificate,
        settings=settings,
        sizes=Sizes(
            model.d_model,
            model.n_layers,
            model.vocabulary,
            max((row.experts or 0 for row in rows), default=0),
            checkpoint.parameters,
        ),
        tied=model.tied or bool(model.copies),
        matrices=rows,
        unused=unused_tensors(model, tensors),
        loud=loud,
        warnings=tuple(_warnings(examined, rows, loud)),
    )


def _read_vectors(tensors: CheckpointTensors, names: Sequence[str]) -> dict[str, Tensor]:
    stored = tensors.read_all(names)
    return {name: decode_tensor(data, tensors[name].dtype, tensors[name].shape) for name, data in stored.items()}


def _warnings(examined: Examined, rows: Sequence[MatrixRow], loud: Sequence[LoudChannel]) -> Iterable[str]:
    model = examined.model_map
    if examined.idle:
        yield examined.idle_note
    yield from (_loud_warning(channel, model.n_layers) for channel in loud if channel.post_norms)
    if all(row.strength is None for row in rows):
        yield "these settings edit no matrix: lower --skip-begin-layers and --skip-end-layers, or widen --targets"
    embedding = [row for row in rows if row.role == Role.EMBEDDING and row.strength is not None]
    if embedding and (model.tied or model.copies):
        yield "the unembedding is tied to the embedding, so these settings edit it too"


def _loud_warning(loud: LoudChannel, n_layers: int) -> str:
    every = "every layer" if len(loud.layers) == n_layers else f"{len(loud.layers)} of {n_layers} layers"
    return (
        f"channel {loud.channel} of the residual stream is loud: the gain of the {loud.part}'s post-norm is there "
        f"{loud.ratio:.1f} times the layer's median (median of the layers; up to {loud.largest:.1f}; in "
        f"{every} {LOUD:g} or more). A difference of means may be little more than that one channel: use "
        "--method projected, which removes it with the harmless mean, and compare with the random direction"
    )

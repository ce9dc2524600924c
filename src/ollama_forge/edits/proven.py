"""Map a checkpoint with its certificate, refuse what is not proven, and describe the certificate in records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ollama_forge.architectures.certificate.certificate import Certificate, EditKind, Tier
from ollama_forge.architectures.learn import learn, map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.certify import certify_architecture
from ollama_forge.edits.expert_groups import equal, grouped
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say


@dataclass(frozen=True)
class Examined:
    """A checkpoint's map, with what is proven of it.

    Attributes:
        model_map: the matrices by role; those that are not proven say why.
        certificate: what is proven of the twin.
        idle: modules of the twin that never run on text, such as cross-attention to images; nothing is known of them.
    """

    model_map: ModelMap
    certificate: Certificate
    idle: tuple[str, ...] = ()

    @property
    def tier(self) -> Tier:
        """How much is proven: the certificate's tier, and at most partial if the checkpoint holds unmapped matrices."""
        if self.certificate.tier is Tier.PROVEN and self.model_map.gaps:
            return Tier.PARTIAL
        return self.certificate.tier

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the tier is not ``PROVEN``, one sentence each."""
        return (*self.certificate.reasons, *self.model_map.gaps)

    @cached_property
    def unproven(self) -> dict[str, str]:
        """Why each tensor that is not proven, and therefore not edited, is not."""
        return {matrix.tensor: matrix.unproven for matrix in self.model_map.matrices if matrix.unproven}

    def require_proven(self, label: str, settings: EditSettings | None, *, allow_partial: bool) -> ModelMap:
        """The map, if all matrices that the settings select are proven.

        An edit of writers alone needs only the proof of the writers, an edit of readers that of the readers.

        Args:
            label: the model's name for the message.
            settings: the settings of the edit; None for all matrices.
            allow_partial: accept a model of which only a part is proven; no plan selects the rest.

        Raises:
            ForgeError: no edit can free the stream; or the settings select no matrix; or a selected matrix is not
                proven, or a matrix of the checkpoint is not mapped, unless ``allow_partial``; or no selected matrix is
                proven.
        """
        if self.tier is Tier.REFUSED:
            raise ForgeError(
                f"{label} cannot be edited: {self.reasons[0]}{_and_more(self.reasons)}",
                "inspect shows all reasons; use another model",
            )
        chosen = [matrix for matrix in self.model_map.matrices if self._is_selected(matrix, settings)]
        if not chosen and settings is not None:
            raise settings.selects_nothing(self.model_map.n_layers)
        lacking = list(dict.fromkeys(matrix.unproven for matrix in chosen if matrix.unproven))
        reasons = [*lacking, *self.model_map.gaps]
        proven = sum(not matrix.unproven for matrix in chosen)
        if reasons and not (allow_partial and proven):
            raise ForgeError(
                f"not all of {label} is proven to be edited right: {reasons[0]}{_and_more(reasons)}",
                "inspect shows what is; --allow-partial edits that part and leaves the rest as it is"
                if proven
                else "use another model, or other --targets",
            )
        if reasons:
            left = f"{len(chosen) - proven} of {len(chosen)} matrices"
            say(f"note: {left} are not proven and left as they are: {reasons[0]}{_and_more(reasons)}")
        if self.idle:
            say(f"note: {self.idle_note}")
        return self.model_map

    @property
    def idle_note(self) -> str:
        """What to know of the modules that never run on text."""
        more = f" and {len(self.idle) - 1} more" if len(self.idle) > 1 else ""
        return f"modules that never run on text are not tested, and left as they are: {self.idle[0]}{more} of the twin"

    def _is_selected(self, matrix: Matrix, settings: EditSettings | None) -> bool:
        if settings is None:
            return True
        return settings.reason_to_skip(replace(matrix, unproven=""), self.model_map.n_layers) is None


def _and_more(reasons: tuple[str, ...] | list[str]) -> str:
    return f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""


def examine(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Examined:
    """Map a checkpoint's matrices by role, and certify its architecture.

    Args:
        trust_remote_code: execute the model's own Python code if transformers has no class for the model.

    Raises:
        ForgeError: the architecture cannot be mapped, or the checkpoint does not fit it.
    """
    model_map = map_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    learned = learn(checkpoint.config, checkpoint.folder, trust_remote_code=trust_remote_code)
    idle = tuple(gap.module for gap in learned.gaps if gap.about == "idle")
    certificate = certify_architecture(checkpoint.config, checkpoint.folder, trust_remote_code=trust_remote_code)
    return Examined(with_proofs(model_map, certificate), certificate, idle)


def with_proofs(model_map: ModelMap, certificate: Certificate) -> ModelMap:
    """The map with the reason at each matrix that is not proven on a block of the twin that stands for its layer."""

    def marked(matrix: Matrix) -> Matrix:
        kind = EditKind.WRITERS if matrix.writes else EditKind.READERS
        blocks = [None] if matrix.layer is None else model_map.alike[matrix.layer]
        found = (certificate.reason_against(kind, block) for block in blocks)
        return replace(matrix, unproven=next((reason for reason in found if reason is not None), ""))

    return replace(model_map, matrices=tuple(marked(matrix) for matrix in model_map.matrices))


def describe_certificate(examined: Examined) -> dict[str, Any]:
    """The certificate in provenance and reports.

    Returns:
        ``tier``; ``reasons``; ``writers_left`` and ``readers_left``, the largest share that an edit of all of them left
        on the twin (None: not measured); ``unproven_matrices``, the number of those that are not edited for it;
        ``unproven``, the reason of each of them, with one entry for all experts of a layer; and ``idle``, the modules
        that never run on text.
    """
    certificate, matrices = examined.certificate, examined.model_map.matrices
    left = {
        kind: max((leak.after for leak in leaks), default=None)
        for kind, leaks in ((EditKind.WRITERS, certificate.writers), (EditKind.READERS, certificate.readers))
    }
    return {
        "tier": examined.tier.value,
        "reasons": list(examined.reasons),
        **{f"{kind.value}_left": value for kind, value in left.items()},
        "unproven_matrices": sum(m.shape[0] if m.experts else 1 for m in matrices if m.unproven),
        "unproven": grouped(examined.model_map, examined.unproven, equal),
        "idle": list(examined.idle),
    }

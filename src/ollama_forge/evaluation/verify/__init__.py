"""Verify that the weights of a written checkpoint are the planned edit, and that all other weights are unchanged.

Every bound follows from the storage type, the dimensions of the model and the values that are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ollama_forge.architectures.model_map import Matrix, Role
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.plan import EditPlan
from ollama_forge.evaluation.verify.checks import Check, Worst
from ollama_forge.evaluation.verify.edited import adds_to_stream, compare_edit
from ollama_forge.evaluation.verify.probes import NoProbe, Norms, Probe, ReaderProbe, WriterProbe
from ollama_forge.evaluation.verify.running import observe
from ollama_forge.evaluation.verify.unedited import compare_unedited, same_bytes, stored_as
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.system import return_freed_memory

__all__ = ["Check", "verify"]


def verify(
    source: Checkpoint,
    written: Checkpoint,
    model: ChatModel,
    plan: EditPlan,
    direction: RefusalDirection | None,
    *,
    requantised: bool = False,
) -> list[Check]:
    """Check a written checkpoint against its source and the plan. Each tensor is read once, block by block.

    Args:
        model: the loaded written checkpoint.
        direction: the direction that the plan removes; None if it is unknown.
        requantised: whether all tensors of a GGUF file are quantised anew, so that unedited ones differ by rounding.
    """
    projects = plan.projects and direction is not None
    whole = {name: edit.matrix for name, edit in plan.edits.items() if projects and edit.strength == 1.0}
    writers = [matrix for matrix in whole.values() if adds_to_stream(matrix)]
    finite, inputs = observe(model, writers)
    norms = Norms(model, (source, written))

    def probe_of(matrix: Matrix) -> Probe:
        if direction is None or matrix.tensor not in whole:
            return NoProbe(matrix)
        vectors = direction.for_layer(matrix.layer or 0).double()
        if adds_to_stream(matrix):
            return WriterProbe(norms, matrix, vectors, inputs)
        return ReaderProbe(norms, matrix, vectors)

    edited, added, read = Worst(), Worst(), Worst()
    for before, after in _copies(source, written, plan):
        for edit in plan.edits.values():
            matrix = edit.matrix
            if before is not source and matrix.tensor not in before.tensors:
                continue
            fault = _fault(before, after, matrix)
            if fault is not None:
                edited.fail(fault)
                continue
            probe = probe_of(matrix)
            for expert in experts_of(matrix):
                products = compare_edit(before, after, edit, expert, probe.inputs(expert), edited)
                place = matrix.tensor if expert is None else f"{matrix.tensor}[{expert}]"
                probe.judge(products, place, added if adds_to_stream(matrix) else read)
            return_freed_memory()
    if (copy := _differing_copy(source, written, plan)) is not None:
        edited.fail(copy)
    checks = [finite, edited.check("edited matrices and biases are the planned edit, rounded once")]
    if writers:
        checks.append(added.check("writers add nothing along the direction"))
    if len(whole) > len(writers):
        checks.append(read.check("readers are blind to the direction"))
    return [*checks, compare_unedited(source, written, plan, requantised=requantised)]


def _copies(source: Checkpoint, written: Checkpoint, plan: EditPlan) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """The two checkpoints, and those of the further copies of edited tensors that a GGUF file may hold."""
    yield source, written
    if isinstance(source, GgufCheckpoint) and isinstance(written, GgufCheckpoint):
        before, after = source.further_copies(plan.changed_tensors), written.further_copies(plan.changed_tensors)
        while before is not None and after is not None:
            yield before, after
            before, after = before.further_copies(plan.changed_tensors), after.further_copies(plan.changed_tensors)


def _fault(source: Checkpoint, written: Checkpoint, matrix: Matrix) -> str | None:
    """Why the tensors of an edited matrix cannot be compared with the plan; None if they can."""
    for name in [matrix.tensor] if matrix.bias is None else [matrix.tensor, matrix.bias]:
        if name not in written.tensors.shapes:
            return f"{name} is missing"
        stored, found = stored_as(source.tensors, name), stored_as(written.tensors, name)
        may_differ = isinstance(source, GgufCheckpoint)  # ``compare_unedited`` checks the types of the file's tensors
        if found[1] != stored[1] or not (may_differ or found[0] in (stored[0], "BF16")):
            return f"{name} is stored as {found[0]} {found[1]}"
    return None


def _differing_copy(source: Checkpoint, written: Checkpoint, plan: EditPlan) -> str | None:
    """The fault of an edited unembedding that should equal the embedding, as it does in the source; None if it does.

    The two are tied, and a loader unties them if they differ in a single bit.
    """
    matrices = [edit.matrix for edit in plan.edits.values()]
    embeddings = [matrix.tensor for matrix in matrices if matrix.role is Role.EMBEDDING]
    heads = [matrix.tensor for matrix in matrices if matrix.role is Role.UNEMBEDDING]
    for embedding, head in itertools.product(embeddings, heads):
        if not {head, embedding} <= written.tensors.keys() & source.tensors.keys():
            continue
        if same_bytes(source.tensors, embedding, head) and not same_bytes(written.tensors, embedding, head):
            return f"{head} is not {embedding} any more"
    return None

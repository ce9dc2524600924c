"""An edit that is added to the base model while it runs, at a strength of its own for each row of a batch.

The model holds the base's weights. Forward hooks add ``strength * (B @ (A @ x))`` to the output of each edited module:
strength 0 is the base, 1 the edited model, below 0 the opposite of the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.edits.copies import Part
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import RemoveFromInput, RemoveFromOutput, Rescale
from ollama_forge.edits.hooks import expert_stacks, is_one_projection
from ollama_forge.edits.plan import BiasEdit, MatrixEdit
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.changes import (
    LowRankChange,
    ModuleChange,
    is_linear,
    low_rank_changes,
    module_changes,
)
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.matrices import bias_of, weight_of

_STEPS = 1000  # strengths between 0 and 1
_TOLERANCE = 1e-3  # relative; factors are float32 and were computed from weights that round to the same values
_PROBE = 6  # positions of the prompts with which the order of rows is checked
_SAME_INPUT = 0.1  # relative difference that batching may make; another row's input differs by about 1.4


class LiveEdit:
    """The factors of an edit, added to a loaded base model.

    Outside of ``at``, the model is the base.
    """

    def __init__(self, model: ChatModel, record: EditRecord) -> None:
        """Add the hooks.

        Raises:
            ForgeError: the edit has a norm rule, or another form that cannot be added row by row; or it is of another
                model.
        """
        self._strengths: Tensor | float = 0.0
        self.device = model.device
        self._ids = int(model.module.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        changes = low_rank_changes(record, model.model_map, biases=True)
        linear = [change for change in changes if is_linear(change.matrix)]
        stacked = [change for change in changes if not is_linear(change.matrix)]
        modules = module_changes(linear, model.model_map)
        for path, change in modules.items():
            module = model.module.get_submodule(path)
            device = model.device_of(module)
            hook = (
                _embedding_hook(self, module, change, device) if change.embedding else _LinearHook(self, change, device)
            )
            module.register_forward_hook(hook)
        hooked = {path for path, change in modules.items() if not change.embedding}
        _check_rows(model, hooked | _add_expert_hooks(self, model, record, stacked))

    @contextmanager
    def at(self, strengths: Sequence[float] | Tensor) -> Iterator[None]:
        """Inside the block, row ``i`` of a batch is computed at ``strengths[i]``."""
        if isinstance(strengths, Tensor):
            self._strengths = strengths
        else:
            same = all(strength == strengths[0] for strength in strengths)
            self._strengths = strengths[0] if same else torch.tensor(strengths, device=self.device)
        try:
            yield
        finally:
            self._strengths = 0.0

    def offset(self, strength: float) -> int:
        """What is added to a token's id to make it a row id, which also says the strength, in thousandths.

        Rows with equal row ids have equal keys and values, so that whatever compares ids, as prefix caches do, keeps
        strengths apart. The row id of a token at strength 1 is its id.
        """
        return round((strength - 1.0) * _STEPS) * self._ids

    @contextmanager
    def at_row_ids(self, ids: Tensor) -> Iterator[Tensor]:
        """Inside the block each row of a batch is computed at the strength that its last row id says.

        Args:
            ids: row ids ``[rows, positions]``.

        Yields:
            The ids of the tokens.
        """
        steps = ids[:, -1].div(self._ids, rounding_mode="floor")
        known = ids.device.type != "cuda"  # on CUDA, the host would have to wait for the ids
        with self.at([1.0 + step / _STEPS for step in steps.tolist()] if known else 1.0 + steps / _STEPS):
            yield ids.remainder(self._ids)

    @property
    def off(self) -> bool:
        """Whether all rows of the running batch have strength 0, so that nothing is added."""
        return isinstance(self._strengths, float) and self._strengths == 0.0

    def scaled(self, values: Tensor) -> Tensor:
        """Float32 values ``[rows, ..., n]`` or ``[rows * positions, n]``, each times the strength of its row."""
        if isinstance(self._strengths, float):
            return values if self._strengths == 1.0 else values * self._strengths
        by_row = values.reshape(len(self._strengths), -1, values.shape[-1])
        return (by_row * self._strengths.to(values.device).view(-1, 1, 1)).view(values.shape)


Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


class _LinearHook:
    """Adds the change of a module that computes ``W x + b``."""

    def __init__(self, live: LiveEdit, change: ModuleChange, device: torch.device) -> None:
        self.live = live
        self.left, self.right = change.left.T.contiguous().to(device), change.right.to(device)
        self.bias = None if change.bias is None else change.bias.to(device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.live.off:
            return None
        change = self.live.scaled(args[0].float() @ self.right) @ self.left
        if self.bias is not None:
            change = change + self.live.scaled(self.bias.expand_as(change))
        return (output + change).to(output.dtype)


@torch.inference_mode()
def _embedding_hook(live: LiveEdit, module: nn.Module, change: ModuleChange, device: torch.device) -> Hook:
    """A hook that adds the change of looked-up rows, times the constant that the module multiplies its rows by."""
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    row = module.weight[0].float()  # type: ignore[index]
    scale = float(module(first).float().flatten() @ row / (row @ row))
    left, right = change.left.to(device), (change.right.T * scale).contiguous().to(device)

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if live.off:
            return None
        return (output + live.scaled(left[args[0]]) @ right).to(output.dtype)

    return add


# -- stacks of experts ------------------------------------------------------------------------------------------------


def _add_expert_hooks(
    live: LiveEdit, model: ChatModel, record: EditRecord, changes: Sequence[LowRankChange]
) -> set[str]:
    """Add the hooks of stacks of experts, and return the paths of their modules.

    The rows of a batch are lost inside such a module, but the same projection of all its experts' outputs (or inputs)
    is one of its own output (or input).
    """
    stacks = expert_stacks(model.model_map)
    sides: dict[tuple[str, bool], list[Part]] = {}
    for change in changes:
        edit = _projection(model, record, change)
        for place in change.matrix.places:
            sides.setdefault((place.module, change.matrix.writes), []).append(Part(edit, place))
    for (path, writes), side in sides.items():
        if not is_one_projection(model, side, stacks.get(path, [])):
            raise _not_by_row(side[0].edit.matrix.tensor)
        rule = side[0].edit.rule
        assert isinstance(rule, RemoveFromOutput | RemoveFromInput)
        module = model.module.get_submodule(path)
        project = _projector(live, rule.basis.to(model.device_of(module)), side[0].edit.strength)
        if writes:
            module.register_forward_hook(lambda _, args, output, project=project: project(output))
        else:
            module.register_forward_pre_hook(lambda _, args, project=project: (project(args[0]), *args[1:]))
    return {path for path, _ in sides}


def _projector(live: LiveEdit, basis: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    def project(values: Tensor) -> Tensor:
        if live.off:
            return values
        change = live.scaled(values.float() @ basis) @ basis.T
        return (values - strength * change).to(values.dtype)

    return project


def _projection(model: ChatModel, record: EditRecord, change: LowRankChange) -> MatrixEdit:
    """The edit of a matrix or a stack as a projection of its output or input.

    Raises:
        ForgeError: it is none: the factors of the experts are not those of one direction.
    """
    matrix, entry = change.matrix, record.matrices[change.matrix.tensor]
    shared = entry.L if matrix.writes else entry.K
    basis = shared[0] if matrix.experts else shared
    rule = RemoveFromOutput(basis) if matrix.writes else RemoveFromInput(basis)
    shift = None if change.bias is None else BiasEdit(basis, None)
    for expert in experts_of(matrix):
        index = slice(None) if expert is None else expert
        expected = rule.factors(weight_of(model, matrix, expert).cpu(), expert)
        alike = _close(entry.L[index], expected.L) and _close(entry.K[index], expected.K)
        if alike and shift is not None and change.bias is not None:
            bias = bias_of(model, matrix, expert).cpu()
            alike = matrix.writes and _close(change.bias[index], shift.shift(bias, None, entry.strength))
        if not alike:
            raise _not_by_row(matrix.tensor)
    return MatrixEdit(matrix, rule, entry.strength, Rescale.NONE, shift)


def _close(values: Tensor, expected: Tensor) -> bool:
    return bool((values - expected).norm() <= _TOLERANCE * expected.norm())


def _not_by_row(tensor: str) -> ForgeError:
    return ForgeError(
        f"{tensor} cannot be edited at a strength for each request: its experts, of which each request uses others, "
        "do not share one projection",
        "serve the edited model without --live, or make an orthogonal edit without a norm rule",
    )


# -- rows -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _check_rows(model: ChatModel, paths: Collection[str]) -> None:
    """Check that the inputs of the edited modules have one row of the batch after the other.

    Raises:
        ForgeError: those of a module do not.
    """
    prompts = torch.arange(2 * _PROBE, device=model.device).view(2, -1) % model.model_map.vocabulary
    together = _inputs(model, paths, prompts)
    for row, prompt in enumerate(prompts):
        for path, alone in _inputs(model, paths, prompt.unsqueeze(0)).items():
            among = together[path]
            if among.numel() != 2 * alone.numel() or not _same(among.reshape(2, -1)[row], alone.reshape(-1)):
                raise ForgeError(
                    f"{path} cannot be edited at a strength for each request: it mixes the requests of a batch",
                    "serve the edited model without --live",
                )


def _same(values: Tensor, others: Tensor) -> bool:
    return bool((values - others).norm() <= _SAME_INPUT * others.norm())


def _inputs(model: ChatModel, paths: Collection[str], prompts: Tensor) -> dict[str, Tensor]:
    """The inputs of modules for prompts of one length ``[rows, positions]``."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:
            module = model.module.get_submodule(path)

            def keep(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                found[path] = args[0].float()

            stack.callback(module.register_forward_pre_hook(keep).remove)
        model.forward(input_ids=prompts, use_cache=False, keep=None)
    return found

"""See the inputs of matrices in a running model at chosen positions, routed experts among them.

The input of a linear module is its argument. Any other matrix is a view of a parameter in some matrix product, and the
other operand is its input; which code computes the product does not matter.

The rows that a router sends to an expert come without their positions. A row that the expert's reader takes in equals
the row of its token in an argument of the module, bit for bit; the rows of the writer come in the same order.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.cpu_packing import unpacked
from ollama_forge.models.matrices import parameter_of
from ollama_forge.models.stages import is_loaded

Link = tuple[int | None, int | None]  # layer and expert
Writer = tuple[str, int | None]  # tensor name, and index of the expert if the tensor is a stack
Rows = tuple[Tensor, Tensor]  # inputs [n, in], and which of the chosen positions they are of [n]
_ATEN = torch.ops.aten
_COMPOSITE = (_ATEN.linear.default, _ATEN.matmul.default, _ATEN.einsum.default)
_OPERANDS = {  # product -> places of its two operands among the arguments
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> integer type of the same size


class MatrixInputs:
    """Inside ``recording`` it keeps the inputs of writers at chosen positions of one batch.

    An expert that saw none of the positions has no inputs.

    Args:
        writers: matrices of decoder layers.
        positions: indices ``[samples]`` into the ``tokens`` flattened tokens of the batch.
    """

    def __init__(self, model: ChatModel, writers: Sequence[Matrix], positions: Tensor, tokens: int) -> None:
        self._seen: dict[Writer, list[Rows]] = {}
        self._model, self._positions, self._tokens = model, positions, tokens
        self._matrices = [*writers, *_readers_of_experts(model, writers)]
        self._entering: dict[Link, list[_HashedRows]] = {}  # of each layer, the arguments that hold a row of each token
        self._matched: dict[Link, _Match] = {}

    @contextmanager
    def recording(self) -> Iterator[MatrixInputs]:
        """Record until the block ends.

        Raises:
            ForgeError: the rows of a writer match no tokens.
        """
        with ExitStack() as stack:
            for module, layer in _holders_of_experts(self._model, self._matrices).items():
                hook = self._model.scoped(self._entering_hook(layer))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(watched(self._model, self._matrices, self._take))
            yield self

    def clear(self) -> None:
        """Forget the inputs seen so far."""
        self._seen.clear()
        self._matched.clear()

    def __iter__(self) -> Iterator[tuple[Writer, Tensor, Tensor]]:
        """Each writer with inputs ``[n, in]`` and the indices ``[n]`` of their positions among the chosen ones."""
        return ((writer, *rows) for writer, seen in self._seen.items() for rows in seen)

    def _entering_hook(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._model.layer(layer):
                self._entering.clear()
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                    rows = value.detach().to(self._model.device_of(module)).flatten(0, -2)
                    if len(rows) == self._tokens:
                        self._entering.setdefault((layer, None), []).append(_HashedRows(rows))

        return keep

    def _take(self, matrix: Matrix, expert: int | None, rows: Tensor) -> None:
        """Keep the chosen positions of the rows that a matrix takes in."""
        link = (matrix.layer, next((e for e in (expert, matrix.place.expert) if e is not None), matrix.expert))
        if not matrix.writes:
            self._match(link, rows)
            return
        match = self._matched.get(link)
        if matrix.is_expert and match is not None and match.rows == len(rows):
            chosen = (match.places >= 0).nonzero().flatten()
            taken = rows[match.places[chosen]].float()
        elif len(rows) == self._tokens:
            chosen = torch.arange(len(self._positions), device=rows.device)
            taken = rows[self._positions.to(rows.device)].float()
        else:
            raise unseen(matrix)
        if matrix.is_expert:  # a batched product holds a row of zeros for each token that is not routed to the expert
            routed = taken.any(-1)
            taken, chosen = taken[routed], chosen[routed]
        if len(taken):
            self._seen.setdefault((matrix.tensor, expert), []).append((taken, chosen))

    def _match(self, link: Link, rows: Tensor) -> None:
        """Find the chosen positions among the rows that an expert's reader takes in."""
        self._matched.pop(link, None)
        routed = _HashedRows(rows)
        for entering in reversed(self._entering.get((link[0], None), [])):
            same_form = entering.rows.shape[-1] == rows.shape[-1] and entering.rows.dtype == rows.dtype
            if same_form and torch.isin(routed.hashes, entering.hashes).all():
                order = routed.hashes.argsort()
                wanted = entering.hashes[self._positions.to(rows.device)]
                nearest = torch.searchsorted(routed.hashes[order], wanted).clamp_max(len(rows) - 1)
                places = order[nearest]
                found = routed.hashes[places] == wanted
                self._matched[link] = _Match(len(rows), torch.where(found, places, -1))
                return


@contextmanager
def watched(
    model: ChatModel, matrices: Sequence[Matrix], take: Callable[[Matrix, int | None, Tensor], None]
) -> Iterator[None]:
    """Inside, whatever a matrix takes in is handed on, whenever it does.

    Args:
        take: gets the matrix, the index of the expert if it is a stack, and at least one row ``[n, in]``.
    """
    products: dict[nn.Parameter, dict[int | None, list[tuple[Matrix, int | None]]]] = {}

    def product(parameter: nn.Parameter, index: int | None, rows: Tensor) -> None:
        for matrix, expert in products[parameter].get(index, []) if len(rows) else ():
            take(matrix, expert, rows)

    def input_hook(matrix: Matrix) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel():
                take(matrix, None, args[0].detach().flatten(0, -2))

        return hook

    with ExitStack() as stack:
        for matrix in matrices:
            place = matrix.place
            module = model.submodule(place)
            if place.linear and place.expert is None and not matrix.experts:
                stack.callback(module.register_forward_pre_hook(model.scoped(input_hook(matrix))).remove)
                continue
            stack.enter_context(unpacked(module))
            known = products.setdefault(parameter_of(model, place), {})
            for expert in experts_of(matrix):
                known.setdefault(place.expert if expert is None else expert, []).append((matrix, expert))
        if products:
            stack.enter_context(eager_experts(model.module))
            stack.enter_context(_Products(model, list(products), product))
        yield


@dataclass(frozen=True)
class _Match:
    """Number of rows that a reader took in, and the row of each chosen position ``[samples]`` (-1 for none)."""

    rows: int
    places: Tensor


class _HashedRows:
    """Rows ``[n, width]``, with a 64-bit hash of the bytes of each one that is exact on every device."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @cached_property
    def hashes(self) -> Tensor:
        integers = self.rows.contiguous().view(_INTEGERS[self.rows.element_size()])
        limits, generator = torch.iinfo(torch.int64), torch.Generator().manual_seed(0)
        factors = torch.randint(limits.min, limits.max, (self.rows.shape[-1],), generator=generator)
        return (integers.to(torch.int64) * factors.to(self.rows.device)).sum(-1)


def unseen(matrix: Matrix) -> ForgeError:
    """The error for a writer whose inputs cannot be seen."""
    return ForgeError(
        f"least squares cannot see which tokens the inputs of {matrix.tensor} belong to", "use --factors orthogonal"
    )


def _readers_of_experts(model: ChatModel, writers: Iterable[Matrix]) -> list[Matrix]:
    layers = {writer.layer for writer in writers if writer.is_expert}
    return [m for m in model.model_map.matrices if m.layer in layers and not m.writes and m.is_expert]


def _holders_of_experts(model: ChatModel, matrices: Iterable[Matrix]) -> dict[nn.Module, int]:
    """The modules of experts and the modules above them, up to the layer, with the number of the layer."""
    holders: dict[nn.Module, int] = {}
    for matrix in matrices:
        if matrix.is_expert and matrix.layer is not None:
            layer = model.model_map.layers[matrix.layer]
            names = matrix.place.module.removeprefix(layer).strip(".").split(".")
            for length in range(len(names) + 1):
                holders[model.layer(matrix.layer).get_submodule(".".join(names[:length]))] = matrix.layer
    return holders


@contextmanager
def eager_experts(module: nn.Module) -> Iterator[None]:
    """Let a transformers model multiply each expert's matrix with its tokens, instead of gathered copies of it."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        yield
        return
    current = module.get_experts_implementation()
    module.set_experts_implementation("eager")
    try:
        yield
    finally:
        module.set_experts_implementation(current)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``take(parameter, index, rows)`` for every matrix product with a parameter or one matrix of a stack.

    Args:
        take: gets the index of the matrix in the stack (None for a parameter that is one matrix) and the rows
            ``[n, in]`` of the other operand.
    """

    def __init__(
        self,
        model: ChatModel,
        parameters: Sequence[nn.Parameter],
        take: Callable[[nn.Parameter, int | None, Tensor], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._all, self._take = model, parameters, take
        self._find_addresses()

    def _find_addresses(self) -> None:
        """Note where the parameters are in memory; those that are not, are left out."""
        self._loads = self._model.loads
        self._parameters = sorted(filter(is_loaded, self._all), key=lambda parameter: parameter.data_ptr())
        self._starts = [parameter.data_ptr() for parameter in self._parameters]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _COMPOSITE:  # in inference mode they arrive whole
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func in _OPERANDS:
            if self._loads != self._model.loads:
                self._find_addresses()
            left, right = (args[place] for place in _OPERANDS[func])
            self._note(right, left)
            self._note(left.mT, right.mT)
        return func(*args, **(kwargs or {}))

    def _note(self, weight: Tensor, inputs: Tensor) -> None:
        """Hand on ``inputs`` ``[..., n, in]`` if ``weight`` ``[..., in, out]`` is part of a parameter."""
        place = bisect.bisect_right(self._starts, weight.data_ptr()) - 1
        if place < 0:
            return
        parameter = self._parameters[place]
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if offset >= parameter.numel() or weight.dtype != parameter.dtype:
            return
        if parameter.ndim == 2:
            self._take(parameter, None, inputs.flatten(0, -2))
            return
        size = parameter.stride(0)
        batch = weight.unsqueeze(0) if weight.ndim == 2 else weight
        if offset % size or batch[0].numel() != size or (len(batch) > 1 and batch.stride(0) != size):
            return
        for number, rows in enumerate(inputs.unsqueeze(0) if inputs.ndim == 2 else inputs):
            self._take(parameter, offset // size + number, rows)

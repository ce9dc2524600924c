"""One stretch of the residual stream, run again and again with the outputs of its matrices held.

A region is what runs from one point of the stream to the next: from the token ids to the first block, or one call of
one block. Each module that owns a matrix is held: on every replay it gives the output that was recorded first. So a
nudge of one output, or of the stream, reaches the end of the region only on paths without a matrix.

A module that also hands the stream on beside its matrix (it mixes several copies of it, say) is not held itself: the
products of its matrix are. So are those of a matrix that is used without a call of its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import (
    Call,
    argument,
    copied,
    first_float,
    first_tensor,
    joined,
    parallel,
    rows,
    tensors_in,
    with_argument,
    with_first_tensor,
)
from ollama_forge.architectures.roles.products import CatchProducts


@dataclass(frozen=True, eq=False)
class Held:
    """What a region holds: a module that owns a matrix, or only the products of a matrix of it.

    Attributes:
        module: the module.
        parameters: the module's own, or the one matrix.
        product: whether it is the products of the matrix, of which the activation is argument 0.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    product: bool = False


Change = Callable[[Tensor], Tensor]


@dataclass
class Replay:
    """What one replay of a region shows.

    Attributes:
        stream: the stream at the end of the region ``[..., d]``.
        calls: the calls of what was watched, with the output that each gave before it was held.
        passed: for each module without a matrix, what it took in and gave out, call by call.
    """

    stream: Tensor
    calls: dict[Held, list[Call]] = field(default_factory=dict)
    passed: dict[nn.Module, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class Region:
    """A region of a twin. ``replay`` runs it with all its matrices held.

    Attributes:
        run: runs the region, with a vector ``[d]`` that is added to the stream at its start (None: nothing), and
            returns the stream at its end ``[..., d]``.
        modules: every module that may run in the region.
        module: path of the block; "" for the region before the first block.
        block: number of the block; None before the first.
        held: what is held, and its recorded calls.
        passed: modules without a matrix that map a tensor to one of its shape, what they took in and gave out.
        stream: the recorded stream at the end of the region.
    """

    def __init__(
        self,
        run: Callable[[Tensor | None], Tensor],
        modules: Iterable[nn.Module],
        *,
        module: str = "",
        block: int | None = None,
    ) -> None:
        self.run, self.modules = run, tuple(dict.fromkeys(modules))
        self.module, self.block = module, block
        self.plain: tuple[nn.Module, ...] = tuple(
            m for m in self.modules if not any(p.dim() > 1 for p in m.parameters())
        )
        owners = [m for m in self.modules if owns_matrix(m)]
        innermost = [m for m in owners if not any(inner is not m and owns_matrix(inner) for inner in m.modules())]
        self._record([Held(m, tuple(m.parameters(recurse=False))) for m in innermost])
        modules_held = [held for held in self.held if not self._hands_on(held)]
        called = {held.module for held in modules_held}
        matrices = {p: m for m in owners if m not in called for p in m.parameters(recurse=False) if is_matrix(p)}
        if matrices:
            self._record([*modules_held, *(Held(m, (p,), product=True) for p, m in matrices.items())])
        self.plain = tuple(self.passed)

    def _record(self, candidates: Iterable[Held]) -> None:
        self.held: dict[Held, list[Call]] = {}
        self._weights = {p.untyped_storage().data_ptr() for m in self.modules for p in m.parameters(recurse=False)}
        self._given_weights: set[Held] = set()  # called with weights as arguments: recorded, they could not be nudged
        first = self.replay(watch=candidates)
        self.held, self.passed, self.stream = first.calls, first.passed, first.stream

    def note_arguments(self, held: Held, arguments: Iterable[Any]) -> None:
        """Note whether weights are among the arguments of a call."""
        tensors = (value for value in arguments if isinstance(value, Tensor))
        if any(tensor.untyped_storage().data_ptr() in self._weights for tensor in tensors):
            self._given_weights.add(held)

    def _hands_on(self, held: Held) -> bool:
        """Whether a module hands an argument on beside its matrices: alone, with their products held, a nudge of the
        argument comes out as it is.
        """
        call, d = self.held[held][0], self.stream.shape[-1]
        nudge = torch.randn(d, generator=torch.Generator().manual_seed(1))
        results: list[Tensor] = []

        def give(key: int | str | None, catch: Callable[[nn.Parameter, Tensor, Change], Any]) -> list[Tensor]:
            args, kwargs = copied(call.args), copied(dict(call.kwargs))
            if key is not None:
                moved = call.inputs[key] + nudge.repeat(call.inputs[key].shape[-1] // d)
                args, kwargs = with_argument(args, kwargs, key, moved)
            with torch.inference_mode(), CatchProducts({id(p): p for p in held.parameters if is_matrix(p)}, catch):
                return [t for t in tensors_in(held.module.forward(*args, **kwargs)) if t.is_floating_point()]

        def record(parameter: nn.Parameter, x: Tensor, product: Change) -> Tensor:
            results.append(product(x))
            return results[-1].clone()

        try:
            before = give(None, record)
            for key in [key for key, x in list(call.inputs.items())[:1] if x.shape[-1] % d == 0]:
                replies = iter([result.clone() for result in results])
                after = give(key, lambda parameter, x, product, replies=replies: next(replies))  # type: ignore[misc]
                pairs = [
                    (b, a - b) for b, a in zip(before, after, strict=True) if a.shape == b.shape and a.shape[-1] == d
                ]
                if any(float(c.abs().max()) > 1e-4 and parallel(c, nudge) is not None for _, c in pairs):
                    return True
        except Exception:  # it does not run alone, or not with these products: it is held as a whole
            return False
        return False

    def replay(
        self,
        *,
        changes: Mapping[Held, Change] | None = None,
        stream_nudge: Tensor | None = None,
        watch: Iterable[Held] = (),
        feed: tuple[Held, int | str, Change] | None = None,
    ) -> Replay:
        """Run the region once more.

        Args:
            changes: for what is held, a function of the first tensor of its recorded outputs, to be given instead.
            stream_nudge: a vector ``[d]`` that is added to the stream at the start of the region.
            watch: whose calls are recorded.
            feed: what is held, one of its arguments (position or keyword), and a function of it to be taken instead.
        """
        return _Run(self, changes or {}, tuple(watch), feed).go(stream_nudge)

    def outputs(self, held: Held, feed: tuple[int | str, Change] | None = None) -> Tensor:
        """What a held module itself gives ``[rows of all calls, width]``, float64: on its recorded inputs, or with a
        function of one of them (position or keyword) for it.
        """
        if held.product or held in self._given_weights:
            return joined(self.replay(watch=[held], feed=None if feed is None else (held, *feed)).calls[held])
        key, function = feed or (None, None)
        given = []
        for call in self.held[held]:
            args, kwargs = copied(call.args), copied(dict(call.kwargs))
            if key is not None and function is not None:
                args, kwargs = with_argument(args, kwargs, key, function(argument(args, kwargs, key)))
            with torch.inference_mode():
                given.append(first_float(held.module(*args, **kwargs)))
        return torch.cat([rows(result) for result in given if result is not None])


class _Run:
    """One replay."""

    def __init__(
        self,
        region: Region,
        changes: Mapping[Held, Change],
        watch: tuple[Held, ...],
        feed: tuple[Held, int | str, Change] | None,
    ) -> None:
        self.region, self.changes, self.feed = region, changes, feed
        self.watched, self.count = set(watch), dict.fromkeys(region.held, 0)
        self.seen = Replay(torch.empty(0))
        sites = dict.fromkeys([*region.held, *watch])
        self.modules = {held.module: held for held in sites if not held.product}
        self.products = {held.parameters[0]: held for held in sites if held.product}

    def go(self, stream_nudge: Tensor | None) -> Replay:
        with ExitStack() as stack, torch.inference_mode():
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
            for module in self.region.plain:
                stack.callback(module.register_forward_hook(self._pass, with_kwargs=True).remove)
            if self.products:
                stack.enter_context(CatchProducts({id(p): p for p in self.products}, self._product))
            self.seen.stream = self.region.run(stream_nudge).clone()
        return self.seen

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.region.note_arguments(self.modules[module], (*args, *kwargs.values()))
        if self.feed is None or self.feed[0] is not self.modules[module]:
            return None
        _, key, function = self.feed
        return with_argument(args, kwargs, key, function(argument(args, kwargs, key)))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self._given(self.modules[module], args, kwargs, output)

    def _product(self, parameter: nn.Parameter, activation: Tensor, product: Change) -> Any:
        held = self.products[parameter]
        if self.feed is not None and self.feed[0] is held:
            activation = self.feed[2](activation)
        return self._given(held, (activation,), {}, product(activation))

    def _given(self, held: Held, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What is given instead of an output: what was recorded for this call, with the change that is asked for."""
        if held in self.watched:
            self.seen.calls.setdefault(held, []).append(Call(copied(args), copied(kwargs), copied(output)))
        if held not in self.region.held:
            return output
        given, number = copied(output), self.count[held]
        if number < len(self.region.held[held]):
            recorded = self.region.held[held][number].output
            was, now = first_tensor(recorded), first_tensor(output)
            if was is not None and now is not None and was.shape == now.shape:  # a nudged router may send other tokens
                given = copied(recorded)
        self.count[held] += 1
        first = first_float(given)
        return (
            with_first_tensor(given, self.changes[held](first)) if held in self.changes and first is not None else given
        )

    def _pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken, given = first_float([*args, *kwargs.values()]), first_float(output)
        if taken is not None and given is not None and taken.shape == given.shape:
            self.seen.passed.setdefault(module, []).append((taken.clone(), given.clone()))


@contextmanager
def nudged(parameter: nn.Parameter, change: Tensor) -> Iterator[None]:
    """Add ``change`` to a parameter, and restore it bit for bit."""
    saved = parameter.detach().clone()
    with torch.no_grad():
        try:
            parameter.add_(change)
            yield
        finally:
            parameter.copy_(saved)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter has two axes or more; a gain for each channel and token of a convolution is no matrix."""
    return sum(size > 1 for size in parameter.shape) >= 2 and not (parameter.dim() == 3 and parameter.shape[1] == 1)


def owns_matrix(module: nn.Module) -> bool:
    """Whether a parameter of the module itself (not of a module inside it) is a matrix."""
    return isinstance(module, nn.Linear) or any(is_matrix(p) for p in module.parameters(recurse=False))

"""Runs of single blocks of a twin in which all its writers are silent but one.

A writer is silenced by setting its parameter to zero, so nothing is hooked and nothing is called in its place: what a
block then adds to the stream is the output of the one writer that speaks, and what reaches it passes no other writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import copied, first_tensor
from ollama_forge.architectures.learned import RoleFound
from ollama_forge.architectures.twin.build import Twin

TOKENS = 13  # a size that hardly any other axis of an activation has: it finds the axis of the tokens


@dataclass(frozen=True)
class BlockCall:
    """The first call of a block in a run of the model: its arguments and the stream that it gave ``[tokens, n]``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Tensor


class Solo:
    """A twin whose block writers are silent. Use as a context manager: leaving it restores every parameter.

    Norms inside the blocks and behind the writers are switched off, so that a writer's output reaches the stream
    linearly; the norms in front of the readers stay.

    Attributes:
        ids: ``[1, tokens]`` token ids, each one once.
        changed_ids: the same with another token at ``changed``.
        calls: the first call of each block on ``ids``; ``changed_calls``: on ``changed_ids``.
    """

    def __init__(self, twin: Twin, found: Sequence[RoleFound], blocks: Sequence[str]) -> None:
        self.model, self.found, self.blocks = twin.model, found, blocks
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self._inputs, self.ids = _short_inputs(twin)
        self.tokens = self.ids.shape[1]
        self.changed = self.tokens // 2
        self.changed_ids = self.ids.clone()
        self.changed_ids[0, self.changed] = _unused_id(self.ids)
        self._undo = ExitStack()
        self._values: dict[str, Tensor] = {}

    def __enter__(self) -> Solo:
        for writer in self.found:
            for name in (writer.parameter, writer.bias):
                if writer.writes and writer.block is not None and name:
                    self._values[name] = self.parameters[name].detach().clone()
        with ExitStack() as undo, torch.no_grad():
            undo.callback(self._restore)
            for name in self._values:
                self.parameters[name].zero_()
            for norm in self._inner_norms():
                undo.enter_context(_switched_off(norm))
            self.calls = self.run(self.ids)
            self.changed_calls = self.run(self.changed_ids)
            self._replayable = [
                self._same(self._replay(block, call), call.stream) for block, call in enumerate(self.calls)
            ]
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _restore(self) -> None:
        with torch.no_grad():
            for name, value in self._values.items():
                self.parameters[name].copy_(value)

    @contextmanager
    def speaking(self, writer: RoleFound) -> Iterator[None]:
        """Let one writer speak, without its bias."""
        parameter = self.parameters[writer.parameter]
        with torch.no_grad():
            parameter.copy_(self._values[writer.parameter])
            try:
                yield
            finally:
                parameter.zero_()

    def run(self, ids: Tensor) -> list[BlockCall]:
        """Run the model on ``[1, tokens]`` token ids, and record the first call of each block."""
        calls: dict[str, BlockCall] = {}
        before: dict[str, tuple[Any, Any]] = {}
        with ExitStack() as hooks, torch.no_grad():
            for path in self.blocks:

                def enter(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                    before.setdefault(path, (copied(args), copied(kwargs)))

                def leave(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                    if path not in calls:
                        calls[path] = BlockCall(*before[path], self.by_token(first_tensor(output)))

                block = self._modules[path]
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
            self.model(**{**copied(self._inputs), "input_ids": ids.clone()})
        return [calls[path] for path in self.blocks]

    @property
    def head(self) -> Tensor | None:
        """The parameter of the unembedding."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        weight = getattr(head, "weight", None)
        return weight if isinstance(weight, Tensor) else None

    def arguments(self) -> list[Tensor]:
        """The float tensors that the blocks are called with."""
        given = (value for call in self.run(self.ids) for value in (*call.args, *call.kwargs.values()))
        return [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]

    def first_stream(self, ids: Tensor) -> Tensor:
        """The stream that the first block is given ``[tokens, n]``, float64."""
        call = self.run(ids)[0]
        given = (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))
        return self.by_token(next(value for value in given if value.is_floating_point()))

    def contribution(self, block: int, *, changed: bool = False) -> Tensor:
        """What the writer that speaks adds to the stream in a block ``[tokens, n]``, float64."""
        silent = (self.changed_calls if changed else self.calls)[block].stream
        return self.stream(block, changed=changed) - silent

    def output(self, block: int, module: str, *, changed: bool = False) -> Tensor | None:
        """What a module gives in its first call in a block ``[tokens, n]``; None if it gives no vector a token."""
        given: list[Tensor | None] = []
        hook = self._modules[module].register_forward_hook(lambda _, args, output: given.append(first_tensor(output)))
        try:
            self.stream(block, changed=changed)
        finally:
            hook.remove()
        tensor = given[0] if given else None
        return None if tensor is None or self.tokens not in tensor.shape[:-1] else self.by_token(tensor)

    def stream(self, block: int, *, changed: bool = False) -> Tensor:
        """What a block gives ``[tokens, n]``, float64."""
        if self._replayable[block]:
            return self._replay(block, (self.changed_calls if changed else self.calls)[block])
        return self.run(self.changed_ids if changed else self.ids)[block].stream

    def _replay(self, block: int, call: BlockCall) -> Tensor:
        module = self._modules[self.blocks[block]]
        with torch.no_grad():
            return self.by_token(first_tensor(module(*copied(call.args), **copied(call.kwargs))))

    @staticmethod
    def _same(got: Tensor, wanted: Tensor) -> bool:
        return got.shape == wanted.shape and bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())

    def by_token(self, tensor: Tensor | None) -> Tensor:
        """An activation as ``[tokens, n]``, float64; without what the class puts in front of the text."""
        assert tensor is not None
        sizes = tensor.shape[:-1]
        axis = sizes.index(self.tokens) if self.tokens in sizes else max(range(len(sizes)), key=sizes.__getitem__)
        text = tensor.detach().narrow(axis, tensor.shape[axis] - self.tokens, self.tokens)
        return text.movedim(axis, 0).reshape(self.tokens, -1).double()

    def reader_inputs(self, block: int, readers: Sequence[RoleFound]) -> dict[str, Tensor]:
        """The input ``[tokens, in]`` of each reader, float64, by its parameter; those without one are left out.

        It is what the reader's norm gives, else an argument of the module that owns the parameter, else one of the
        nearest module around it: some modules read the weights of others without calling them.
        """
        wanted: dict[str, list[tuple[str, bool]]] = {}
        for reader in readers:
            around = reader.module.split(".")
            outer = [".".join(around[:n]) for n in range(len(around) - 1, 0, -1)]
            inside = [path for path in outer if len(path) > len(self.blocks[block])]
            norms = [norm.module for norm in reader.norms if norm.module]
            wanted[reader.parameter] = [
                *((path, True) for path in norms),
                (reader.module, False),
                *((path, False) for path in inside),
            ]
        seen: dict[tuple[str, bool], list[Tensor]] = {}
        paths = {path for places in wanted.values() for path, _ in places}
        with ExitStack() as hooks:
            for path in paths:

                def watch(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                    if (path, True) not in seen:
                        given = first_tensor(output)
                        seen[path, True] = [given.clone()] if given is not None else []
                        seen[path, False] = [t.clone() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]

                hooks.callback(self._modules[path].register_forward_hook(watch, with_kwargs=True).remove)
            self.stream(block)
        inputs: dict[str, Tensor] = {}
        for reader in readers:
            width = self.parameters[reader.parameter].shape[reader.axis]
            tensors = (t for place in wanted[reader.parameter] for t in seen.get(place, []))
            rows = (self._rows(tensor, width) for tensor in tensors if tensor.is_floating_point())
            found = next((x for x in rows if x is not None), None)
            if found is not None:
                inputs[reader.parameter] = found
        return inputs

    def _rows(self, tensor: Tensor, width: int) -> Tensor | None:
        """``[tokens, width]``, or None; of several copies of the tokens (one an expert), each token's longest."""
        if tensor.dim() < 2 or tensor.shape[-1] != width or tensor.numel() % (self.tokens * width):
            return None
        copies = tensor.detach().double().reshape(-1, self.tokens, width)
        return copies[copies.norm(dim=-1).argmax(dim=0), torch.arange(self.tokens)]

    def _inner_norms(self) -> list[nn.Module]:
        """The modules that map a tensor to one of its shape whatever its length, but for those in front of readers."""
        kept = {norm.module for found in self.found if not found.writes for norm in found.norms}
        shapes: dict[str, torch.Size] = {}
        with ExitStack() as hooks, torch.no_grad():
            for path, module in self._modules.items():
                if path in kept or any(p.dim() >= 2 for p in module.parameters()):
                    continue

                def watch(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                    if len(given) == 1 and isinstance(output, Tensor) and output.shape == given[0].shape:
                        shapes.setdefault(path, output.shape)

                hooks.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
            self.model(**{**copied(self._inputs), "input_ids": self.ids.clone()})
        return [self._modules[path] for path, shape in shapes.items() if _is_norm(self._modules[path], shape)]


def _is_norm(module: nn.Module, shape: torch.Size) -> bool:
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, four = module(probe.clone()), module(4 * probe)
    return bool((four - one).abs().max() < 1e-3 * one.abs().max())


@contextmanager
def _switched_off(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


def _short_inputs(twin: Twin) -> tuple[dict[str, Any], Tensor]:
    """The twin's inputs for one text of ``TOKENS`` tokens, and its ids, each one once."""
    ids: Tensor = twin.inputs["input_ids"]
    low, high = int(ids.min()), int(ids.max())
    drawn = torch.randperm(high - low, generator=torch.Generator().manual_seed(0))[:TOKENS] + low
    inputs = {
        key: value[:1, :TOKENS] if isinstance(value, Tensor) and value.shape[:2] == ids.shape else value
        for key, value in twin.inputs.items()
    }
    return inputs, drawn[None].to(ids.dtype)


def _unused_id(ids: Tensor) -> int:
    used = set(ids.flatten().tolist())
    return next(token for token in range(int(ids.max()), 0, -1) if token not in used)

"""Run several forward passes through a streamed model side by side, so that each weight is read once for all of them.

Every forward pass is the model's own, in a thread of its own. It pauses where it enters a stage until the weights of
that stage are in memory. One thread runs at a time, in a fixed order, so the results are those of one pass after the
other. What a pass holds while it pauses (its hidden states) may be moved to files.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size
from ollama_forge.models.journal import Journal, read_tensors, write_tensors
from ollama_forge.models.spilled_cache import SPILLED, SpilledCaches
from ollama_forge.models.stages import Stage, StagedWeights, add_stage_hooks, nothing_like
from ollama_forge.progress import say
from ollama_forge.system import free_space, return_freed_memory

_SAY_EVERY = 15.0  # seconds
_SHARE_OF_READING = 10  # states are kept once the weights read since the last time are as many times larger


class _Cancelled(BaseException):
    """Ends the thread of a pass that is not needed any more."""


class _Pass(threading.Thread):
    """A function that runs forward passes, in a thread that pauses at every stage."""

    def __init__(self, number: int, function: Callable[[], None], back: threading.Semaphore) -> None:
        super().__init__(name=f"pass {number}", daemon=True)
        self.number, self._function, self._back = number, function, back
        self._turn = threading.Semaphore(0)
        self._inference = torch.is_inference_mode_enabled()
        self.stage: Stage | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.finished = self.cancelled = self.skips = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self._turn.acquire()
        try:
            if not self.cancelled:
                with torch.inference_mode(self._inference):
                    self._function()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        self.stage, self.finished = None, True
        self._back.release()

    def resume(self) -> None:
        """Let the pass run to its next stage or its end; called by the thread of the lockstep."""
        self._turn.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Wait for a stage; called by the thread of the pass. Returns the inputs of the stage."""
        self.stage, self.args, self.kwargs = stage, args, kwargs
        self._back.release()
        self._turn.acquire()
        if self.cancelled:
            raise _Cancelled
        found, self.stage, self.args, self.kwargs = (self.args, self.kwargs), None, (), {}
        return found

    @property
    def held(self) -> dict[str, Tensor]:
        """The tensors among the inputs of the stage, by place; those in a mapping that layers share too."""
        found = {f"arg.{place}": value for place, value in enumerate(self.args)}
        found |= {f"kwarg.{name}": value for name, value in self.kwargs.items()}
        for name, value in self.kwargs.items():
            if isinstance(value, MutableMapping):
                for key, entry in value.items():
                    parts = entry if isinstance(entry, tuple) else (entry,)
                    found |= {f"shared.{name}.{key}.{place}": part for place, part in enumerate(parts)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def replace(self, held: dict[str, Tensor]) -> None:
        """Replace the inputs of the stage by those of an interrupted pass."""
        self.args = tuple(held.get(f"arg.{place}", value) for place, value in enumerate(self.args))
        self.kwargs = {name: held.get(f"kwarg.{name}", value) for name, value in self.kwargs.items()}
        shared: dict[tuple[str, str], list[Tensor]] = {}
        for name in sorted(held):
            kind, _, rest = name.partition(".")
            if kind == "shared":
                mapping, key, _ = rest.split(".")
                shared.setdefault((mapping, key), []).append(held[name])
        for (mapping, key), parts in shared.items():
            self.kwargs[mapping][key] = tuple(parts)


class Lockstep:
    """Runs functions that call a streamed model side by side.

    Args:
        room: bytes of hidden states, keys and values that may be kept in memory.
        folder: where those that exceed it are written.

    Attributes:
        current: the pass that runs now, if any.
        adopted: number of entries of caches, in the last run, that may be written.
        takes_inputs: take the states before the first layer from the model, which would keep them all along.
        share_of_reading: a journal is written once the weights read since the last time are so many times larger.
    """

    def __init__(self, weights: StagedWeights, room: int, folder: Path) -> None:
        self.weights, self.room, self.folder = weights, room, folder
        self.share_of_reading = _SHARE_OF_READING
        self.current: _Pass | None = None
        self.adopted = 0
        self.takes_inputs = False
        self.output_parts: int | None = None  # of a layer that returns a tuple
        self._resumed_at: Stage | None = None
        add_stage_hooks(weights, self._enter)
        first = next(stage for stage in weights.stages if stage.layer is not None)
        first.module.register_forward_hook(self._note_output)

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.current is None or not self.current.skips:
            self.output_parts = len(output) if isinstance(output, tuple) else None

    def scoped(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that is called only for the forward passes of the function that registers it, where layers run."""
        owner = self.current

        def own(*args: Any, **kwargs: Any) -> Any:
            current = self.current
            return hook(*args, **kwargs) if current is owner and (owner is None or not owner.skips) else None

        return own

    def _enter(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = self.current
        if stage.stays or current is None or threading.current_thread() is not current:
            self.weights.load(stage)
            return None
        if current.skips and stage.layer is not None and stage is not self._resumed_at:
            return None
        if self.takes_inputs and stage.layer is not None and (stage.layer == 0 or stage is self._resumed_at):
            if args:
                args = (_taken(args[0]), *args[1:])
            elif "hidden_states" in kwargs:
                kwargs = {**kwargs, "hidden_states": _taken(kwargs["hidden_states"])}
        return current.pause(stage, args, kwargs)

    def run(
        self,
        functions: Sequence[Callable[[], None]],
        tokens: Sequence[int],
        journal: Journal | None = None,
        *,
        caches: bool = False,
    ) -> Iterator[int]:
        """Run functions side by side; yields the number of decoder layers that all have passed after every step.

        Args:
            tokens: the number of tokens that each one runs.
            journal: keeps the states of the passes, so that they go on after an interruption.
            caches: whether the passes hold keys and values, which get half of the room.

        Raises:
            ForgeError: the disk has too little space for hidden states that exceed the memory for them.
        """
        back = threading.Semaphore(0)
        of_caches = self.room // 2 if caches else 0
        spilled = SpilledCaches(self.folder, of_caches) if caches else None
        passes = [_Pass(number, function, back) for number, function in enumerate(functions)]
        for one in passes:
            one.start()
        try:
            with _Spill(self.folder, self.room - of_caches, tokens, spilled) as spill:
                yield from self._run(passes, spill, journal)
        finally:
            self.current = None
            self.adopted = 0 if spilled is None else spilled.adopted
            for one in passes:
                if not one.finished:
                    one.cancelled, one.error = True, None
                    one._turn.release()
                    one.join()
            self.weights.release()

    def _run(self, passes: list[_Pass], spill: _Spill, journal: Journal | None) -> Iterator[int]:
        layers = [stage for stage in self.weights.stages if stage.layer is not None]
        place = 0 if journal is None else journal.layer
        self._resumed_at = layers[place] if place else None
        if journal is not None and place:
            self.output_parts = journal.output_parts
        with _skipping(layers[:place], self):
            for one in passes:
                one.skips = place > 0
                self._step(one, spill)
            said, last, stage = time.monotonic(), -1, None
            while waiting := [one for one in passes if not one.finished]:
                stage, last = self._next(waiting, last)
                here = [one for one in waiting if one.stage is stage]
                for one in here:
                    self.weights.load(stage)  # again, if whoever takes the results has asked for other weights
                    spill.bring_back(one)
                    if one.skips and stage is self._resumed_at:
                        assert journal is not None
                        one.replace(journal.state(one.number))
                        one.skips = False
                    self._step(one, spill)
                    if one is not here[-1]:
                        yield 0
                passed = 0 if stage.layer is None else stage.layer + 1
                yield passed if any(not one.finished for one in passes) else max(passed, len(layers))
                if journal is not None and passed and all(self._is_at(one, layers, passed) for one in passes):
                    self._keep(journal, passes, passed, spill)
                if time.monotonic() - said > _SAY_EVERY and stage.layer is not None:
                    said = time.monotonic()
                    reads = self.weights.reads[stage.path]
                    say(f"layer {stage.layer + 1} of {len(layers)}, read from disk (pass {reads} over the weights)")

    def _step(self, one: _Pass, spill: _Spill) -> None:
        self.current = one
        try:
            one.resume()
        finally:
            self.current = None
        spill.take(one)
        return_freed_memory()  # each pass is a thread, for which the C library keeps freed memory of its own

    def _next(self, waiting: Sequence[_Pass], last: int) -> tuple[Stage, int]:
        """The stage to run after the one at place ``last``: the first from there on that a pass waits for."""
        count = len(self.weights.stages)
        wanted = {one.stage for one in waiting}
        places = [place for place, stage in enumerate(self.weights.stages) if stage in wanted]
        chosen = min(places, key=lambda place: (place - max(last, 0)) % count)
        return self.weights.stages[chosen], chosen

    @staticmethod
    def _is_at(one: _Pass, layers: Sequence[Stage], place: int) -> bool:
        return place < len(layers) and one.stage is layers[place]

    def _keep(self, journal: Journal, passes: Sequence[_Pass], place: int, spill: _Spill) -> None:
        """Keep the states of all passes before a layer, unless that would take long beside reading the weights."""
        size = sum(tensor.nbytes for one in passes for tensor in one.held.values())
        if size * self.share_of_reading > self.weights.largest * (place - journal.layer):
            return
        journal.output_parts = self.output_parts
        journal.keep(place, ((one.number, spill.contents(one)) for one in passes))


class _Spill:
    """Hidden states of paused passes in files, beyond those that ``room`` bytes of memory hold; and their caches."""

    def __init__(self, folder: Path, room: int, tokens: Sequence[int], caches: SpilledCaches | None) -> None:
        self._folder, self._room, self._tokens, self._caches = folder, room, tokens, caches
        self._in_memory: dict[int, int] = {}
        self._files: dict[int, Path] = {}
        self._asked = False

    def __enter__(self) -> _Spill:
        for path in self._folder.glob(f"{SPILLED}*"):  # of processes that were killed
            if not psutil.pid_exists(int(path.name.removeprefix(SPILLED).partition("-")[0])):
                path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._files.values():
            path.unlink(missing_ok=True)
        if self._caches is not None:
            self._caches.drop_all()

    def take(self, one: _Pass) -> None:
        """Note what a pass holds, and write it to a file if it exceeds the room."""
        self._in_memory.pop(one.number, None)
        if self._caches is not None:
            if one.finished:
                self._caches.drop(one.number)
            else:
                self._caches.take(one.number, (*one.args, *one.kwargs.values()))
        if one.finished or one.skips:
            return
        held = _large(one)
        size = sum(tensor.nbytes for tensor in held.values())
        if not self._asked and one.stage is not None and one.stage.layer is not None:
            self._asked = True
            self._ask(size / max(self._tokens[one.number], 1))
        if sum(self._in_memory.values()) + size <= self._room:
            self._in_memory[one.number] = size
            return
        path = self._folder / f"{SPILLED}{os.getpid()}-{one.number}.safetensors"
        write_tensors(path, held)
        self._files[one.number] = path
        for tensor in held.values():
            tensor.untyped_storage().resize_(0)

    def _ask(self, a_token: float) -> None:
        """Ask for room on the disk before the first layer runs."""
        whole = a_token * sum(self._tokens)
        if whole <= self._room:
            return
        free = free_space(self._folder)
        if whole - self._room > free:
            raise ForgeError(
                f"the hidden states of the prompts take {human_size(whole)}: {human_size(self._room)} fit into memory, "
                f"and {human_size(free)} are free at {self._folder}",
                "free disk space, set OLLAMA_FORGE_CACHE to a folder on another disk, or give fewer prompts",
            )

    def bring_back(self, one: _Pass) -> None:
        path = self._files.pop(one.number, None)
        if path is None:
            return
        values = read_tensors(path)
        path.unlink()
        with torch.inference_mode():
            for name, tensor in _large(one).items():
                tensor.untyped_storage().resize_(_needed(tensor))
                tensor.copy_(values[name])

    def contents(self, one: _Pass) -> dict[str, Tensor]:
        """All that a pass holds, wherever it is."""
        path = self._files.get(one.number)
        return one.held if path is None else {**one.held, **read_tensors(path)}


def _taken(value: Any) -> Any:
    """The hidden states under another name; the tensor itself becomes NaN that takes no memory."""
    if not (isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point() and value.is_contiguous()):
        return value
    own = value.detach()
    value.data = nothing_like(value)
    return own


def _large(one: _Pass) -> dict[str, Tensor]:
    """The hidden states that a pass holds in main memory, each storage once."""
    found = {
        name: tensor
        for name, tensor in one.held.items()
        if tensor.ndim >= 3 and tensor.is_floating_point() and tensor.device.type == "cpu"
        if tensor.is_contiguous() and tensor.untyped_storage().resizable()
    }
    return dict({t.untyped_storage()._cdata: (n, t) for n, t in found.items()}.values())


def _needed(tensor: Tensor) -> int:
    return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()


class _skipping:  # noqa: N801
    """Inside, layers before the one where a pass goes on return their input, in the form of their own output."""

    def __init__(self, layers: Sequence[Stage], lockstep: Lockstep) -> None:
        self.layers, self.lockstep = layers, lockstep

    def __enter__(self) -> None:
        for stage in self.layers:
            stage.module.forward = _Skipped(stage.module.forward, self.lockstep)

    def __exit__(self, *_: object) -> None:
        for stage in self.layers:
            del stage.module.__dict__["forward"]


class _Skipped:
    def __init__(self, forward: Callable[..., Any], lockstep: Lockstep) -> None:
        self.forward, self.lockstep = forward, lockstep

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = self.lockstep.current
        if current is None or not current.skips:
            return self.forward(*args, **kwargs)
        hidden, parts = args[0] if args else kwargs["hidden_states"], self.lockstep.output_parts
        return hidden if parts is None else (hidden, *[None] * (parts - 1))

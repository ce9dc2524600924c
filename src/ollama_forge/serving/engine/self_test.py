"""The self-test at load: what a model's state allows is found by running the model's own runners on short texts.

Every text is also run whole, alone and without a cache; the logits of a runner have to be the same up to rounding. A
wrong state (a wrong position, padding that was taken in, a convolution without its past) changes them by far more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ollama_forge.errors import ForgeError, error_line
from ollama_forge.models.device import is_out_of_memory
from ollama_forge.models.joined_linears import JoinedLinears
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.cuda_graphs import Capture, StepGraphs
from ollama_forge.serving.engine.model_runner import Forward, ModelRunner, StateSupport, difference
from ollama_forge.serving.engine.recorded_step import RecordedStep
from ollama_forge.serving.engine.single_runner import SingleRunner

_LOG = logging.getLogger(__name__)
_SENTENCE = "The harbour was quiet in the morning, and the first boats came back with the tide, full of fish."
_TOKENS = 48
_CHUNK = 7
_WAIT_SECONDS = 5.0  # until another model's step has ended
# The tolerance for the mean relative difference of logits. On a real model in bfloat16, rounding makes it 0.01 and
# positions that are off by one make it 0.06; other wrong states make it about 1.
_ROUNDING = 4  # times the precision of the weights' type
_NOISE = 3  # times the difference between one row and three equal rows
_LEAST, _MOST = 1e-3, 0.25
_OUTLIER = 2  # a single difference may be so many times the tolerance

Runner = BatchedRunner | SingleRunner


class SelfTest:
    """Runs the self-test of one model.

    Args:
        has_kv: for each layer, whether it stores keys and values; None if a layer stores another kind of state.
        capture: records decode steps (``StepGraphs``); None: CUDA graphs on CUDA, and no graphs elsewhere.
    """

    def __init__(self, forward: Forward, has_kv: Sequence[bool] | None, capture: Capture | None = None) -> None:
        self.forward, self.has_kv, self.capture = forward, has_kv, capture
        ids = forward.model.tokenizer.encode(_SENTENCE)
        ids = (ids * _TOKENS)[:_TOKENS]
        self.long, self.short, self.other = ids[:21], ids[30:37], ids[36:48]
        self.turn = [*self.long, *ids[24:30]]
        self.branch = [*self.long[:13], *ids[40:46]]
        self.tolerance = 0.0
        self._whole: list[tuple[list[int], Tensor]] = []

    @torch.inference_mode()
    def run(self) -> StateSupport:
        """Find what the model's state allows.

        Raises:
            ForgeError: the model cannot be run at all.
        """
        self.tolerance = self._find_tolerance()
        if self.has_kv is not None and self._holds(self._batches(self._batched())):
            splits, reuses = self._continues(self._batched, self.turn, self.branch)
            return StateSupport(splits=splits, reuses=reuses, graphs=self._replays())
        if not self._holds(self._caches()):
            return StateSupport(caches=False, batches=False, splits=False, reuses=False)
        splits, reuses = self._continues(self._single, self.turn)
        return StateSupport(batches=False, splits=splits, reuses=reuses)

    # -- what is expected -----------------------------------------------------------------------------------------

    def _find_tolerance(self) -> float:
        """Run each text whole, and find what rounding may make of its logits."""
        try:
            for text in (self.branch, self.short, self.other):
                self._run_whole(text)
            alone = self._run_whole(self.turn)
            rows = self.forward.uncached(self._tensor(self.turn).expand(3, -1), keep=None).float()
        except Exception as error:  # models raise anything
            if is_out_of_memory(error):
                raise
            raise ForgeError(
                f"{type(self.forward.model.module).__name__} does not run on text: {error_line(error)}",
                "report this with the model's name and the version of transformers",
            ) from error
        dtype = next(self.forward.model.module.parameters()).dtype
        rounding = _ROUNDING * torch.finfo(dtype).eps if dtype.is_floating_point else _MOST
        return min(max(_LEAST, rounding, _NOISE * float(difference(rows[0], alone).max())), _MOST)

    def _run_whole(self, text: list[int]) -> Tensor:
        """Run a text alone and without a cache; its logits ``[tokens, vocabulary]``."""
        logits = self.forward.uncached(self._tensor(text), keep=None)[0].float()
        self._whole.append((text, logits))
        return logits

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.forward.device)

    def _expected(self, ids: Sequence[int]) -> Tensor:
        """Logits ``[vocabulary]`` after a beginning of one of the texts."""
        return next(logits[len(ids) - 1] for text, logits in self._whole if text[: len(ids)] == list(ids))

    def _differences(self, logits: Tensor, *texts: Sequence[int]) -> list[float]:
        """How far each row of ``logits`` is from what is expected after its text."""
        expected = torch.stack([self._expected(text) for text in texts])
        return difference(logits, expected).tolist()

    def _holds(self, differences: Iterator[list[float]]) -> bool:
        """Whether a check runs, and its logits are as expected."""
        try:
            found = [value for values in differences for value in values]
        except Exception as error:  # a state that does not fit makes models raise anything
            if is_out_of_memory(error):
                raise
            _LOG.debug("the self-test met an error", exc_info=error)
            return False
        _LOG.debug("differences of the self-test: %s; tolerance: %.1e", found, self.tolerance)
        return sum(found) / len(found) <= self.tolerance and max(found) <= _OUTLIER * self.tolerance

    # -- checks ---------------------------------------------------------------------------------------------------

    def _batched(self) -> BatchedRunner:
        assert self.has_kv is not None
        return BatchedRunner(self.forward, self.has_kv, 4, 1 << 40)

    def _single(self) -> SingleRunner:
        return SingleRunner(self.forward)

    def _batches(self, runner: BatchedRunner) -> Iterator[list[float]]:
        """Two ragged prompts together, a third that joins late, and one that leaves."""
        a, b, c = self.long, self.short, self.other
        yield self._differences(prefilled(runner, a[:-3], b[:-3]), a[:-3], b[:-3])
        yield self._differences(prefilled(runner, c[:-3]), c[:-3])
        yield self._differences(runner.step([a[-3], b[-3], c[-3]]), a[:-2], b[:-2], c[:-2])
        runner.leave(0, None)  # the last row takes its place
        yield self._differences(runner.step([c[-2], b[-2]]), c[:-1], b[:-1])
        yield self._differences(runner.step([c[-1], b[-1]]), c, b)

    @torch.inference_mode()
    def try_recorded(self, recorded: RecordedStep) -> None:
        """Record a step, and note in ``recorded.failed`` if its logits are others; call this after ``run``."""
        assert self.has_kv is not None
        runner = BatchedRunner(self.forward, self.has_kv, 4, 1 << 40, recorded=recorded)
        if not self._holds(self._batches(runner)):
            recorded.failed.add(1)

    @torch.inference_mode()
    def join_linears(self) -> None:
        """Join packed layers that read the same input, if the logits stay; call this after ``run``."""
        module = self.forward.model.module
        joined = JoinedLinears(module, lambda: self.forward.uncached(self._tensor(self.short)))
        if joined.groups and not self._holds(self._batches(self._batched())):
            joined.undo()
        joined.keep()

    @torch.inference_mode()
    def joins_queries(self) -> bool:
        """Whether prompts may be computed as ``grouped_attention`` does; call this after ``run``."""
        assert self.has_kv is not None
        runner = BatchedRunner(self.forward, self.has_kv, 4, 1 << 40, joins_queries=True)
        return runner.one_pass and self._holds(self._batches(runner))

    def _replays(self) -> bool | None:
        """Whether the same holds where decode steps are replayed as graphs; None: there are none."""
        if (self.forward.device.type != "cuda" and self.capture is None) or len(self.forward.model.devices) > 1:
            return None
        assert self.has_kv is not None
        graphs = StepGraphs(self.forward, self.has_kv, 1 << 40, capture=self.capture, patience=0, wait=_WAIT_SECONDS)
        runner = BatchedRunner(self.forward, self.has_kv, 4, 1 << 40, graphs=graphs)
        try:
            return self._holds(self._batches(runner)) and not graphs.failed and graphs.captured > 0
        finally:
            runner.reset()

    def _caches(self) -> Iterator[list[float]]:
        """Two sequences one after the other, and a pass of another text between tokens, as embeddings make it."""
        for text in (self.long, self.other):
            runner = self._single()
            yield self._differences(prefilled(runner, text[:-3]), text[:-3])
            yield self._differences(runner.step(text[-3:-2]), text[:-2])
            self.forward.uncached(self._tensor(self.short))
            for end in (len(text) - 1, len(text)):
                yield self._differences(runner.step([text[end - 1]]), text[:end])

    def _continues(self, new: Callable[[], Runner], *turns: Sequence[int]) -> tuple[bool, bool]:
        """Whether prompts may be prefilled in chunks, and whether ``turns`` may continue an earlier sequence."""
        runner = new()
        runner.chunk = _CHUNK
        splits = self._holds(self._first_turn(runner))
        if not splits:
            runner = new()
            if not self._holds(self._first_turn(runner)):
                return False, False
        return splits, self._holds(self._next_turns(runner, turns))

    def _first_turn(self, runner: Runner) -> Iterator[list[float]]:
        yield self._differences(prefilled(runner, self.long[:-1]), self.long[:-1])
        yield self._differences(runner.step(self.long[-1:]), self.long)
        runner.leave(0, self.long)

    def _next_turns(self, runner: Runner, turns: Sequence[Sequence[int]]) -> Iterator[list[float]]:
        for turn in turns:
            yield self._differences(prefilled(runner, turn), turn)
            runner.leave(0, turn)


def prefilled(runner: ModelRunner, *prompts: Sequence[int]) -> Tensor:
    """Prefill prompts and append them to the runner's batch; their logits ``[prompts, vocabulary]``."""
    prefill = runner.prefill(prompts, None)
    while (logits := prefill.advance()) is None:
        pass
    for index in range(len(prompts)):
        runner.join(prefill, index)
    return logits

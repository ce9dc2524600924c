"""What methods are fitted to: the model, the fit prompts, and statistics of them that are gathered once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.activations.samples import harmful_samples, harmless_samples
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.model_map import Matrix
from ollama_forge.directions.difference_of_means import difference_of_means
from ollama_forge.directions.selection import layer_of_fraction
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import ReadVector
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids

T = TypeVar("T")
_NO_LIMIT = 1 << 50  # bytes: the inputs of all writers are held at once, for several fits


class Protected(StrEnum):
    """The harmless inputs that a fit protects."""

    ALL = "parallel and general prompts, and the answers to them"
    PROMPTS = "parallel and general prompts"
    PAIRS = "parallel prompts"


@dataclass(frozen=True)
class Residuals:
    """The residual stream at the last position of each fit prompt, float32 ``[prompts, n_layers, d_model]``."""

    harmful: Tensor
    harmless: Tensor
    general: Tensor


class FitData:
    """The model, the fit prompts, and their statistics.

    Args:
        read: reads a gain or bias of the model by its tensor name.

    Attributes:
        seconds: how long gathering each statistic took.
        used: names of the statistics that were asked for since the caller last cleared it.
    """

    def __init__(self, model: ChatModel, prompts: PartPrompts, read: ReadVector) -> None:
        self.model, self.prompts, self.read = model, prompts, read
        self.seconds: dict[str, float] = {}
        self.used: set[str] = set()
        self._values: dict[str, Any] = {}
        self._context = FitContext(model, prompts, read, seed=0)

    def layers_at(self, *fractions: float) -> list[int]:
        """The layers at these fractions of the depth, in rising order."""
        return sorted({layer_of_fraction(fraction, self.model.model_map.n_layers) for fraction in fractions})

    @property
    def residuals(self) -> Residuals:
        def of(prompts: Sequence[Ids]) -> Tensor:
            layers = range(self.model.model_map.n_layers)
            samples = gather_residuals(self.model, prompts, layers, keep_samples=True).samples
            assert samples is not None
            return samples

        def gather() -> Residuals:
            context, pairs = self._context, len(self.prompts.harmless)
            harmless = of(context.harmless)
            return Residuals(of(context.harmful), harmless[:pairs], harmless[pairs:])

        return self._shared("residuals", gather)

    def difference(self, layer: int) -> Tensor:
        """The difference of means of a layer, scaled to length 1: ``[d_model]``."""
        found = self.residuals
        return difference_of_means(found.harmful[:, layer].double().mean(0), found.harmless[:, layer].double().mean(0))

    def token_moments(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """The uncentred second moment ``[d_model, d_model]`` of the stream over the tokens of harmless prompts.

        The first token of each prompt is left out: it is an attention sink of huge norm.
        """
        gather = lambda: token_moments(self.model, self._context.harmless, layers)  # noqa: E731
        return self._shared(f"token moments of {layers}", gather)

    def writer_inputs(self, writers: Sequence[Matrix], protected: Protected) -> dict[str, WriterInputs]:
        """The inputs of writers that are no experts, by tensor name. Those of one ``Protected`` are held at a time."""
        context = self._context
        harmless = context.harmless[: len(self.prompts.harmless)] if protected is Protected.PAIRS else context.harmless
        answers = self._answers() if protected is Protected.ALL else [[] for _ in harmless]

        def gather() -> dict[str, WriterInputs]:
            for held in Protected:
                self._values.pop(f"writer inputs of {held}", None)
            samples = harmful_samples(context.harmful), harmless_samples(harmless, answers)
            groups = gather_writer_inputs(self.model, writers, *samples, budget=_NO_LIMIT)
            return {tensor: inputs for group in groups for tensor, [inputs] in group.items()}

        return self._shared(f"writer inputs of {protected}", gather)

    def _answers(self) -> list[Ids]:
        return self._shared("answers", lambda: self._context.answers)

    def _shared(self, name: str, gather: Callable[[], T]) -> T:
        self.used.add(name)
        if name not in self._values:
            started = time.monotonic()
            self._values[name] = gather()
            self.seconds[name] = time.monotonic() - started
        value: T = self._values[name]
        return value


def token_moments(model: ChatModel, prompts: Sequence[Ids], layers: Sequence[int]) -> dict[int, Tensor]:
    """See ``FitData.token_moments``; float64."""
    d_model = model.model_map.d_model
    total = {layer: torch.zeros(d_model, d_model, dtype=torch.float64) for layer in layers}
    count = 0
    for batch in model.batches(prompts):
        kept = batch.positions > 0  # neither padding nor a first token
        count += int(kept.sum())

        def hook(layer: int, kept: Tensor) -> Callable[..., None]:
            def add(module: nn.Module, args: Any, output: Any) -> None:
                hidden = (output[0] if isinstance(output, tuple) else output)[kept].float()
                total[layer] += (hidden.T @ hidden).cpu()

            return add

        handles = [model.layer(layer).register_forward_hook(hook(layer, kept)) for layer in layers]
        try:
            model.run_to_layer(batch, max(layers))
        finally:
            for handle in handles:
                handle.remove()
    return {layer: moment / max(count, 1) for layer, moment in total.items()}

"""The residual stream at the output of decoder layers, at one position counted from the end of the templated prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.text.tokenizer import Ids


@dataclass(frozen=True)
class ResidualStats:
    """Statistics of one set of prompts.

    Attributes:
        layers: the layers that the statistics are of, in order.
        mean: float64 ``[len(layers), d_model]``.
        samples: float32 ``[prompts, len(layers), d_model]``; None unless asked for.
        lengths: tokens of each prompt.
    """

    layers: tuple[int, ...]
    mean: Tensor
    samples: Tensor | None
    lengths: tuple[int, ...]

    def of_layer(self, layer: int) -> Tensor:
        """The mean ``[d_model]`` of a layer."""
        return self.mean[self.layers.index(layer)]


def gather_residuals(
    model: ChatModel,
    prompts: Sequence[Ids],
    layers: Sequence[int],
    *,
    position: int = -1,
    keep_samples: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ResidualStats:
    """Run prompts up to the deepest layer asked for and keep one position of each layer's output.

    Raises:
        UsageError: ``position`` is not negative, or lies before the start of a prompt.
        ForgeError: the model computes NaN or infinite values.
    """
    if position >= 0 or any(len(prompt) < -position for prompt in prompts):
        raise UsageError(
            f"position {position} is not within every templated prompt",
            "count from the end: -1 is the last token",
        )
    layers = sorted(set(layers))
    places = {layer: place for place, layer in enumerate(layers)}
    result: ResidualStats | None = None

    def work() -> None:
        nonlocal result
        total = torch.zeros(len(layers), model.model_map.d_model, dtype=torch.float64)
        samples = torch.empty(len(prompts), len(layers), model.model_map.d_model) if keep_samples else None
        for batch in model.batches(prompts):
            seen: dict[int, Tensor] = {}
            handles = [model.layer(layer).register_forward_hook(_keeper(seen, layer, position)) for layer in layers]
            try:
                model.run_to_layer(batch, layers[-1])
            finally:
                for handle in handles:
                    handle.remove()
            for layer, values in seen.items():
                total[places[layer]] += values.double().sum(0)
                if samples is not None:
                    samples[list(batch.rows), places[layer]] = values.float()
            if progress:
                progress(len(batch.rows))
        if not torch.isfinite(total).all():
            raise ForgeError("the model computes NaN or infinite values", "damaged weights? Or try --dtype float32")
        result = ResidualStats(tuple(layers), total / len(prompts), samples, tuple(map(len, prompts)))

    model.retry_smaller(work)
    assert result is not None
    return result


def _keeper(seen: dict[int, Tensor], layer: int, position: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        seen[layer] = hidden[:, position].detach().to("cpu", copy=True)

    return keep

"""Collect the residual stream at the output of decoder layers, at one position of the templated prompt."""

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
    """Activations of the residual stream on a list of prompts.

    Attributes:
        layers: numbers of the layers, ascending.
        mean: mean over the prompts, float64 ``[len(layers), d_model]``.
        samples: float32 ``[prompts, len(layers), d_model]``; None without ``keep_samples``.
        lengths: number of tokens of each prompt.
    """

    layers: tuple[int, ...]
    mean: Tensor
    samples: Tensor | None
    lengths: tuple[int, ...]

    def of_layer(self, layer: int) -> Tensor:
        """The mean of one layer, ``[d_model]``."""
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
    """Run prompts up to the deepest of ``layers`` and record the output of each layer at one position.

    Args:
        position: counted from the end of the prompt; -1 is the last token.
        progress: called with the number of newly processed prompts.

    Raises:
        UsageError: ``position`` is not negative, or a prompt is shorter than that.
        ForgeError: the model computes NaN or infinite values.
    """
    if position >= 0 or any(len(prompt) < -position for prompt in prompts):
        raise UsageError(
            f"not every templated prompt has the position {position}",
            "positions count from the end: -1 is the last token",
        )
    layers = sorted(set(layers))
    index_of = {layer: index for index, layer in enumerate(layers)}
    result: ResidualStats | None = None

    def run_prompts() -> None:
        nonlocal result
        total = torch.zeros(len(layers), model.model_map.d_model, dtype=torch.float64)
        samples = torch.empty(len(prompts), len(layers), model.model_map.d_model) if keep_samples else None
        for batch in model.batches(prompts):
            seen: dict[int, Tensor] = {}
            handles = [
                model.layer(layer).register_forward_hook(_recording_hook(seen, layer, position)) for layer in layers
            ]
            try:
                model.run_to_layer(batch, layers[-1])
            finally:
                for handle in handles:
                    handle.remove()
            for layer, values in seen.items():
                total[index_of[layer]] += values.double().sum(0)
                if samples is not None:
                    samples[list(batch.rows), index_of[layer]] = values.float()
            if progress:
                progress(len(batch.rows))
        if not torch.isfinite(total).all():
            raise ForgeError(
                "the model computes NaN or infinite values",
                "try --dtype float32; if that fails too, the weights are damaged",
            )
        result = ResidualStats(tuple(layers), total / len(prompts), samples, tuple(map(len, prompts)))

    model.retry_smaller(run_prompts)
    assert result is not None
    return result


def _recording_hook(seen: dict[int, Tensor], layer: int, position: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        seen[layer] = hidden[:, position].detach().to("cpu", copy=True)

    return keep

"""A twin: a tiny random model of the class that loads a checkpoint, built from the checkpoint's own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Twin:
    """A twin.

    Attributes:
        model: the float32 module in eval mode, with random weights.
        config: the content of its config.json.
        inputs: keyword arguments of a forward pass over ``[batch, tokens]`` token ids, without a cache.
    """

    model: nn.Module
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]

    def run(self) -> Tensor:
        """The logits ``[batch, tokens, vocabulary]`` of a forward pass, float32."""
        raise NotImplementedError


def build_twin(config: Mapping[str, Any], *, trust_remote_code: bool = False, seed: int = 0) -> Twin:
    """Build the twin of the checkpoint with this config.json.

    Raises:
        ForgeError: the class is unknown to transformers, or no small model of it runs.
    """
    raise NotImplementedError

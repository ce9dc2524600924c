"""Tokens that were sampled on the device, and are read later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.serving.engine.base import Logprob, Token


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities, on the device.

    Attributes:
        wanted: the rows that ask for them, each with its number of alternatives.
        tensors: those of the tokens ``[wanted]``, those of the likeliest tokens and their ids ``[wanted, most]``.
    """

    wanted: Sequence[tuple[int, int]]
    tensors: tuple[Tensor, Tensor, Tensor]


class Sampled:
    """The next tokens of some rows, on the device of their logits; the copy to the host has begun.

    Attributes:
        ids: the tokens' ids ``[rows]`` on the device.
    """

    def __init__(self, ids: Tensor, logprobs: Logprobs | None) -> None:
        self.ids, self._logprobs = ids, logprobs
        on_cuda = ids.device.type == "cuda"
        tensors = (ids, *(logprobs.tensors if logprobs is not None else ()))
        self._copies = [tensor.to("cpu", non_blocking=on_cuda) for tensor in tensors]
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(ids.device))

    def read(self) -> list[Token]:
        """Wait for the tokens; rows that ask for log-probabilities have them."""
        if self._copied is not None:
            self._copied.synchronize()
        ids, *rest = (copy.tolist() for copy in self._copies)
        tokens = [Token(id_) for id_ in ids]
        if self._logprobs is not None:
            values, top_values, top_ids = rest
            for place, (row, count) in enumerate(self._logprobs.wanted):
                pairs = zip(top_ids[place][:count], top_values[place][:count], strict=True)
                tokens[row] = Token(ids[row], values[place], tuple(Logprob(*pair) for pair in pairs))
        return tokens

"""The model as the scheduler sees it, its forward pass, and what its state allows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ollama_forge.models.chat_model import ChatModel

if TYPE_CHECKING:
    from ollama_forge.serving.engine.live import LiveEdit

Media = Mapping[str, Tensor] | None
_CHUNK = {"cpu": 256}
_CHUNK_ON_DEVICE = 1024
_ROUNDING = 0.05  # relative; that of bfloat16 stays below a third of it


def chunk_of(device: torch.device) -> int:
    """Number of prompt tokens that are prefilled in one pass."""
    return _CHUNK.get(device.type, _CHUNK_ON_DEVICE)


class Prefill(Protocol):
    """The prefill of some prompts. ``cached`` is the number of tokens of each that it does not compute."""

    @property
    def cached(self) -> Sequence[int]: ...

    def advance(self) -> Tensor | None:
        """Run the next chunk; the last chunk returns the logits ``[prompts, vocabulary]`` of the last positions."""
        ...


class ModelRunner(Protocol):
    """The decode batch: its sequences are rows, numbered from 0 without gaps."""

    @property
    def slots(self) -> int: ...

    @property
    def chunk(self) -> int:
        """Maximum number of tokens of one prompt that a prefill computes at a time."""
        ...

    @property
    def reuses(self) -> bool:
        """Whether a prompt may continue the state of another sequence that begins alike."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether ``step`` takes ids that are on the device, and a row may leave after a step too many."""
        ...

    def uncached(self, prompt: Sequence[int]) -> int:
        """Number of tokens of a prompt that the prefix cache does not cover."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], media: Media) -> Prefill:
        """Start to prefill prompts; with ``media``, one prompt, which does not use the prefix cache."""
        ...

    def join(self, prefill: Any, index: int) -> None:
        """Append the prefilled prompt number ``index`` to the batch as its last row."""
        ...

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Decode: feed each row its token, return the logits ``[rows, vocabulary]``.

        They are valid until the next step. If the runner runs ahead, ``tokens`` may be a tensor ``[rows]``.
        """
        ...

    def leave(self, row: int, ids: Sequence[int] | None) -> None:
        """Remove a row; the last row takes its number. If ``ids`` are given, the prefix cache keeps their state."""
        ...

    def reset(self) -> None:
        """Remove all rows and empty the prefix cache."""
        ...


@dataclass(frozen=True)
class StateSupport:
    """What can be done with a model's state after some tokens (keys and values, recurrent states).

    Attributes:
        caches: decode from it; otherwise each token takes a pass over the whole text.
        batches: decode several sequences together.
        splits: prefill a prompt in chunks.
        reuses: continue it with the rest of a later prompt that begins with the same tokens.
        graphs: replay decode steps as CUDA graphs; None: not tried, as the device has none, rows do not batch, or the
            layers are on several devices.
    """

    caches: bool = True
    batches: bool = True
    splits: bool = True
    reuses: bool = True
    graphs: bool | None = None

    @property
    def limits(self) -> str:
        """What cannot be done, for the user; "" for a model that can do everything."""
        lacks = []
        if not self.caches:
            return "one answer at a time and without a cache, because decoding from its cache changes the answer"
        if not self.batches:
            lacks.append("one answer at a time")
        if not self.splits:
            lacks.append("prompts in one pass")
        if not self.reuses:
            lacks.append("each turn from its beginning")
        states = f"{', '.join(lacks)}, because its state allows no more" if lacks else ""
        graphs = "steps without CUDA graphs, which this model does not allow" if self.graphs is False else ""
        return "; ".join(filter(None, (states, graphs)))


class Forward:
    """The model's forward pass; it leaves out inputs that the model does not take, and counts the passes.

    Args:
        live: an edit of the model; token ids are then row ids, which also say the strength (``LiveEdit.offset``).
    """

    def __init__(self, model: ChatModel, live: LiveEdit | None = None) -> None:
        self.model, self.live = model, live
        self.passes = 0
        parameters = inspect.signature(model.module.forward).parameters
        self.takes_positions = "position_ids" in parameters
        names = ("cache", "past_key_values", "cache_params", "state")
        self.cache_name = next((name for name in names if name in parameters), "cache")
        self._with_offset: list[Any] = [part for part in model.module.modules() if hasattr(part, "rope_deltas")]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def finds_positions(self) -> bool:
        """Whether the module itself finds the positions of a prompt with images (Qwen-VL and the like)."""
        return bool(self._with_offset)

    def take_offset(self) -> int:
        """The number to add to positions behind the images of the last prompt; the module forgets it."""
        offset = 0
        for part in self._with_offset:
            if part.rope_deltas is not None:
                offset = int(part.rope_deltas)
            part.rope_deltas = None
        return offset

    def __call__(self, ids: Tensor, cache: Any, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits ``[rows, vocabulary]`` of the last position, and the updated cache."""
        result = self._run(ids, use_cache=True, **{self.cache_name: cache}, **inputs)
        return result.logits[:, -1], getattr(result, self.cache_name)

    def uncached(self, ids: Tensor, *, keep: int | None = 1) -> Tensor:
        """Logits ``[rows, keep, vocabulary]`` of the last ``keep`` positions of whole texts; None: of all."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        logits: Tensor = self._run(ids, keep=keep, use_cache=False, position_ids=positions).logits
        return logits if keep is None else logits[:, -keep:]

    def _run(self, ids: Tensor, **inputs: Any) -> Any:
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        self.passes += 1
        with nullcontext(ids) if self.live is None else self.live.at_row_ids(ids) as tokens:
            return self.model.forward(input_ids=tokens, **inputs)


def on_device(media: Media, model: ChatModel) -> dict[str, Tensor]:
    """Media on the model's device; floating-point tensors also get the model's dtype."""
    dtype = next(model.module.parameters()).dtype
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else None)
        for name, tensor in (media or {}).items()
    }


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """The relative difference ``[...]`` between rows of logits ``[..., vocabulary]``, whose means do not matter."""
    found, expected = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, expected))
    norms: Tensor = torch.linalg.vector_norm(found - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    return norms


def differ_by_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing a step gave its logits ``[rows, vocabulary]``."""
    return bool(difference(found, expected).mean() <= _ROUNDING)

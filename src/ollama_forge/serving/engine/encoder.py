"""The engine for embedding models: a transformers model, pooling, and linear layers, as its modules.json says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.device import bytes_on_accelerators, is_out_of_memory, pick_device, pick_dtype, release_memory
from ollama_forge.quiet import quiet_transformers
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.device_use import DEVICE_USE
from ollama_forge.serving.sentence_modules import Dense, SentenceModules

_LOG = logging.getLogger(__name__)
_CLOSED = "the model was unloaded"
_ROWS = 32
_TOKENS = 8192  # maximum of a batch, padding included
_UNBOUNDED = 1 << 20  # tokenizers without a maximum have a huge one
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"Identity": lambda x: x, "Tanh": torch.tanh}

Vectors = list[list[float]]


class EncoderEngine:
    """Computes embeddings in a thread of its own; it generates no text.

    Args:
        module: a transformers model without a head; only the engine may use it from now on.
        modules: how token vectors become one.
        context_length: maximum number of tokens of an input.
        prompt_tokens: number of tokens at the beginning of each input that are not pooled.
        slots: maximum number of requests whose batches take turns.
    """

    def __init__(
        self,
        module: Any,
        modules: SentenceModules,
        *,
        context_length: int,
        prompt_tokens: int = 0,
        slots: int = 16,
    ) -> None:
        self._module, self._modules = module.eval(), modules
        self._context_length, self._prompt_tokens, self._slots = context_length, prompt_tokens, slots
        self._device = next(module.parameters()).device
        config = module.config
        self._pad, self._vocabulary = config.pad_token_id or 0, int(config.vocab_size)
        self._pads = module.dtype.itemsize > 2  # in 16 bits, sums over padding are rounded otherwise
        self._layers = [_dense(layer, self._device) for layer in modules.dense]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._closed = False
        self.device_bytes = bytes_on_accelerators(module)

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def healthy(self) -> bool:
        return not self._closed

    async def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        """Embed each input as an L2-normalised vector.

        Raises:
            EngineError: an input is empty, too long or not valid, the model failed, or the engine is closed.
        """
        for ids in inputs:
            if not 0 < len(ids) <= self._context_length:
                raise EngineError(f"an input has {len(ids)} tokens, not 1 to {self._context_length}")
            if not 0 <= min(ids) <= max(ids) < self._vocabulary:
                raise EngineError("an input contains token ids that the model does not know")
        vectors: Vectors = [[] for _ in inputs]
        loop = asyncio.get_running_loop()
        for indices in _batches(inputs, padded=self._pads):
            if self._closed:  # then the executor takes nothing
                raise EngineError(_CLOSED)
            found = await loop.run_in_executor(self._worker, self._try_embed, [inputs[index] for index in indices])
            for index, vector in zip(indices, found, strict=True):
                vectors[index] = vector
        return vectors

    def close(self) -> None:
        self._closed = True
        self._worker.shutdown()  # what waits in it ends with an error

    # -- the thread -----------------------------------------------------------------------------------------------

    def _try_embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        if self._closed:
            raise EngineError(_CLOSED)
        try:
            with DEVICE_USE.shared():
                return self._embed(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                release_memory()
                raise EngineError("the model ran out of memory; use shorter inputs") from None
            _LOG.error("the model failed", exc_info=error)
            raise EngineError(f"the model failed while embedding ({type(error).__name__})") from None

    @torch.inference_mode()
    def _embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        width = max(map(len, inputs))
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in inputs], device=self._device)
        lengths = torch.tensor([len(row) for row in inputs], device=self._device)
        mask = torch.arange(width, device=self._device) < lengths.unsqueeze(1)
        hidden = self._module(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        mask[:, : self._prompt_tokens] = False
        vectors = torch.cat([pooled(hidden, mask, name) for name in self._modules.poolings], -1)
        for layer in self._layers:
            vectors = layer(vectors)
        found: Vectors = nn.functional.normalize(vectors, dim=-1).tolist()
        return found


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector ``[rows, d]`` for each row of ``hidden`` ``[rows, tokens, d]``, of the tokens in ``mask``."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    match pooling:
        case "cls":
            return hidden[torch.arange(len(hidden)), mask.int().argmax(1)]
        case "lasttoken":
            return hidden[torch.arange(len(hidden)), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]
        case "max":
            return hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
        case "weightedmean":
            weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device).view(1, -1, 1)
    total = weights.sum(1).clamp(min=1e-9)
    return (hidden * weights).sum(1) / (total.sqrt() if pooling == "mean_sqrt_len" else total)


def _batches(inputs: Sequence[Sequence[int]], *, padded: bool) -> Iterator[list[int]]:
    """The indices of inputs in batches, longest first; if they are not padded, those of a batch have one length."""
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    while order:
        longest = len(inputs[order[0]])
        count = max(1, min(_ROWS, _TOKENS // longest))
        if not padded:
            count = min(count, sum(len(inputs[index]) == longest for index in order))
        batch, order = order[:count], order[count:]
        yield batch


def _dense(layer: Dense, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function of a linear layer with its activation.

    Raises:
        ForgeError: its weights are not there, or its activation is not supported.
    """
    path = layer.folder / "model.safetensors"
    if not path.is_file() or layer.activation not in _ACTIVATIONS:
        what = f"the activation {layer.activation}" if path.is_file() else "weights other than model.safetensors"
        raise ForgeError(f"{layer.folder}: {what} of a Dense module cannot be used", "use sentence-transformers")
    weights = {name: tensor.to(device, torch.float32) for name, tensor in load_file(path).items()}
    activation = _ACTIVATIONS[layer.activation]
    return lambda x: activation(nn.functional.linear(x, weights["linear.weight"], weights.get("linear.bias")))


# -- loading ----------------------------------------------------------------------------------------------------------


def load_encoder(
    checkpoint: Checkpoint,
    modules: SentenceModules,
    tokenizer: Any,
    settings: LoadSettings,
    *,
    slots: int = 16,
    num_ctx: int | None = None,
) -> EncoderEngine:
    """Load an embedding model; with ``dtype`` auto, a CPU computes in float32.

    Args:
        tokenizer: the model's transformers tokenizer.
        num_ctx: bounds the number of tokens of an input; None: the model's own bound.

    Raises:
        ForgeError: the model cannot be loaded.
    """
    device = pick_device(settings.device)
    dtype = torch.float32 if settings.dtype == "auto" and device.type == "cpu" else pick_dtype(settings.dtype, device)
    module = _load(checkpoint, device, dtype, settings.trust_remote_code)
    longest = _context_length(module, modules, tokenizer)
    return EncoderEngine(
        module,
        modules,
        context_length=min(longest, num_ctx or longest),
        prompt_tokens=0 if modules.pools_prompt else _prompt_tokens(modules.prompt, tokenizer),
        slots=slots,
    )


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModel

    with quiet_transformers():
        try:
            module, info = AutoModel.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # invalid configs and weights make transformers raise any exception
            raise ForgeError(
                f"{checkpoint.label} cannot be loaded: {error_line(error)}",
                "check that config.json belongs to the weights, or download the model again",
            ) from error
    missing = [name for name in sorted(info["missing_keys"]) if "pooler" not in name]  # no vector is made with it
    if missing:
        raise ForgeError(f"{checkpoint.label} is incomplete: {missing[0]} is missing", "download the model again")
    moved: nn.Module = module.to(device)
    return moved


def _context_length(module: Any, modules: SentenceModules, tokenizer: Any) -> int:
    """The least of the lengths that the modules, the tokenizer and the positions of the model allow."""
    positions: int = getattr(module.config, "max_position_embeddings", None) or _UNBOUNDED
    table = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)  # RoBERTa numbers its positions from behind the padding's
    positions -= 0 if offset is None else offset + 1
    return min(modules.max_length or _UNBOUNDED, int(tokenizer.model_max_length), positions)


def _prompt_tokens(prompt: str, tokenizer: Any) -> int:
    """Number of tokens of the prompt at the beginning of an input, special ones included."""
    ids: list[int] = tokenizer(prompt).input_ids
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return len(ids) - (bool(ids) and ids[-1] == end)

"""A chat model run by transformers: run prompts under hooks, answer greedily, return log-probabilities."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import ModelMap, Place
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.batch_support import BatchSupport, batch_support
from ollama_forge.models.batching import Batch, batches
from ollama_forge.models.cpu_packing import pack_linears
from ollama_forge.models.device import (
    devices_for,
    is_out_of_memory,
    memory_available,
    pick_dtype,
    release_memory,
    require_bits,
)
from ollama_forge.models.forced import forced
from ollama_forge.models.greedy import answer
from ollama_forge.models.journal import Journal
from ollama_forge.models.loading import load_module
from ollama_forge.models.protocol import Forced, ModelCopies
from ollama_forge.text.tokenizer import Ids, Tokenizer

DEFAULT_BATCH = 64
_CACHED_BYTES = 1536  # of a value for all tokens of a thread: more tokens leave a core's cache between two operations
LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class LoadSettings:
    """How to load a model and render its chat template.

    Attributes:
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: auto, or a number of prompts.
        system: the system prompt, or None.
        template_kwargs: arguments for the chat template.
        allow_base_model: accept a model without chat template.
        load_in_8bit, load_in_4bit: load with bitsandbytes in 8 or 4 bits.
        device_map: how accelerate shares the layers among all CUDA devices: auto, balanced, balanced_low_0 or
            sequential; None: the model is on one device.
        trust_remote_code: execute the model's own Python code if transformers has no class for the model.
        memory: bytes of memory to use, or ``free`` for what is free; a model that needs more is streamed from disk
            layer by layer. None: the whole model is loaded, or refused.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: str | int = "auto"
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_base_model: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    device_map: str | None = None
    trust_remote_code: bool = False
    memory: int | Literal["free"] | None = None

    @property
    def outcome(self) -> dict[str, Any]:
        """The settings that results depend on; how much memory is used changes none."""
        return {name: value for name, value in asdict(self).items() if name != "memory"}

    @property
    def bits(self) -> int | None:
        """The bits to which bitsandbytes rounds the weights; None: it does not."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    def check(self) -> None:
        """Check the device and the dtype before a model is fetched.

        Raises:
            UsageError: the device or the dtype is unknown, the device is not available, or settings exclude each other.
            ForgeError: ``bits`` are set, but bitsandbytes is not available.
        """
        devices = devices_for(self.device, self.device_map)
        pick_dtype(self.dtype, devices[0])
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError("--load-in-8bit and --load-in-4bit exclude each other", "leave out one of them")
        if self.device_map is not None and isinstance(self.memory, int):
            raise UsageError(
                "--memory streams a model to one device, and --device-map shares it among several",
                "leave out one of them",
            )
        if self.bits is not None:
            require_bits(devices[0], self.bits)

    def check_for_vllm(self) -> None:
        """Check that the weights are not to be rounded, if vLLM answers.

        Raises:
            UsageError: they are.
        """
        if self.bits is not None:
            raise UsageError(f"--load-in-{self.bits}bit is for transformers, and vLLM answers", "leave out one of them")


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass after the deepest layer that is needed."""


class ChatModel:
    """A causal language model with its tokenizer; see ``ChatModel.load`` and ``ChatModel.load_unmapped``.

    Attributes:
        streams: whether its weights are read from disk for every forward pass.
        devices: those that hold its weights; the first one takes the inputs, and has the logits.
        device: the first of them.
        loads: number of times that weights were put into memory since; their addresses are the same until it grows.
        copies: copies of the model that run its batches in its place; None: it runs them itself.
        batch_tokens: most tokens of a batch; None: as many as ``batch_size`` prompts have.
        logits_bytes: most bytes of a batch's float32 logits.
    """

    streams: ClassVar[bool] = False
    loads = 0
    copies: ModelCopies | None = None
    batch_tokens: int | None = None
    logits_bytes = LOGITS_BYTES

    def __init__(
        self, module: nn.Module, tokenizer: Tokenizer, model_map: ModelMap | None, settings: LoadSettings
    ) -> None:
        self.module = module.eval()
        self.tokenizer = tokenizer
        self._model_map = model_map
        self.settings = settings
        self.devices = _devices_of(module)
        self.device = self.devices[0]
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # see ``planned_attention``
        self.batch_size = DEFAULT_BATCH if settings.batch_size == "auto" else int(settings.batch_size)
        head = module.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Module):  # bf16 products of strided slices are hundreds of times slower on CPUs
            head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        self._slices_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    @classmethod
    def load(cls, checkpoint: Checkpoint, settings: LoadSettings, model_map: ModelMap | None = None) -> ChatModel:
        """Load a checkpoint.

        Args:
            model_map: the checkpoint's matrices by role; None to map them.

        Raises:
            ForgeError: weights are missing or unreadable, memory is too small, or the chat template is missing (unless
                ``allow_base_model``) or omits the instruction.
        """
        if model_map is None:
            model_map = map_checkpoint(checkpoint, trust_remote_code=settings.trust_remote_code)
        return cls._load(checkpoint, settings, model_map)

    @classmethod
    def load_unmapped(cls, checkpoint: Checkpoint, settings: LoadSettings) -> ChatModel:
        """Load a checkpoint that is only run, not edited: any causal LM of transformers, also one without a template.

        Raises:
            ForgeError: weights are missing or unreadable, or memory is too small.
        """
        return cls._load(checkpoint, replace(settings, allow_base_model=True), None)

    @classmethod
    def _load(cls, checkpoint: Checkpoint, settings: LoadSettings, model_map: ModelMap | None) -> ChatModel:
        tokenizer = load_tokenizer(checkpoint, model_map, settings)
        devices = devices_for(settings.device, settings.device_map)
        module = load_module(
            checkpoint,
            model_map,
            devices,
            pick_dtype(settings.dtype, devices[0]),
            device_map=settings.device_map,
            bits=settings.bits,
            trust_remote_code=settings.trust_remote_code,
        )
        if model_map is None:
            tokenizer.vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if settings.bits is None:
            pack_linears(module)
        return cls(module, tokenizer, model_map, settings)

    def answer(self, prompts: Sequence[Ids], max_new_tokens: int, **options: Any) -> list[Ids]:
        return answer(self, prompts, max_new_tokens, support=self.batch_support, copies=self.copies, **options)

    def forced(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], max_new_tokens: int, **options: Any
    ) -> Iterator[Forced]:
        """The predictions of the answers' tokens; see ``models.forced.forced``."""
        return forced(self, prompts, answers, max_new_tokens, support=self.batch_support, copies=self.copies, **options)

    # -- modules --------------------------------------------------------------------------------------------------

    @property
    def model_map(self) -> ModelMap:
        """The matrices by role; a model that was loaded unmapped has none."""
        if self._model_map is None:
            raise ValueError("the model was loaded without a map of its roles")
        return self._model_map

    def layer(self, index: int) -> nn.Module:
        return self._module_at(self.model_map.layers[index])

    def submodule(self, place: Place) -> nn.Module:
        """The module that owns the parameter of a matrix."""
        return self._module_at(place.module)

    def _module_at(self, path: str) -> nn.Module:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise ForgeError(
                f"the loaded {self.model_map.model_type} model has no module {path}",
                "report this with the model's name and the version of transformers",
            ) from None

    def device_of(self, module: nn.Module) -> torch.device:
        """The device that a module with weights computes on."""
        return self.device if len(self.devices) == 1 else next(module.parameters()).device

    @property
    def memory_available(self) -> int:
        """Bytes that can be allocated on the model's devices together, as much on each."""
        return len(self.devices) * min(map(memory_available, self.devices))

    @property
    def head(self) -> nn.Module | None:
        """The unembedding, or None."""
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        return head if isinstance(head, nn.Module) else None

    # -- running --------------------------------------------------------------------------------------------------

    def batches(self, prompts: Sequence[Ids]) -> Iterator[Batch]:
        """The batches of a pass over whole prompts."""
        most_tokens = self.batch_tokens
        if self.device.type == "cpu" and self.settings.batch_size == "auto" and not self.streams:
            value = next(self.module.parameters()).element_size()
            most_tokens = _CACHED_BYTES // value * torch.get_num_threads()
        return batches(
            prompts,
            self.batch_size,
            self.tokenizer.pad_id,
            self.device,
            most_tokens=most_tokens,
            pads=self.batch_support.pads,
        )

    def in_step(
        self,
        works: Sequence[Callable[[], None]],
        tokens: Sequence[int],
        journal: Journal | None = None,
        *,
        caches: bool = False,
    ) -> Iterator[int]:
        """Run functions that call the model. If it streams, they run side by side, so that weights are read once.

        Yields after each step, when results may be taken, the number of decoder layers that all functions have passed,
        as far as that is known; in the end the number of all layers, if the model has a map.

        Args:
            tokens: the number of tokens that each one runs.
            journal: keeps the states of a streamed pass, so that it goes on after an interruption.
            caches: whether each one holds keys and values of its tokens, so that fewer run side by side.
        """
        for number, work in enumerate(works, 1):
            work()
            done = number == len(works) and self._model_map is not None
            yield self.model_map.n_layers if done else 0

    def scoped(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that is called only for forward passes of the function of ``in_step`` that registers it."""
        return hook

    def journal(self, key: Mapping[str, Any]) -> Journal | None:
        """The journal of a pass whose results depend on ``key`` and on the model; None for a model in memory."""
        return None

    def require(self, place: Place) -> None:
        """Have the weights of a module in memory."""

    @contextmanager
    def reserving(self, held: int, working: int, purpose: str) -> Iterator[None]:
        """Inside, a model with a limit of memory leaves room for what its caller keeps.

        Args:
            held: bytes that are kept all along.
            working: bytes that are needed for a moment, while no batch runs.
            purpose: what they are for.

        Raises:
            ForgeError: the limit does not suffice.
        """
        yield

    @cached_property
    def batch_support(self) -> BatchSupport:
        """How prompts can be batched."""
        return batch_support(self)

    @torch.inference_mode()
    def run_to_layer(self, batch: Batch, deepest: int) -> None:
        """Run a batch up to layer ``deepest``, so that forward hooks see its activations."""

        def stop(*_: Any) -> None:
            raise StopForward

        handle = self.layer(deepest).register_forward_hook(self.scoped(stop))
        try:
            self.module(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        except StopForward:
            pass
        finally:
            handle.remove()

    def forward(self, *, keep: int | None = 1, **inputs: Any) -> Any:
        """Run the module's forward pass; it computes only the logits of the last ``keep`` positions if it can."""
        if keep is not None and self._slices_logits:
            inputs["logits_to_keep"] = keep
        return self.module(**inputs)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block the model runs its batches itself, whatever copies it has."""
        copies, self.copies = self.copies, None
        try:
            yield
        finally:
            self.copies = copies

    @torch.inference_mode()
    def loss(self, text: str) -> float:
        """Mean negative log-likelihood in nats of a text's tokens after the first, up to the maximum prompt length."""
        ids = torch.tensor([self.tokenizer.encode(text)[: self.tokenizer.positions]], device=self.device)
        logits = self.forward(keep=None, input_ids=ids).logits[0, :-1].float()
        return float(nn.functional.cross_entropy(logits, ids[0, 1:]))

    def retry_smaller(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` and return its result; if memory runs out, halve an automatic batch size and call it again.

        Raises:
            ForgeError: memory runs out with a batch size of one, or with the user's batch size.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.settings.batch_size != "auto" or self.batch_size == 1:
                    raise ForgeError(
                        f"a batch of {self.batch_size} does not fit the memory of {self.device}",
                        "lower --batch-size, or leave it out"
                        if self.batch_size > 1
                        else "use shorter prompts, a smaller model, or --load-in-8bit",
                    ) from None
            self.batch_size //= 2
            release_memory()


def _devices_of(module: nn.Module) -> tuple[torch.device, ...]:
    """The devices of a module's weights, that of its embedding first."""
    if len(set(getattr(module, "hf_device_map", {}).values())) < 2:
        return (next(module.parameters()).device,)
    first = module.get_input_embeddings().weight.device  # type: ignore[operator]
    return tuple(dict.fromkeys((first, *(parameter.device for parameter in module.parameters()))))


def load_tokenizer(checkpoint: Checkpoint, model_map: ModelMap | None, settings: LoadSettings) -> Tokenizer:
    """Load a checkpoint's tokenizer with the settings' system prompt and template arguments.

    Raises:
        ForgeError: the tokenizer cannot be read, or has no chat template (unless ``allow_base_model``).
    """
    tokenizer = Tokenizer.load(
        checkpoint.folder,
        system=settings.system,
        template_kwargs=settings.template_kwargs,
        vocabulary=None if model_map is None else model_map.vocabulary,
        positions=None if model_map is None else model_map.learned_positions,
        trust_remote_code=settings.trust_remote_code,
    )
    if not tokenizer.template.text and not settings.allow_base_model:
        raise ForgeError(
            f"{checkpoint.label} has no chat template: it looks like a base model, which has no refusals to find",
            "use its instruct or chat release, or pass --allow-base-model to prompt it with bare text",
        )
    return tokenizer


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """Parse ``--template-kwargs``, a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"--template-kwargs {text!r} is not a JSON object", """for example '{"enable_thinking": false}'"""
        )
    return value

"""Load a checkpoint into a transformers module, and check that memory suffices and that all weights are loaded."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ollama_forge.architectures.model_class import auto_class, has_text_class
from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.architectures.names.spelling import Spelling
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.model_types import needs_own_code
from ollama_forge.errors import ForgeError, MemoryTooSmall, error_line
from ollama_forge.files import human_size
from ollama_forge.models.decoded import decoded_tensors
from ollama_forge.models.device import is_out_of_memory, memory_available, require_bits
from ollama_forge.progress import say
from ollama_forge.quiet import quiet_transformers
from ollama_forge.system import available_memory, keep_few_kernels

_OVERHEAD = 1.1  # factor on the size of the weights, for the memory of the device's libraries
_KEPT_BY_BITSANDBYTES = (Role.EMBEDDING, Role.POSITION, Role.UNEMBEDDING)
_TRIAL_TOKENS = 4
_IN_FLIGHT = 4  # tensors that transformers holds in host memory at the same time


def load_module(
    checkpoint: Checkpoint,
    model_map: ModelMap | None,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    *,
    device_map: str | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
    without_weights: bool = False,
) -> nn.Module:
    """Load the weights in ``dtype``.

    Tensors are moved to a GPU one by one, so that host memory never holds the whole model.

    Args:
        model_map: the checkpoint's matrices by role; None for a model that is only run. Without a map, the text model
            is loaded alone if the whole one does not run on text, and tensors that it lacks are ignored with a note.
        devices: one device; several only with ``device_map``.
        device_map: how accelerate shares the layers among the devices.
        without_weights: leave what the checkpoint holds on the meta device, and all else on the CPU.
        bits: load with bitsandbytes in 8 or 4 bits; None: in ``dtype``.
        trust_remote_code: execute the model's own Python code if transformers has no class for the model.

    Raises:
        ForgeError: memory is too small, or weights are missing, damaged or of another shape than the config implies.
    """
    from transformers import AutoConfig

    keep_few_kernels()
    if bits is not None:
        _require_bits(checkpoint, devices[0], bits)
    if not without_weights:
        check_memory(checkpoint, model_map, devices, dtype, bits=bits)
    own_code = trust_remote_code and needs_own_code(checkpoint.config)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": own_code}

    def load(*, text_alone: bool) -> nn.Module:
        placement = {} if without_weights else _placement(devices, dtype, device_map, bits)
        with quiet_transformers():
            try:
                config = AutoConfig.from_pretrained(checkpoint.folder, **options)
                loader = _loader(
                    checkpoint, config, trust_remote_code=own_code, text_alone=text_alone, empty=without_weights
                )
                loaded: Any = loader(
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # _check_complete reports them by name
                    **options,
                    **placement,
                )
            except Exception as error:  # invalid configs and weights make transformers raise any exception
                raise _load_error(checkpoint, devices, error) from error
        module, info = loaded
        if "disk" in getattr(module, "hf_device_map", {}).values():
            raise _too_large(checkpoint, devices)
        _check_complete(checkpoint, model_map, module, info)
        if _is_tied_on_disk(checkpoint, module) if model_map is None else model_map.tied:
            _check_tied(checkpoint, module)
        return module  # type: ignore[no-any-return]

    text_alone = model_map is not None and model_map.text_alone
    module = load(text_alone=text_alone)
    if model_map is None and not own_code and has_text_class(checkpoint.config) and not _runs_on_text(module):
        del module
        text_alone, module = True, load(text_alone=True)
    if text_alone:
        say("note: the class of the whole model does not run on text; the text model is loaded alone")
    return module


@torch.inference_mode()
def _runs_on_text(module: nn.Module) -> bool:
    """Whether a forward pass over token ids alone works."""
    device = next(module.parameters()).device
    try:
        module.eval()(input_ids=torch.arange(2, 2 + _TRIAL_TOKENS, device=device)[None], use_cache=False)
    except Exception as error:  # a class that misses its other inputs raises any exception
        if is_out_of_memory(error):
            raise
        return False
    return True


def _loader(
    checkpoint: Checkpoint, config: Any, *, trust_remote_code: bool, text_alone: bool, empty: bool
) -> Callable[..., Any]:
    """The ``from_pretrained`` of the checkpoint, given its config and tensors; packed tensors are decoded.

    Args:
        empty: give it tensors of the meta device.
    """
    auto = auto_class(checkpoint.config, trust_remote_code=trust_remote_code, text_alone=text_alone)
    packed = bool(checkpoint.tensors.packed)
    if packed or checkpoint.has_stray_quantization_config:
        _forget_quantisation(config)
    if not packed and not empty:
        wrappers = dict.fromkeys(checkpoint.tensors.wrappers, "") or None
        return partial(auto.from_pretrained, checkpoint.folder, config=config, key_mapping=wrappers)
    with torch.device("meta"):
        skeleton = auto.from_config(config)  # only a model's own class takes tensors alone
    tensors = decoded_tensors(checkpoint.tensors, empty=empty)
    return partial(type(skeleton).from_pretrained, None, config=skeleton.config, state_dict=tensors)


def _forget_quantisation(config: Any) -> None:
    """Remove the ``quantization_config`` of a transformers config and of its text config."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config


def _placement(
    devices: Sequence[torch.device], dtype: torch.dtype, device_map: str | None, bits: int | None
) -> dict[str, Any]:
    placement: dict[str, Any] = {}
    if device_map is not None:  # nothing on the CPU or the disk, whose layers accelerate moves for every pass
        placement["device_map"] = device_map
        placement["max_memory"] = {device.index: int(memory_available(device) / _OVERHEAD) for device in devices}
    elif devices[0].type != "cpu" or bits is not None:
        placement["device_map"] = {"": devices[0]}
    if bits is not None:
        from transformers import BitsAndBytesConfig

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says for each product that the inputs are cast
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        options: dict[str, Any] = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, **nf4}
        placement["quantization_config"] = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
    return placement


def _require_bits(checkpoint: Checkpoint, device: torch.device, bits: int) -> None:
    require_bits(device, bits)
    found = checkpoint.quantisation
    if found is not None and not checkpoint.has_stray_quantization_config:
        raise ForgeError(
            f"bitsandbytes cannot load {checkpoint.label} in {bits} bits: the model is quantised with {found.method}",
            f"leave out --load-in-{bits}bit",
        )


def check_memory(
    checkpoint: Checkpoint,
    model_map: ModelMap | None,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    *,
    bits: int | None = None,
) -> None:
    """Check that the devices, and the host while it loads the weights, have enough free memory.

    Raises:
        ForgeError: memory is too small; the message gives the needed and the free size.
    """
    precision = str(dtype).removeprefix("torch.") if bits is None else f"{bits} bits"
    needed, free = memory_needed(checkpoint, model_map, dtype, bits=bits), sum(map(memory_available, devices))
    if needed > free:
        have = f"{devices[0]} has" if len(devices) == 1 else f"{_names(devices)} have"
        raise MemoryTooSmall(
            f"{checkpoint.label} in {precision} needs about {human_size(needed)}, but {have} {human_size(free)} free",
            _memory_hint(devices[0], dtype, bits),
        )
    if devices[0].type == "cpu":
        return
    staged = _IN_FLIGHT * _largest_tensor(checkpoint, model_map) * max(dtype.itemsize, 4)
    host = available_memory()
    if staged > host:
        raise MemoryTooSmall(
            f"loading {checkpoint.label} needs about {human_size(staged)} of host memory, "
            f"but {human_size(host)} are free",
            "end other programs, or use a smaller model",
        )


def memory_needed(
    checkpoint: Checkpoint, model_map: ModelMap | None, dtype: torch.dtype, *, bits: int | None = None
) -> int:
    """Bytes of memory that a whole model needs."""
    return int(_weight_bytes(checkpoint, model_map, dtype, bits) * _OVERHEAD)


def _largest_tensor(checkpoint: Checkpoint, model_map: ModelMap | None) -> int:
    """Number of values of the largest tensor on disk or in memory, where the experts of a layer may be one tensor."""
    sizes = Counter[tuple[str, str]]()
    if model_map is None:  # experts are numbered within a layer, which is numbered, too
        for name, shape in checkpoint.tensors.shapes.items():
            experts = re.match(r".*\.\d+\..*(?=\.\d+\.)", name)
            if experts:
                sizes[experts[0], ""] += math.prod(shape)
    for matrix in model_map.matrices if model_map is not None else ():
        if matrix.place.expert is not None:
            sizes[matrix.place.module, matrix.place.parameter] += math.prod(matrix.shape)
    return max(*sizes.values(), *map(math.prod, checkpoint.tensors.shapes.values()), 0)


def _weight_bytes(checkpoint: Checkpoint, model_map: ModelMap | None, dtype: torch.dtype, bits: int | None) -> float:
    if bits is None:
        return checkpoint.parameters * dtype.itemsize
    whole = _kept_whole(checkpoint, model_map)
    return (checkpoint.parameters - whole) * bits / 8 + whole * dtype.itemsize


def _kept_whole(checkpoint: Checkpoint, model_map: ModelMap | None) -> int:
    """Number of values that bitsandbytes does not round: embeddings, the unembedding and all that is no linear module.

    Without a map, matrices with a row for each token and whatever is no matrix are taken for those.
    """
    if model_map is None:
        vocabulary = (checkpoint.config.get("text_config") or checkpoint.config).get("vocab_size")
        shapes = checkpoint.tensors.shapes.values()
        return sum(math.prod(shape) for shape in shapes if len(shape) != 2 or shape[0] == vocabulary)
    return sum(
        math.prod(matrix.shape)
        for matrix in model_map.matrices
        if matrix.role in _KEPT_BY_BITSANDBYTES or not matrix.place.linear
    )


def _memory_hint(device: torch.device, dtype: torch.dtype, bits: int | None) -> str:
    options = [] if dtype.itemsize <= 2 or bits is not None else ["--dtype bfloat16"]
    options += (
        ["--load-in-8bit or --load-in-4bit to compute the direction"] if device.type == "cuda" and bits is None else []
    )
    options += ["--device-map auto"] if device.type == "cuda" and torch.cuda.device_count() > 1 else []
    options += ["--device cpu"] if device.type != "cpu" and bits is None else []
    return "use " + ", or ".join([*options, "a smaller model"])


def _load_error(checkpoint: Checkpoint, devices: Sequence[torch.device], error: Exception) -> ForgeError:
    if is_out_of_memory(error):
        return _too_large(checkpoint, devices)
    if isinstance(error, ImportError):
        return ForgeError(
            f"{checkpoint.label} cannot be loaded without another package: {error_line(error)}", "install that package"
        )
    return ForgeError(
        f"{checkpoint.label} cannot be loaded: {error_line(error)}",
        "check that config.json belongs to the weights, or download or save the model again",
    )


def _too_large(checkpoint: Checkpoint, devices: Sequence[torch.device]) -> ForgeError:
    return MemoryTooSmall(
        f"{checkpoint.label} does not fit the memory of {_names(devices)}", "use --device cpu, or a smaller model"
    )


def _names(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))


def _check_complete(checkpoint: Checkpoint, model_map: ModelMap | None, module: Any, info: Mapping[str, Any]) -> None:
    """Raise ForgeError if transformers initialised missing weights, or ignored stored ones that the map knows."""
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ForgeError(
            f"{checkpoint.label}: {name} is stored as {tuple(stored)}, but its config implies {tuple(expected)}"
            + _and_more(mismatched),
            "config.json and the weights are of different models: download or save the model again",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ForgeError(
            f"{checkpoint.label} is incomplete: {missing[0]} is missing{_and_more(missing)}",
            "download or save the model again",
        )
    if model_map is None:
        ignored = sorted(info["unexpected_keys"])
        if ignored:
            say(f"note: the class of {checkpoint.label} has no weight {ignored[0]}{_and_more(ignored)}, and ignores it")
        return
    unknown = sorted(
        key for key in info["unexpected_keys"] if not any(_same_but_prefix(key, name) for name in model_map.unused)
    )
    if unknown:  # layers beyond the depth are named as transformers fuses their experts
        spelled = Spelling(module).read(checkpoint.tensors.shapes)
        known = {target for name in model_map.unused for target in spelled[name].targets}
        unknown = [key for key in unknown if key not in known]
    if unknown:
        raise ForgeError(
            f"{checkpoint.label}: the model of its config has no weight {unknown[0]}{_and_more(unknown)}",
            "config.json and the weights are of different models: download or save the model again",
        )


def _same_but_prefix(key: str, name: str) -> bool:
    """Whether two names are equal or differ only in a prefix."""
    return key == name or key.endswith(f".{name}") or name.endswith(f".{key}")


def _and_more(names: Collection[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _is_tied_on_disk(checkpoint: Checkpoint, module: Any) -> bool:
    """Whether the config ties the head to the embedding, and the checkpoint stores no head."""
    head = getattr(module.get_output_embeddings(), "weight", None)
    named = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    if head is None or not getattr(module.config.get_text_config(), "tie_word_embeddings", False):
        return False
    return not any(_same_but_prefix(name, named.get(id(head), "")) for name in checkpoint.tensors.shapes)


def _check_tied(checkpoint: Checkpoint, module: Any) -> None:
    """Tie the head to the embedding if it is not tied yet."""
    if _is_tied(module):
        return
    module.tie_weights()
    if not _is_tied(module):
        raise ForgeError(
            f"{checkpoint.label} stores no head, and transformers cannot tie it to the embedding",
            "save the model with an untied head, or report this with its name and the version of transformers",
        )
    say("note: the checkpoint stores no unembedding; it is tied to the embedding, as its config says")


def _is_tied(module: Any) -> bool:
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    return head is not None and head.weight is embedding.weight

"""A twin: a tiny random model of the class that loads a checkpoint, built from the checkpoint's own config."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ollama_forge.architectures.model_class import ModelClass, auto_class
from ollama_forge.architectures.twin.shrink import (
    Scale,
    expert_count,
    free_sizes,
    layer_kinds,
    replaced,
    scales,
    shrink,
    token_ids,
    without_ignored,
)
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.quiet import quiet_transformers

T = TypeVar("T")

_SECONDS = 30.0  # of the processor: on a busy machine no model is refused for that
_PARAMETERS = 25_000_000  # 100 MB: what experiments copy stays under 500 MB
_DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
_FAILURES = 4  # of complete small models at one scale, before the next scale is tried
_SPREADS = 8
_BATCH, _TOKENS, _FEW_TOKENS = 2, 32, 13
_LAST_TOKEN = 200
_NOISE = 0.2  # deviation of gains from 1 and of biases from 0
_SMALL_NOISE = 0.01  # for biases that decide which experts run: a larger one would leave some of them out


@dataclass(frozen=True)
class Twin:
    """A twin.

    Attributes:
        model: the float32 module in eval mode, with random weights.
        config: the content of its config.json.
        inputs: keyword arguments of a forward pass over ``[batch, tokens]`` token ids, without a cache.
        text_alone: the config names a wrapper that does not run on text; the model is the causal LM of its type.
    """

    model: nn.Module
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    text_alone: bool = False

    def run(self) -> Tensor:
        """The logits ``[batch, tokens, vocabulary]`` of a forward pass, float32."""
        with torch.inference_mode(), _quiet():
            out = self.model(**self.inputs)
        return out.logits if hasattr(out, "logits") else out[0]  # type: ignore[no-any-return]


def build_twin(
    config: Mapping[str, Any], *, folder: Path | None = None, trust_remote_code: bool = False, seed: int = 0
) -> Twin:
    """Build the twin of the checkpoint with this config.json.

    Every kind of layer of the full depth is in it, once or more. If the wrapper that the config names does not run on
    text, but the type's causal LM does, it is a twin of that one. The global random state is left as it is.

    Args:
        config: the content of config.json.
        folder: the checkpoint's folder, for a model with Python code of its own.
        trust_remote_code: whether that code may be executed.
        seed: seed of the weights and of the token ids.

    Raises:
        ForgeError: the class is unknown to transformers, or no small model of it runs.
    """
    with _quiet(), _own_random_state(seed), _offline():
        search = _Search(config, ModelClass(config, folder, trust_remote_code=trust_remote_code), seed)
        return search.spread(search.first())


def save_twin(twin: Twin, folder: Path) -> None:
    """Write a twin as a checkpoint folder: ``save_pretrained`` in one file, with its config.json."""
    model: Any = twin.model
    with _quiet(), _offline():
        model.save_pretrained(folder, max_shard_size="100GB")
    if twin.config.get("model_type") != model.config.model_type:
        (folder / "config.json").write_text(json.dumps(twin.config, default=str), encoding="utf-8")


@dataclass(frozen=True)
class _Candidate:
    """A small config and the twin that was built from it."""

    config: dict[str, Any]
    twin: Twin

    @property
    def likeness(self) -> tuple[int, int]:
        """The number of matrices with two axes of one size, and minus the number of different sizes."""
        shapes = [[size for size in p.shape if size > 1] for p in self.twin.model.parameters()]
        return sum(len(set(shape)) < len(shape) for shape in shapes), -len({size for s in shapes for size in s})


def _new_sizes(found: _Candidate) -> dict[tuple[str, ...], int]:
    """For each size of the config that equals another one, or divides the stream's width, a size of its own."""
    free = free_sizes(found.config)
    embedding: Any = found.twin.model.get_input_embeddings()  # type: ignore[operator]
    width = embedding.weight.shape[-1]
    used = {size for parameter in found.twin.model.parameters() for size in parameter.shape}
    used |= {value for _, value in free}
    counts = Counter([width, *(value for _, value in free)])
    new: dict[tuple[str, ...], int] = {}
    for path, value in free:
        if counts[value] > 1 or width % value == 0:
            size = next(size for size in range(value + 2, 4 * value + 100, 2) if size not in used)
            used.add(size)
            new[path] = size
    return new


class _Search:
    """Looks for a small config whose model runs, and counts the reasons why others did not."""

    def __init__(self, config: Mapping[str, Any], model_class: ModelClass, seed: int) -> None:
        self.full = without_ignored(model_class.complete(without_ignored(config)))
        self.model_class, self.seed = model_class, seed
        self.deadline = time.thread_time() + _SECONDS
        self.reasons: Counter[str] = Counter()

    def first(self) -> _Candidate:
        """The first scale at which a model with every kind of layer runs, else the one that lacks the fewest."""
        for divisor, heads, experts in scales(self.full):
            scale = Scale(divisor, heads, experts)
            whole = self.attempt(lambda scale=scale: self.kinds(scale, None))  # type: ignore[misc]
            if whole is None:
                continue
            for config in islice(self.cut(scale, whole), _FAILURES):
                found = self.attempt(lambda config=config: self.candidate(config))  # type: ignore[misc]
                if found is not None:
                    return found
        raise self.failure()

    def cut(self, scale: Scale, whole: set[object]) -> Iterator[dict[str, Any]]:
        """Small configs that lack no kind of layer, the shallowest first; then those that lack the fewest kinds."""
        partial: list[tuple[int, dict[str, Any]]] = []
        for depth in _DEPTHS:
            for proportional, first_layer in ((False, 0), (True, 0), (False, 1)):
                choice = Scale(scale.divisor, scale.heads, scale.experts, proportional, first_layer)
                kinds = self.attempt(lambda choice=choice, depth=depth: self.kinds(choice, depth))  # type: ignore[misc]
                if kinds is None:
                    continue
                config = shrink(self.full, choice, depth)
                if missing := len(whole - kinds):
                    partial.append((missing, config))
                else:
                    yield config
        yield from (config for _, config in sorted(partial, key=lambda entry: entry[0]))

    def kinds(self, scale: Scale, depth: int | None) -> set[object]:
        config = shrink(self.full, scale, depth)
        model = self.model_class.build(config, "meta")
        if depth is not None:
            _check_size(model)
        return _block_kinds(model) | layer_kinds(config)

    def candidate(self, config: dict[str, Any]) -> _Candidate:
        """Build, fill and run. A causal LM that runs takes the place of a wrapper that does not."""
        twin = self.filled(self.model_class, config)
        try:
            _check_runs(twin)
        except Exception:
            text_class = self.model_class.text_class()
            if text_class is None:
                raise
            twin = self.filled(text_class, config)
            _check_runs(twin)
            self.model_class = text_class
        _check_saves(twin.model)
        return _Candidate(config, twin)

    def filled(self, model_class: ModelClass, config: dict[str, Any]) -> Twin:
        """A twin that has not run yet."""
        _check_size(model_class.build(config, "meta"))
        with _marked_uninitialised():
            model = model_class.build(config, "cpu")
        _fill(model, self.seed)
        _fill_choices(model, expert_count(config), self.seed)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        inputs = {"input_ids": _tokens(config, vocabulary, self.seed), "use_cache": False}
        return Twin(model, _config_of(model, config), inputs, model_class.text_alone)

    def spread(self, found: _Candidate) -> Twin:
        """The twin, with sizes as pairwise different as a few tries can make them."""
        changes = [_new_sizes(found)]
        for _ in range(_SPREADS):
            if not changes:
                break
            some = changes.pop(0)
            config = found.config
            for path, size in some.items():
                config = replaced(config, path, size)
            other = self.attempt(lambda config=config: self.candidate(config)) if some else None  # type: ignore[misc]
            if other is not None and other.likeness < found.likeness:
                found = other
            elif len(some) > 1:
                items, half = list(some.items()), len(some) // 2
                changes += [dict(items[:half]), dict(items[half:])]
        return found.twin

    def attempt(self, build: Callable[[], T]) -> T | None:
        """The result, or None if the model cannot be built or run. After the time limit, nothing is tried."""
        if time.thread_time() > self.deadline:
            self.reasons[f"no model of its class runs in {_SECONDS:.0f} seconds"] += 1
            return None
        try:
            return build()
        except Exception as error:  # a config that does not fit its class makes it raise any exception
            cause = error
            while isinstance(cause.__cause__, Exception):
                cause = cause.__cause__
            self.reasons[error_line(cause)] += 1
            if isinstance(cause, ImportError):
                raise self.failure("install that package") from error
            return None

    def failure(self, hint: str = "check that config.json is the model's own, and complete") -> ForgeError:
        reason = self.reasons.most_common(1)[0][0]
        return ForgeError(f"no small model of the class of {self.model_class.model_type!r} runs: {reason}", hint)


def _config_of(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The model's own config; that of its wrapper if no class is known for its own."""
    own: dict[str, Any] = model.config.to_dict()
    try:
        auto_class(own)
    except ForgeError:
        return {**config, "architectures": [type(model).__name__]}
    return own


def _check_runs(twin: Twin) -> None:
    """Run a twin, also on a text of another length: sizes may fit one by chance."""
    for inputs in (twin.inputs, {**twin.inputs, "input_ids": twin.inputs["input_ids"][:1, :_FEW_TOKENS]}):
        if not torch.isfinite(replace(twin, inputs=inputs).run()).all():
            raise ValueError("its logits are not finite")


def _check_saves(model: Any) -> None:
    """Rename, split and fuse the weights as ``save_pretrained`` does; some classes can do it for some sizes alone."""
    from transformers.core_model_loading import revert_weight_conversion

    revert_weight_conversion(model, model.state_dict())


def _check_size(model: nn.Module) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _PARAMETERS:
        raise ValueError(f"the smallest model has {count:,} parameters, over the limit of {_PARAMETERS:,}")


def _block_kinds(model: nn.Module) -> set[object]:
    """The kinds of blocks: types of modules, and names and shapes of parameters of each element of each list."""
    return {
        (
            tuple((name, type(module)) for name, module in block.named_modules()),
            tuple((name, parameter.shape) for name, parameter in block.named_parameters()),
        )
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1
        for block in blocks
        if next(block.parameters(), None) is not None
    }


def _fill(model: nn.Module, seed: int) -> None:
    """Draw all weights: matrices that keep the length of vectors, vectors and scalars around their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            if sum(size > 1 for size in parameter.shape) > 1:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
                continue
            start = parameter.nan_to_num(1.0)
            if parameter.numel() == 1:
                start = torch.where(start == 0, torch.ones_like(start), start)  # a gate that is closed
            parameter.copy_(start + drawn * (_NOISE if parameter.requires_grad else _SMALL_NOISE))


def _fill_choices(model: nn.Module, experts: int, seed: int) -> None:
    """Draw the tables of whole numbers ``[vocabulary, n]`` that choose experts by token id: classes leave zeros."""
    generator = torch.Generator().manual_seed(seed)
    for table in model.state_dict().values():
        if table.dtype == torch.long and table.dim() == 2 and not table.any():
            first = torch.randint(experts, (len(table), 1), generator=generator)
            table.copy_((first + torch.arange(table.shape[1])) % experts)


def _tokens(config: Mapping[str, Any], vocabulary: int, seed: int) -> Tensor:
    """Random token ids ``[batch, tokens]``, none of them special."""
    special = token_ids(config)
    plain = torch.tensor([index for index in range(min(vocabulary, _LAST_TOKEN)) if index not in special])
    generator = torch.Generator().manual_seed(seed + 1)
    return plain[torch.randint(len(plain), (_BATCH, _TOKENS), generator=generator)]


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Inside the block, the global generator starts from ``seed``; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _marked_uninitialised() -> Iterator[None]:
    """Inside the block, memory that no class initialises holds NaN instead of whatever was there."""
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


@contextmanager
def _offline() -> Iterator[None]:
    """Inside the block, the Hub is not asked."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

"""A chat model whose decoder layers are read from disk, one after the other, for all prompts at once.

That streaming computes what the whole model computes is tried on a twin of the model, not known from a list of types.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn

from ollama_forge.architectures.learn import learn
from ollama_forge.architectures.learned import LearnedArchitecture
from ollama_forge.architectures.model_map import ModelMap, Place, Role
from ollama_forge.architectures.names.bind import bind_checkpoint, locate_parameters
from ollama_forge.architectures.twin.build import Twin, build_twin, save_twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.files import human_size
from ollama_forge.models.batch_support import BatchSupport, batch_support
from ollama_forge.models.chat_model import LOGITS_BYTES, ChatModel, LoadSettings, load_tokenizer
from ollama_forge.models.device import memory_available, pick_device, pick_dtype
from ollama_forge.models.journal import Journal, passes_folder
from ollama_forge.models.loading import load_module
from ollama_forge.models.lockstep import Lockstep
from ollama_forge.models.stages import SMALL, StagedWeights, WeightReader
from ollama_forge.progress import say, status
from ollama_forge.system import free_space, keep_no_freed_blocks, versions

_SAME = 1e-4  # largest difference from the whole twin, as a share of its largest logit; measured: 0
_PACKAGES = ("ollama-forge", "torch", "transformers")
_WIDE, _NARROW = 4, 12  # values of a token that a layer holds as it runs: as wide as its widest matrix, as the stream
_RUNNING = 128 << 20  # bytes that libraries take once they run: kernels, buffers of MKL, threads; measured: 68 MiB
_HINT = "use a machine with more memory, --dtype bfloat16, or a smaller model"


@dataclass(frozen=True)
class Streaming:
    """What a twin shows of streaming an architecture.

    Attributes:
        support: how prompts can be batched.
        resumes: whether an interrupted pass can go on at its layer.
        spills: whether keys and values can be in files.
        takes_inputs: see ``Lockstep``.
    """

    support: BatchSupport
    resumes: bool
    spills: bool
    takes_inputs: bool


class StreamedModel(ChatModel):
    """A chat model with one decoder layer in memory at a time; see ``load_streamed``.

    What the weights leave of the memory is divided between the batch that runs and the states of those that wait.

    Args:
        label: name of the checkpoint, for messages.
        memory: bytes that weights, batches and states may take.

    Raises:
        ForgeError: its largest layer does not fit into ``memory``.
    """

    streams: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        parts: tuple[Any, ModelMap, LoadSettings],
        weights: StagedWeights,
        streaming: Streaming,
        checkpoint: Checkpoint,
        memory: int,
    ) -> None:
        super().__init__(module, *parts)
        self.weights, self._streaming, self._fingerprint = weights, streaming, checkpoint.fingerprint
        self._label, self._memory = checkpoint.label, memory
        self._lockstep = Lockstep(weights, 0, passes_folder())
        self._lockstep.takes_inputs = streaming.takes_inputs
        self.__dict__["batch_support"] = streaming.support
        self._divide()

    def limit(self, memory: int) -> None:
        """Set the bytes that weights, batches and states may take.

        Raises:
            ForgeError: its largest layer does not fit into ``memory``.
        """
        self._memory = memory
        self._divide()

    @contextmanager
    def reserving(self, held: int, working: int, purpose: str) -> Iterator[None]:
        self._divide(held, working, f", and for {purpose}")
        try:
            yield
        finally:
            self._divide()

    def _divide(self, held: int = 0, working: int = 0, purpose: str = "") -> None:
        """Divide the memory; see ``ChatModel.reserving``."""
        self.weights.ahead = True
        both = self.weights.resident
        self.weights.ahead = both <= self._memory // 2 and both + held + working <= self._memory
        left = self._memory - self.weights.resident - held
        if left < working:
            needed = self.weights.resident + held + working
            raise ForgeError(
                f"streaming {self._label} needs about {human_size(needed)} for its largest layer{purpose}, "
                f"but {human_size(self._memory)} may be used",
                _HINT
                if self.settings.memory == "free"
                else f"give --memory {human_size(_used() + _RUNNING + needed)} or more",
            )
        batch = max(left // 2, working)
        self._lockstep.room = left - batch
        self.logits_bytes = min(LOGITS_BYTES, batch // 2)
        if self.settings.batch_size == "auto":
            self.batch_tokens = _power_of_two(max(batch - self._largest_matrix, 0) // self._bytes_a_token)

    @property
    def _largest_matrix(self) -> int:
        """Bytes of the largest matrix of a layer, which a product may copy in another order."""
        sizes = (math.prod(m.shape[-2:]) for m in self.model_map.matrices if m.layer is not None)
        return max(sizes, default=0) * next(self.module.parameters()).element_size()

    @property
    def _bytes_a_token(self) -> int:
        """Bytes that a layer takes for a token while it runs."""
        layers = [m for m in self.model_map.matrices if m.layer is not None]
        widest = max((max(m.shape[-2:]) for m in layers), default=self.model_map.d_model)
        size = next(self.module.parameters()).element_size()
        return _WIDE * size * widest + _NARROW * size * self.model_map.d_model

    @property
    def loads(self) -> int:  # type: ignore[override]
        return self.weights.loads

    def in_step(
        self,
        works: Sequence[Callable[[], None]],
        tokens: Sequence[int],
        journal: Journal | None = None,
        *,
        caches: bool = False,
    ) -> Iterator[int]:
        waves = [slice(None)]
        if caches and self._streaming.spills and self.device.type == "cpu":
            self._ask(sum(tokens) * self._cached_bytes)
        elif caches:
            waves = list(_waves(tokens, self._lockstep.room // self._cached_bytes))
        for wave in waves:
            for passed in self._lockstep.run(works[wave], tokens[wave], journal, caches=caches):
                yield passed if wave is waves[-1] else 0

    def _ask(self, needed: int) -> None:
        """Ask for room on the disk for keys and values that exceed the memory."""
        spilled, folder = needed - self._lockstep.room // 2, self._lockstep.folder
        if spilled > (free := free_space(folder)):
            raise ForgeError(
                f"the keys and values of the prompts take {human_size(needed)}: {human_size(needed - spilled)} fit "
                f"into memory, and {human_size(free)} are free at {folder}",
                "free disk space, set OLLAMA_FORGE_CACHE to a folder on another disk, or give fewer prompts",
            )

    @property
    def _cached_bytes(self) -> int:
        """Bytes of the keys and values of a token in all layers, or more."""
        found = [m for m in self.model_map.matrices if m.role in (Role.K, Role.V)]
        plain = len({matrix.layer for matrix in found}) == self.model_map.n_layers
        width = sum(m.out_features for m in found) if plain else 4 * self.model_map.d_model * self.model_map.n_layers
        return width * next(self.module.parameters()).element_size()

    def scoped(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return self._lockstep.scoped(hook)

    def journal(self, key: Mapping[str, Any]) -> Journal | None:
        if not self._streaming.resumes:
            return None
        batch = [self.batch_size, self.batch_tokens]
        of_model = {"model": self._fingerprint, "load": self.settings.outcome, "batch": batch}
        found = Journal.of({**of_model, "versions": versions(_PACKAGES), **key})
        if found.layer:
            say(f"note: an interrupted pass goes on at layer {found.layer + 1} of {self.model_map.n_layers}")
        return found

    def require(self, place: Place) -> None:
        self.weights.load(self.weights.stage_of(place.module))


def _waves(tokens: Sequence[int], room: int) -> Iterator[slice]:
    """Parts of a list of functions whose tokens together fit ``room``; at least one function in each."""
    start, total = 0, 0
    for place, count in enumerate(tokens):
        if place > start and total + count > room:
            yield slice(start, place)
            start, total = place, 0
        total += count
    yield slice(start, len(tokens))


def load_streamed(checkpoint: Checkpoint, settings: LoadSettings, model_map: ModelMap, memory: int) -> StreamedModel:
    """Build a model that reads its weights from disk layer by layer.

    Args:
        memory: bytes that weights, batches and states may take.

    Raises:
        ForgeError: the architecture cannot be streamed, or its largest layer does not fit into ``memory``.
    """
    keep_no_freed_blocks()  # each pass is a thread
    tokenizer = load_tokenizer(checkpoint, model_map, settings)
    device = pick_device(settings.device)
    trust = settings.trust_remote_code
    with status(f"trying to stream a {model_map.model_type} model"):
        streaming = try_streaming(checkpoint.config, checkpoint.folder, trust_remote_code=trust)
    learned = learn(checkpoint.config, checkpoint.folder, trust_remote_code=trust)
    module, weights = staged_module(
        checkpoint, learned, model_map, device, pick_dtype(settings.dtype, device), trust_remote_code=trust
    )
    return StreamedModel(module, (tokenizer, model_map, settings), weights, streaming, checkpoint, memory)


def staged_module(
    checkpoint: Checkpoint,
    learned: LearnedArchitecture,
    model_map: ModelMap,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    small: int = SMALL,
) -> tuple[nn.Module, StagedWeights]:
    """A model without weights, and the stages that put them in.

    Args:
        small: bytes of a module outside the layers below which it stays in memory.

    Raises:
        ForgeError: a parameter is stored in an order that no few boxes express.
    """
    module = load_module(
        checkpoint, model_map, (device,), dtype, trust_remote_code=trust_remote_code, without_weights=True
    )
    boxes = locate_parameters(learned, checkpoint, trust_remote_code=trust_remote_code)
    weights = StagedWeights(module, model_map.layers, WeightReader(checkpoint.tensors, boxes), device, small=small)
    lost = [name for name in weights.names if name not in boxes]
    if lost:
        raise ForgeError(f"{lost[0]} is stored in an order that streaming does not read", _HINT)
    return module, weights


def memory_bound(settings: LoadSettings) -> int:
    """Bytes that a model may take: the setting less what this process takes already, or what is free.

    Raises:
        ForgeError: the setting is less than what this process takes already.
    """
    device = pick_device(settings.device)
    free = memory_available(device)
    if settings.memory is None or settings.memory == "free":
        return free
    used = _used() + _RUNNING if device.type == "cpu" else 0
    if settings.memory <= used:
        raise ForgeError(
            f"--memory {human_size(settings.memory)} is less than the program takes without a model, "
            f"{human_size(used)}",
            "give more; `abliterate plan --model M` tells how much a model needs",
        )
    return min(settings.memory - used, free)


def _used() -> int:
    """Bytes that this process takes."""
    return int(psutil.Process().memory_info().rss)


def _power_of_two(count: int) -> int:
    """The largest one up to ``count``, so that batches rarely change with what else the process holds."""
    return 1 << max(count.bit_length() - 1, 0)


# -- the trial on a twin ------------------------------------------------------------------------------------------


@dataclass
class _TwinModel:
    """The part of a chat model that ``batch_support`` uses, with token ids in place of a tokenizer's."""

    module: nn.Module
    ids: list[int]
    batch_size: int = 2
    batch_tokens: int | None = None
    logits_bytes: int = LOGITS_BYTES
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pad_id: int = 0

    @property
    def tokenizer(self) -> Any:
        return self

    def encode(self, text: str) -> list[int]:
        return self.ids

    def forward(self, *, keep: int | None = 1, **inputs: Any) -> Any:
        return self.module(**inputs)

    def in_step(
        self, works: Sequence[Callable[[], None]], tokens: Sequence[int], *, caches: bool = False
    ) -> Iterator[int]:
        for work in works:
            work()
            yield 0

    def retry_smaller(self, work: Callable[[], Any]) -> Any:
        return work()


def try_streaming(
    config: Mapping[str, Any], folder: Path | None = None, *, trust_remote_code: bool = False
) -> Streaming:
    """Run a twin whole and streamed, with an interruption too.

    Raises:
        ForgeError: the architecture cannot be streamed.
    """
    twin = build_twin(config, folder=folder, trust_remote_code=trust_remote_code)
    learned = learn(config, folder, trust_remote_code=trust_remote_code)
    expected = twin.run()
    scale = float(expected.abs().max())
    with tempfile.TemporaryDirectory() as place:
        try:
            streamed = _StreamedTwin(twin, learned, Path(place), trust_remote_code=trust_remote_code)
            for takes in (True, False):
                streamed.lockstep.takes_inputs = takes
                same = float((streamed.run(None)[-1] - expected).abs().max()) <= _SAME * scale
                if same:
                    break
        except ForgeError:
            raise
        except Exception as error:  # the code of a model may do anything with weights that are not there
            raise ForgeError(f"this architecture cannot be streamed: {error_line(error)}", _HINT) from error
        if not same:
            raise ForgeError("this architecture cannot be streamed: its twin computes something else", _HINT)
        try:
            resumed = streamed.run_interrupted(Path(place) / "journal")[-1]
            resumes = float((resumed - expected).abs().max()) <= _SAME * scale
        except Exception:  # likewise; such a pass begins anew
            resumes = False
        support = _support(twin, twin.model)
        spills = support.caches and streamed.support_with_caches(twin) == support
    return Streaming(support, resumes, spills, takes)


def _support(twin: Twin, module: nn.Module) -> BatchSupport:
    ids = twin.inputs["input_ids"][0].tolist()
    return batch_support(_TwinModel(module, ids))


class _StreamedTwin:
    def __init__(self, twin: Twin, learned: LearnedArchitecture, folder: Path, *, trust_remote_code: bool) -> None:
        save_twin(twin, folder)
        if trust_remote_code:
            _copy_code(twin, folder)
        checkpoint = Checkpoint(folder, "the twin", "folder")
        self.model_map = bind_checkpoint(learned, checkpoint, trust_remote_code=trust_remote_code)
        cpu = torch.device("cpu")
        self.module, self.weights = staged_module(
            checkpoint, learned, self.model_map, cpu, torch.float32, trust_remote_code=trust_remote_code, small=1
        )
        self.module.eval()
        self.inputs, self.folder = twin.inputs, folder
        self.lockstep = Lockstep(self.weights, 0, folder)

    def run(self, journal: Journal | None, *, stop_at: int | None = None) -> list[Tensor]:
        """The logits of two equal passes; with ``stop_at`` none, as they end after so many layers."""
        found: list[Tensor] = []

        def work() -> None:
            out = self.module(**self.inputs)
            found.append(out.logits if hasattr(out, "logits") else out[0])

        with torch.inference_mode():
            for passed in self.lockstep.run([work] * 2, [self.inputs["input_ids"].numel()] * 2, journal):
                if stop_at is not None and passed > stop_at:
                    break
        return found

    def support_with_caches(self, twin: Twin) -> BatchSupport | None:
        """How prompts can be batched if keys and values are in files; None if they cannot be."""
        found: list[BatchSupport] = []
        with suppress(Exception), torch.inference_mode():
            for _ in self.lockstep.run([lambda: found.append(_support(twin, self.module))], [1], caches=True):
                pass
        return found[0] if found and self.lockstep.adopted else None

    def run_interrupted(self, folder: Path) -> list[Tensor]:
        journal = Journal(folder)
        middle = max(1, self.model_map.n_layers // 2)
        self.lockstep.share_of_reading = 0
        self.run(journal, stop_at=middle)
        found = Journal(folder)
        if found.layer != middle:
            raise ForgeError("the states of a pass are not kept", _HINT)
        return self.run(found)


def _copy_code(twin: Twin, folder: Path) -> None:
    """Give a saved twin the Python files of its own class."""
    import inspect
    import shutil

    for path in Path(inspect.getfile(type(twin.model))).parent.glob("*.py"):
        shutil.copy(path, folder)

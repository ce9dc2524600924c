"""Which engine runs a model: llama.cpp, if there is a GGUF file, it agrees with transformers, and it is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.digest import file_sha256
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.tokens import check_tokens
from ollama_forge.export.adapters.changes import low_rank_changes
from ollama_forge.export.adapters.gguf import gguf_factors, write_gguf_adapter
from ollama_forge.files import read_json, sha256_json, write_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import devices_for, memory_available, pick_device, pick_dtype
from ollama_forge.models.gguf_model import TOKENIZING_CONTEXT, llama_server, llamacpp_is_installed
from ollama_forge.models.servers.token_server import RemoteModel
from ollama_forge.models.servers.vllm_process import VllmSettings, vllm_server
from ollama_forge.names import gguf_files
from ollama_forge.progress import status
from ollama_forge.serving.engine.base import Engine, EngineSettings
from ollama_forge.sources.gguf import gguf_checkpoint_of
from ollama_forge.system import cache_root, usable_threads, versions
from ollama_forge.text.tokenizer import Ids, Tokenizer

if TYPE_CHECKING:
    from ollama_forge.serving.engine.llamacpp import LlamaCppEngine

LEAST_AGREEMENT = 0.95
_TOKENS = 32  # of each answer that is compared
_TIMED = 2  # answers whose time counts
_PROMPTS = (
    "Name three colours.",
    "What is the capital of France?",
    "Write a sentence about a boat in the harbour.",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Count from one to twelve.",
    "Write a function in Python that adds two numbers.",
)


@dataclass(frozen=True)
class Comparison:
    """A GGUF file under llama.cpp, compared with the model under transformers.

    Attributes:
        texts, differing: number of texts that were tokenized by both, and of those with other tokens.
        tokens: number of llama.cpp's greedy tokens that were forced on transformers.
        agreeing: number of those that transformers finds likeliest, too.
        llamacpp_rate, transformers_rate: tokens per second of one answer at a time; 0: not compared.
    """

    texts: int
    differing: int
    tokens: int = 0
    agreeing: int = 0
    llamacpp_rate: float = 0.0
    transformers_rate: float = 0.0

    @property
    def verdict(self) -> tuple[bool, str]:
        """Whether llama.cpp is to run the model, and why."""
        if self.differing:
            return False, f"llama.cpp splits {self.differing} of {self.texts} texts into other tokens"
        if not self.transformers_rate:
            return True, "transformers would not fit the memory, so their tokens are not compared"
        if not self.tokens:
            return False, "llama.cpp ends every answer at once"
        share = self.agreeing / self.tokens
        if share < LEAST_AGREEMENT:
            return False, f"llama.cpp agrees on {share:.0%} of {self.tokens} tokens only"
        faster = self.llamacpp_rate > self.transformers_rate
        first, second = (self.llamacpp_rate, self.transformers_rate)[:: 1 if faster else -1]
        other = "transformers" if faster else "llama.cpp"
        agree = f"they agree on {share:.0%} of {self.tokens} tokens"
        return faster, f"{first:.0f} tokens/s for one answer, {other} {second:.0f}; {agree}"


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that runs a model.

    Attributes:
        checkpoint: what the engine runs: the checkpoint that was asked for, or its GGUF file.
        reason: which engine it is and why, in one line.
    """

    engine: Engine
    checkpoint: Checkpoint
    reason: str


def load_engine(
    checkpoint: Checkpoint, load: LoadSettings, settings: EngineSettings, *, edit: EditRecord | None = None
) -> LoadedEngine:
    """Load a checkpoint into the engine that is wanted, or that fits best.

    Args:
        edit: an edit of the checkpoint, applied at the strength that each request asks for.

    Raises:
        UsageError: llamacpp is wanted, and there is no GGUF file.
        ForgeError: the model cannot be loaded, or the edit has no form that an engine can apply at any strength.
    """
    path = gguf_of(checkpoint)
    if settings.name == "llamacpp":
        if path is None:
            raise UsageError(
                f"{checkpoint.label} has no GGUF file", "--engine llamacpp runs GGUF files, and runs that made one"
            )
        return _llamacpp(checkpoint, path, load, settings, "as asked for", edit)
    reason = "as asked for" if settings.name == "transformers" else _obstacle(checkpoint, load, path, edit)
    model = None
    if reason is None:
        assert path is not None
        found, model = _compared(checkpoint, path, load)
        taken, reason = found.verdict
        if taken:
            del model
            return _llamacpp(checkpoint, path, load, settings, reason, edit)
    from ollama_forge.serving.engine.transformers import TransformersEngine
    from ollama_forge.serving.engine.vision import load_engine as load_transformers

    if model is not None and edit is None:
        engine = TransformersEngine(model, slots=settings.slots, num_ctx=settings.num_ctx)
    else:
        del model
        engine = load_transformers(checkpoint, load, slots=settings.slots, num_ctx=settings.num_ctx, edit=edit)
    return LoadedEngine(engine, checkpoint, f"engine: transformers ({reason})")


def remote_engine(checkpoint: Checkpoint, tokenizer: Tokenizer, url: str, settings: EngineSettings) -> LoadedEngine:
    """Connect to a server that runs the checkpoint.

    Raises:
        ForgeError: no llama-server or vLLM answers at ``url``, or its tokens are others.
    """
    from ollama_forge.serving.engine.remote import RemoteEngine

    context = _context(checkpoint, settings)
    engine = RemoteEngine.connect(url, tokenizer, context=context, slots=settings.slots)
    return LoadedEngine(engine, checkpoint, f"engine: {engine.server.name} at {engine.server.connection.url}")


def vllm_engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer, load: LoadSettings, settings: EngineSettings
) -> LoadedEngine:
    """Start a vLLM that runs the checkpoint; closing the engine ends it.

    Raises:
        UsageError: the checkpoint is a GGUF file.
        ForgeError: there is no vLLM, or it does not start.
    """
    from ollama_forge.serving.engine.remote import RemoteEngine

    vllm = settings.vllm or VllmSettings()
    with ExitStack() as running:
        server = running.enter_context(vllm_server(checkpoint, vllm, load, context=settings.num_ctx))
        context = _context(checkpoint, settings)
        end = running.pop_all().close
    engine = RemoteEngine(server, tokenizer, context=context, slots=settings.slots, end=end)
    devices = f" on {vllm.tensor_parallel_size} devices" if vllm.tensor_parallel_size > 1 else ""
    return LoadedEngine(engine, checkpoint, f"engine: vLLM {server.version}{devices}, context {engine.context_length}")


def _context(checkpoint: Checkpoint, settings: EngineSettings) -> int:
    """The context length by the model's config and the settings."""
    text = checkpoint.config.get("text_config") or checkpoint.config
    longest: int = text.get("max_position_embeddings") or text.get("n_positions") or 1 << 20
    return min(longest, settings.num_ctx or longest)


def gguf_of(checkpoint: Checkpoint) -> Path | None:
    """The GGUF file that a checkpoint is, or that its run made of it; None: there is none."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.file.parts[0]
    run = checkpoint.folder.resolve().parent
    if checkpoint.kind != "folder" or checkpoint.folder.resolve().name != "checkpoint":
        return None
    return next(iter(gguf_files(run, run.name.removeprefix("abliterate-"))), None)


def _obstacle(
    checkpoint: Checkpoint, load: LoadSettings, path: Path | None, edit: EditRecord | None = None
) -> str | None:
    """Why llama.cpp is not considered; None if it is."""
    if path is None:
        return "there is no GGUF file"
    if not llamacpp_is_installed():
        return "xllamacpp is not installed"
    device = devices_for(load.device, load.device_map)[0]
    if device.type != "cpu":
        return f"it runs on {device}"
    if load.bits is not None:
        return f"it is loaded in {load.bits} bits"
    if "vision_config" in checkpoint.config:
        return "llama.cpp takes no images here"
    if edit is not None:
        try:
            _check_adapter(checkpoint, path, load, edit)
        except ForgeError as error:
            return error.message
    return None


def _llamacpp(
    checkpoint: Checkpoint,
    path: Path,
    load: LoadSettings,
    settings: EngineSettings,
    reason: str,
    edit: EditRecord | None,
) -> LoadedEngine:
    from ollama_forge.serving.engine.llamacpp import LlamaCppEngine

    run = _as_gguf(checkpoint, path)
    write_adapter: Callable[[Path], object] | None = None
    if edit is not None:
        model = map_checkpoint(checkpoint, trust_remote_code=load.trust_remote_code)
        write_adapter = partial(write_gguf_adapter, edit, model, run.layout, run.file.architecture)
    engine: LlamaCppEngine = LlamaCppEngine(
        path,
        _tokenizer(checkpoint, load),
        checkpoint.config,
        slots=settings.slots,
        context=settings.num_ctx,
        write_adapter=write_adapter,
    )
    context = f"context {engine.context_length}"
    return LoadedEngine(engine, run, f"engine: llama.cpp on {path.name}, {context} ({reason})")


def _as_gguf(checkpoint: Checkpoint, path: Path) -> GgufCheckpoint:
    return checkpoint if isinstance(checkpoint, GgufCheckpoint) else gguf_checkpoint_of(checkpoint, path)


def _check_adapter(checkpoint: Checkpoint, path: Path, load: LoadSettings, edit: EditRecord) -> None:
    """Check that an adapter of the GGUF file can express an edit.

    Raises:
        ForgeError: none can.
    """
    model = map_checkpoint(checkpoint, trust_remote_code=load.trust_remote_code)
    gguf_factors(low_rank_changes(edit, model), _as_gguf(checkpoint, path).layout)


def _tokenizer(checkpoint: Checkpoint, load: LoadSettings) -> Tokenizer:
    return Tokenizer.load(
        checkpoint.folder, template_kwargs=load.template_kwargs, trust_remote_code=load.trust_remote_code
    )


# -- comparing --------------------------------------------------------------------------------------------------------


def _compared(checkpoint: Checkpoint, path: Path, load: LoadSettings) -> tuple[Comparison, ChatModel | None]:
    """The comparison, from the cache if it was made before; else also the model that was loaded for it."""
    digest = file_sha256(path)
    run = checkpoint.folder.parent if not isinstance(checkpoint, GgufCheckpoint) else None
    kept = cache_root() / "engines" / f"{digest}.json" if run is None else run / "engine.json"
    packages = versions(("torch", "transformers", "xllamacpp"))
    key = sha256_json([digest, checkpoint.fingerprint, packages, load.dtype, usable_threads()])
    found = _read(kept, key)
    if found is not None:
        return found, None
    with status("comparing llama.cpp with transformers"):
        found, model = compare(checkpoint, path, load)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"key": key, **asdict(found)})
    except (OSError, ForgeError):
        return found, model  # an unwritable folder costs the time of another comparison
    return found, model


def _read(kept: Path, key: str) -> Comparison | None:
    try:
        entries: dict[str, Any] = read_json(kept)
        return Comparison(**entries) if entries.pop("key") == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ForgeError):  # absent or damaged
        return None


def compare(checkpoint: Checkpoint, path: Path, load: LoadSettings) -> tuple[Comparison, ChatModel | None]:
    """Compare tokens of texts, then greedy tokens and times of short answers; also return the model that was loaded.

    Raises:
        ForgeError: one of the two cannot load the model.
    """
    tokenizer = _tokenizer(checkpoint, load)
    prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": text}])) for text in _PROMPTS]
    longest = max(map(len, prompts)) + _TOKENS + 16  # margin for llama.cpp
    with llama_server(path, max(longest, TOKENIZING_CONTEXT)) as server:
        check = check_tokens(tokenizer, server.tokenize)
        if check.mismatches:
            return Comparison(check.texts, check.mismatches), None
        answer = RemoteModel(server, tokenizer).answer
        answers, rate = answer(prompts, _TOKENS), _rate(answer, prompts)
    device = pick_device(load.device)
    needed = checkpoint.parameters * pick_dtype(load.dtype, device).itemsize
    if needed > memory_available(device):
        return Comparison(check.texts, 0), None
    model = ChatModel.load_unmapped(checkpoint, load)
    agreeing = _agreeing(model, prompts, answers)
    other = _rate(model.answer, prompts)
    return Comparison(check.texts, 0, sum(map(len, answers)), agreeing, rate, other), model


def _rate(answer: Callable[[Sequence[Ids], int], list[Ids]], prompts: Sequence[Ids]) -> float:
    """Tokens per second of one answer at a time."""
    answer(prompts[:1], 2)
    started, count = time.perf_counter(), 0
    for prompt in prompts[:_TIMED]:
        count += len(answer([prompt], _TOKENS)[0]) + 1  # the end takes a step, too
    return count / (time.perf_counter() - started)


def _agreeing(model: ChatModel, prompts: Sequence[Ids], answers: Sequence[Ids]) -> int:
    """How many tokens of the answers are the likeliest by the model, each behind those before it."""
    count = 0
    for batch in model.forced(prompts, answers, _TOKENS):
        for place, row in enumerate(batch.rows):
            best = batch.of_row(place).argmax(-1).tolist()
            count += sum(one == other for one, other in zip(best, answers[row], strict=False))
    return count

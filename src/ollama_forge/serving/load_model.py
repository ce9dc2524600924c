"""Make a served model from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_forge.errors import UsageError
from ollama_forge.serving.engine.base import Engine, EngineSettings
from ollama_forge.serving.metadata import ModelMetadata, live_metadata
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.sentence_modules import SentenceModules
from ollama_forge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.serving.live_source import LiveSource

DEFAULT = EngineSettings()


def unloaded_model(
    checkpoint: Checkpoint,
    name: str,
    *,
    load: LoadSettings,
    max_queue: int,
    engine: EngineSettings = DEFAULT,
    live: LiveSource | None = None,
) -> ServedModel:
    """A checkpoint's model without its weights, which ``ServedModel.load`` loads.

    Args:
        engine: the engine to load them into; an embedding model has one of its own.
        live: the edit of this checkpoint that is applied at the strength of each request; None for none.

    Raises:
        UsageError: the engine does not fit the checkpoint.
        ForgeError: the tokenizer cannot be loaded.
    """
    modules = SentenceModules.of(checkpoint)
    others = engine.name in ("llamacpp", "vllm") or engine.url is not None
    if modules is not None:
        if others or live is not None:
            raise UsageError(f"{checkpoint.label} is an embedding model", "leave out --engine, --engine-url and --live")
        return _embedding_model(checkpoint, name, modules, load=load, max_queue=max_queue, engine=engine)
    if live is not None and (engine.url is not None or engine.name == "vllm"):
        raise UsageError("--live works with a model in this process alone", "leave out --engine-url or --engine vllm")
    tokenizer = Tokenizer.load(checkpoint.folder, trust_remote_code=load.trust_remote_code)

    def make_engine() -> Engine:
        from ollama_forge.serving.engine.choice import load_engine, remote_engine, vllm_engine

        if engine.url is not None:
            loaded = remote_engine(checkpoint, tokenizer, engine.url, engine)
        elif engine.name == "vllm":
            loaded = vllm_engine(checkpoint, tokenizer, load, engine)
        else:
            loaded = load_engine(checkpoint, load, engine, edit=None if live is None else live.record)
        model.engine_reason = loaded.reason
        model.metadata = described(loaded.checkpoint)
        return loaded.engine

    def described(source: Checkpoint) -> ModelMetadata:
        metadata = ModelMetadata.of(source, load.system)
        return metadata if live is None else live_metadata(metadata, live.edited)

    sees = "vision_config" in checkpoint.config and any(
        (checkpoint.folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")
    )
    model = ServedModel(
        name,
        tokenizer.backend,
        None,
        described(checkpoint),
        template_kwargs=load.template_kwargs,
        end_ids=frozenset(tokenizer.end_ids),
        vision=sees,
        max_queue=max_queue,
        make_engine=make_engine,
        live=live is not None,
    )
    return model


def _embedding_model(
    checkpoint: Checkpoint,
    name: str,
    modules: SentenceModules,
    *,
    load: LoadSettings,
    max_queue: int,
    engine: EngineSettings,
) -> ServedModel:
    tokenizer = Tokenizer.load(checkpoint.folder, trust_remote_code=load.trust_remote_code).backend
    lengths = [length for length in (modules.max_length, engine.num_ctx) if length is not None]

    def make_engine() -> Engine:
        from ollama_forge.serving.engine.encoder import load_encoder

        return load_encoder(checkpoint, modules, tokenizer, load, slots=engine.slots, num_ctx=engine.num_ctx)

    return ServedModel(
        name,
        tokenizer,
        None,
        ModelMetadata.of(checkpoint).with_pooling(modules.gguf_pooling, min(lengths, default=None)),
        template="",
        max_queue=max_queue,
        embedded_text=modules.text,
        make_engine=make_engine,
    )

"""The engine for vision-language checkpoints: the checkpoint's processor encodes images for the prompt."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.quiet import quiet_transformers
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.transformers import TransformersEngine

_LOG = logging.getLogger(__name__)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TEXT_INPUTS = ("input_ids", "attention_mask")


class VisionEngine(TransformersEngine):
    """Generates from text and images, and computes embeddings."""

    def __init__(self, model: ChatModel, processor: Any, *, slots: int = 16) -> None:
        super().__init__(model, slots=slots)
        self._processor = processor

    def encode(self, text: str, images: Sequence[bytes]) -> tuple[tuple[int, ...], object]:
        """Encode a rendered prompt and its images.

        Returns:
            The prompt's token ids with expanded image placeholders, and the value for ``EngineRequest.media``.

        Raises:
            EngineError: an image cannot be decoded, or the numbers of placeholders and images differ.
        """
        pictures = [_picture(image) for image in images]
        try:
            encoded = self._processor(
                text=[text],
                images=pictures or None,
                add_special_tokens=not self.model.tokenizer.template.text,
                return_tensors="pt",
            )
        except (ValueError, IndexError, StopIteration, RuntimeError) as error:
            raise EngineError(f"the processor cannot encode the prompt with {len(images)} images: {error}") from error
        ids = tuple(encoded["input_ids"][0].tolist())
        media = {name: value for name, value in encoded.items() if name not in _TEXT_INPUTS}
        return ids, media if pictures else None


def _picture(image: bytes) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EngineError("an image cannot be read: it is damaged or not PNG, JPEG or the like") from error


def load_engine(checkpoint: Checkpoint, settings: LoadSettings, *, slots: int = 16) -> TransformersEngine:
    """Load a checkpoint as a ``VisionEngine`` if it has an image processor, else as a ``TransformersEngine``.

    Raises:
        ForgeError: as ``ChatModel.load``.
    """
    model = ChatModel.load(checkpoint, settings)
    sees = hasattr(model.module.config, "vision_config")
    processor = _processor(checkpoint.folder, settings.trust_remote_code) if sees else None
    return TransformersEngine(model, slots=slots) if processor is None else VisionEngine(model, processor, slots=slots)


def _processor(folder: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's processor of texts and images; None if it has none or it cannot be loaded."""
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return None
    from transformers import AutoProcessor

    with quiet_transformers():
        try:
            processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            _LOG.warning("images are not supported: the processor cannot be loaded (%s)", type(error).__name__)
            return None
    return processor if getattr(processor, "image_processor", None) is not None else None

"""The engine for vision-language checkpoints: the checkpoint's processor encodes images for the prompt."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.quiet import quiet_transformers
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.transformers import TransformersEngine

if TYPE_CHECKING:
    from ollama_forge.edits.edit_file import EditRecord
    from ollama_forge.serving.engine.live import LiveEdit

_LOG = logging.getLogger(__name__)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TEXT_INPUTS = ("input_ids", "attention_mask")
MAX_PIXELS = 100_000_000  # of all images of a request, which take 300 MB then; a photo has 12 to 50 million
_TOO_LARGE = f"the images are too large: {MAX_PIXELS // 10**6} million pixels at most, all together"


class VisionEngine(TransformersEngine):
    """Generates from text and images, and computes embeddings."""

    def __init__(
        self,
        model: ChatModel,
        processor: Any,
        *,
        slots: int = 16,
        num_ctx: int | None = None,
        live: LiveEdit | None = None,
    ) -> None:
        super().__init__(model, slots=slots, num_ctx=num_ctx, live=live)
        self._processor = processor

    def encode(self, text: str, images: Sequence[bytes]) -> tuple[tuple[int, ...], object]:
        """Encode a rendered prompt and its images.

        Returns:
            The prompt's token ids with expanded image placeholders, and the value for ``EngineRequest.media``.

        Raises:
            EngineError: an image cannot be decoded, or the numbers of placeholders and images differ.
        """
        pictures = _pictures(images)
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


def _pictures(images: Sequence[bytes]) -> list[Any]:
    """Decode images, if they are not too large together: few bytes may hold very many pixels."""
    from PIL import Image

    try:
        opened = [Image.open(io.BytesIO(image)) for image in images]  # reads the sizes alone
        if sum(image.width * image.height for image in opened) > MAX_PIXELS:
            raise EngineError(_TOO_LARGE)
        return [image.convert("RGB") for image in opened]
    except Image.DecompressionBombError as error:  # one that Pillow itself does not open
        raise EngineError(_TOO_LARGE) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise EngineError("an image cannot be read: it is damaged or not PNG, JPEG or the like") from error


def load_engine(
    checkpoint: Checkpoint,
    settings: LoadSettings,
    *,
    slots: int = 16,
    num_ctx: int | None = None,
    edit: EditRecord | None = None,
) -> TransformersEngine:
    """Load a checkpoint as a ``VisionEngine`` if it has an image processor, else as a ``TransformersEngine``.

    Args:
        slots, num_ctx: see ``TransformersEngine``.
        edit: an edit of the checkpoint, applied at the strength that each request asks for.

    Raises:
        ForgeError: the checkpoint cannot be loaded, its model does not run on text, or as ``LiveEdit``.
    """
    live = None
    if edit is None:
        model = ChatModel.load_unmapped(checkpoint, settings)
    else:
        from ollama_forge.serving.engine.live import LiveEdit

        model = ChatModel.load(checkpoint, settings)
        live = LiveEdit(model, edit)
    sees = hasattr(model.module.config, "vision_config")
    processor = _processor(checkpoint.folder, settings.trust_remote_code) if sees else None
    if processor is None:
        return TransformersEngine(model, slots=slots, num_ctx=num_ctx, live=live)
    return VisionEngine(model, processor, slots=slots, num_ctx=num_ctx, live=live)


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

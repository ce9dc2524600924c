"""Images with a tiny random vision-language model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving.engine.base import EngineError, EngineRequest, ImageEncoder, Token
from ollama_forge.serving.engine.vision import VisionEngine, load_engine
from tests import tiny
from tests.engines import GREEDY, collect, greedy, prompt, together, wait

MARKS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
TEXT = "<|user|>What is it? <boi><|end|><|assistant|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("vision") / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=MARKS,
    )
    config: Gemma3Config = tiny.FAMILIES["gemma3"]()  # type: ignore[assignment]
    marks = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    text = config.text_config.to_dict() | {"vocab_size": len(tokenizer)}
    whole = Gemma3Config(
        text_config=text,
        vision_config=config.vision_config.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=marks["boi_token"],
        eoi_token_index=marks["eoi_token"],
        image_token_index=marks["image_token"],
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    module = AutoModelForImageTextToText.from_config(whole, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    module.tie_weights()
    module.save_pretrained(folder)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4
    )
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE)
    return Checkpoint(folder, "vision", "folder")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[VisionEngine]:
    engine = load_engine(checkpoint, LoadSettings(dtype="float32", device="cpu"), slots=4)
    assert isinstance(engine, VisionEngine)
    yield engine
    engine.close()


def picture(seed: int, kind: str = "PNG") -> bytes:
    noise = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(noise.numpy()).save(out, kind)
    return out.getvalue()


def ask(engine: VisionEngine, image: bytes) -> list[Token]:
    ids, media = engine.encode(TEXT, [image])
    request = EngineRequest(ids, 6, GREEDY, top_logprobs=0, media=media)
    return wait(lambda: collect(engine, request))


def test_sees(engine: VisionEngine) -> None:
    assert isinstance(engine, ImageEncoder)
    ids, _ = engine.encode(TEXT, [picture(1)])
    assert ids.count(engine.model.module.config.image_token_index) == 4  # type: ignore[union-attr]
    first, again, other = (ask(engine, picture(seed))[0].logprob for seed in (1, 1, 2))
    assert first == again
    assert abs(first - other) > 1e-3  # type: ignore[operator]


def test_the_answer_is_that_of_generate(engine: VisionEngine) -> None:
    """Its images' tokens attend to each other both ways, and it decodes beside texts."""
    ids, media = engine.encode(TEXT, [picture(3)])
    with torch.inference_mode():
        expected = engine.model.module.generate(  # type: ignore[operator]
            input_ids=torch.tensor([ids]),
            **media,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,  # type: ignore[arg-type]
        )[0, len(ids) :].tolist()
    request = EngineRequest(ids, 12, GREEDY, media=media)
    assert together(engine, [greedy(prompt(8), 20), request, greedy(prompt(30), 5)])[1] == expected


def test_two_images_and_none(engine: VisionEngine) -> None:
    ids, media = engine.encode("<boi> and <boi>", [picture(1), picture(2, "JPEG")])
    assert len(together(engine, [EngineRequest(ids, 3, GREEDY, media=media)])[0]) == 3
    ids, media = engine.encode("no image", [])
    assert media is None
    assert engine.model.tokenizer.decode(ids) == "no image"


def test_an_image_is_not_taken_for_another_with_the_same_ids(engine: VisionEngine) -> None:
    """Prompts with images are never gone on with from what was kept."""
    ids, media = engine.encode(TEXT, [picture(4)])
    together(engine, [EngineRequest(ids, 6, GREEDY, media=media)])
    before = engine.stats.prefilled_tokens
    ids, media = engine.encode(TEXT, [picture(5)])
    together(engine, [EngineRequest(ids, 6, GREEDY, media=media)])
    assert engine.stats.prefilled_tokens - before == len(ids)


@pytest.mark.parametrize(
    ("text", "images"), [(TEXT, [b"not an image"]), (TEXT, [b""]), ("<boi>", []), ("none", [picture(1)])]
)
def test_what_does_not_fit_is_an_error(engine: VisionEngine, text: str, images: list[bytes]) -> None:
    with pytest.raises(EngineError):
        engine.encode(text, images)


def test_a_truncated_image_is_an_error(engine: VisionEngine) -> None:
    with pytest.raises(EngineError):
        engine.encode(TEXT, [picture(1)[:200]])


@pytest.mark.parametrize("sides", [(11_000,), (8_000, 8_000), (40_000,)])
def test_images_of_few_bytes_and_many_pixels_are_refused(engine: VisionEngine, sides: tuple[int, ...]) -> None:
    images = []
    for side in sides:
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        images.append(file.getvalue())
    assert sum(map(len, images)) < 500_000
    with pytest.raises(EngineError, match="100 million pixels at most"):
        engine.encode(TEXT, images)


def test_a_text_model_does_not_see(tmp_path: Path) -> None:
    engine = load_engine(tiny.save(tiny.build("llama"), tmp_path / "m"), LoadSettings(dtype="float32", device="cpu"))
    assert not isinstance(engine, ImageEncoder)
    engine.close()

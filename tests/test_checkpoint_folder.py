"""The edited checkpoint is consistent: it has equal tied copies, templates and licences, and no unedited weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import edit_file_path, write_checkpoint
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.evaluation.verify import verify
from ollama_forge.files import read_json, write_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny
from tests.first_tokens import first_log_probs

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WITH_EMBEDDING = EditSettings(targets=("attention", "embedding"))
DIRECTION = RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2)


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    DIRECTION.save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


def with_second_head(folder: Path, family: str, *, tied: bool | None, equal: bool = True) -> Checkpoint:
    """A tiny model that stores its embedding as ``lm_head.weight`` too; ``tied`` as its config says (None: no key)."""
    tiny.save(tiny.build(family), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING] * (1.0 if equal else 2.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in read_json(folder / "config.json").items() if key != "tie_word_embeddings"}
    write_json(folder / "config.json", config if tied is None else {**config, "tie_word_embeddings": tied})
    return Checkpoint(folder, folder.name, "folder")


def load(checkpoint: Checkpoint) -> ChatModel:
    return ChatModel.load(checkpoint, LoadSettings(dtype="float32", device="cpu"))


@pytest.mark.parametrize(("family", "tied"), [("gemma2", None), ("llama", True)])
def test_a_tied_head_stored_a_second_time_is_edited_with_the_embedding(
    tmp_path: Path, refusal: Path, family: str, tied: bool | None
) -> None:
    source = with_second_head(tmp_path / "model", family, tied=tied)
    result, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=WITH_EMBEDDING)
    assert result.tensors.read_bytes(HEAD) == result.tensors.read_bytes(EMBEDDING)
    assert {HEAD, EMBEDDING} <= applied.changed
    ids = load(source).tokenizer.instructions_ids(tiny.lines(3))
    as_tied = load(result)
    plan = plan_orthogonal(map_checkpoint(source), DIRECTION, WITH_EMBEDDING, vector_reader(source.tensors))
    assert all(check.passed for check in verify(source, result, as_tied, plan, DIRECTION))
    base = load(source)
    with hooked(base, plan):
        as_hooks = first_log_probs(base, ids)
    torch.testing.assert_close(first_log_probs(as_tied, ids), as_hooks, rtol=1e-4, atol=2e-4)
    write_json(
        result.folder / "config.json", {**read_json(result.folder / "config.json"), "tie_word_embeddings": False}
    )
    as_untied = load(Checkpoint(result.folder, "untied", "folder"))
    assert torch.equal(first_log_probs(as_untied, ids), first_log_probs(as_tied, ids))


def test_an_edit_file_edits_the_second_copy_too(tmp_path: Path, refusal: Path) -> None:
    source = with_second_head(tmp_path / "model", "gemma2", tied=True)
    apply(str(source.folder), tmp_path / "once", refusal_pt=refusal, settings=WITH_EMBEDDING)
    record = EditRecord.load(edit_file_path(tmp_path / "once"))
    assert HEAD in record.matrices
    alone = {name: matrix for name, matrix in record.matrices.items() if name != HEAD}
    replace(record, matrices=alone).save(tmp_path / "alone.edit.safetensors")  # as versions before wrote it
    twice, _ = apply(str(source.folder), tmp_path / "twice", edit_file=tmp_path / "alone.edit.safetensors")
    assert twice.tensors.read_bytes(HEAD) == twice.tensors.read_bytes(EMBEDDING)
    assert twice.tensors.read_bytes(HEAD) != source.tensors.read_bytes(HEAD)


@pytest.mark.parametrize(
    ("family", "tied", "equal"), [("llama", None, True), ("gemma2", False, True), ("gemma2", True, False)]
)
def test_a_head_of_its_own_is_not_a_copy(
    tmp_path: Path, refusal: Path, family: str, tied: bool | None, equal: bool
) -> None:
    source = with_second_head(tmp_path / "model", family, tied=tied, equal=equal)
    assert map_checkpoint(source).copies == {}
    result, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=WITH_EMBEDDING)
    assert result.tensors.read_bytes(HEAD) == source.tensors.read_bytes(HEAD)
    assert EMBEDDING in applied.changed
    assert HEAD not in applied.changed


def test_no_copy_is_edited_where_the_embedding_is_not(tmp_path: Path, refusal: Path) -> None:
    source = with_second_head(tmp_path / "model", "gemma2", tied=True)
    _, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
    assert not applied.changed & {HEAD, EMBEDDING}


COPIED = [
    "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json", "configuration_tiny.py",
    "generation_config.json", "LICENSE", "LICENSE.md", "merges.txt", "Notice", "preprocessor_config.json",
    "qwen.tiktoken", "source.spm", "special_tokens_map.json", "tokenizer.model", "USE_POLICY.md", "vocab.txt",
]  # fmt: skip
LEFT_OUT = [
    "adapter_config.json", "consolidated.safetensors", "flax_model.msgpack", "model.fp16.safetensors", "model.gguf",
    "model.safetensors.index.fp32.json", "onnx/", "picture.png", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "quantize_config.json", "rust_model.ot", "tf_model.h5", "training_args.bin",
]  # fmt: skip


def test_only_known_kinds_of_files_are_copied(
    tmp_path: Path, refusal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    for name in [*COPIED, *LEFT_OUT, "onnx/model.onnx", "onnx/config.json", ".gitattributes", "README.md"]:
        path = source.folder / name
        path.parent.mkdir(exist_ok=True)
        if not name.endswith("/") and not path.exists():
            path.write_bytes(f"content of {name}".encode())
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
    folder = tmp_path / "edited"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = {"README.md", "abliteration.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert written == {*COPIED, *made}
    for name in COPIED:
        assert (folder / name).read_bytes() == (source.folder / name).read_bytes()
    assert read_json(folder / "abliteration.json")["left_out"] == LEFT_OUT
    notes = [line for line in capsys.readouterr().err.splitlines() if "not copied" in line]
    assert len(notes) == 1
    assert all(name in notes[0] for name in LEFT_OUT[:8])
    assert f"and {len(LEFT_OUT) - 8} more" in notes[0]


def test_templates_in_a_folder_of_their_own_are_loaded_again(tmp_path: Path, refusal: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    tokenizer = tiny.tokenizer()
    templates = {"default": tiny.TEMPLATE, "tools": "{{ tools }}" + tiny.TEMPLATE}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source.folder)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
    assert AutoTokenizer.from_pretrained(tmp_path / "edited").chat_template == templates


CARD = """---
license: other
license_name: "tiny: licence"
license_link: LICENSE
tags: [chat]
---
# Tiny
"""


@pytest.mark.parametrize(
    ("card", "license_of_base"),
    [
        (CARD, {"license": "other", "license_name": "tiny: licence", "license_link": "LICENSE"}),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: [unclosed\n---\n", {}),
        (None, {}),
    ],
)
@pytest.mark.parametrize("kind", ["hub", "folder"])
def test_the_card_names_base_model_and_licence(
    tmp_path: Path, card: str | None, license_of_base: dict[str, str], kind: str
) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    source = Checkpoint(folder, "tiny/model: 1", kind)
    model = map_checkpoint(source)
    plan = plan_orthogonal(model, DIRECTION, EditSettings(), vector_reader(source.tensors))
    write_checkpoint(source, model, plan, tmp_path / "edited", settings=EditSettings())
    written = ModelCard.load(tmp_path / "edited" / "README.md")
    wanted: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["abliteration", "ollama-forge"],
        **license_of_base,
    }
    assert written.data.to_dict() == (wanted | {"base_model": "tiny/model: 1"} if kind == "hub" else wanted)
    assert "The licence of the base model applies" in written.text

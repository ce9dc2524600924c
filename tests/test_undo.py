"""Undo gives the source's weight files back byte for byte, and refuses what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply, undo
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import read_gguf, value_of
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.gguf_output import write_gguf
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.undo import keep_undo
from ollama_forge.edits.undo_file import undo_path
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json, sha256_file, write_json
from ollama_forge.ollama.registration import OllamaSettings
from ollama_forge.pipeline import run
from ollama_forge.sources import remembered
from tests import tiny
from tests.gguf_models import Model, retype
from tests.packed import fp8_model
from tests.test_apply import packed_gpt_oss
from tests.test_cli import complaint, forge
from tests.test_run import settings

R = tiny.unit_vector(7)


def bf16(folder: Path) -> Checkpoint:
    """One file, whose header is written as no library writes it."""
    tiny.save(tiny.build("llama").bfloat16(), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(dict(reversed(tensors.items())), path, metadata={"format": "pt", "from": "a test"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 16).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 16 + data[8 + length :])
    (folder / "README.md").write_text("# The source's own card\n", encoding="utf-8")
    return Checkpoint(folder, folder.name, "folder")


def shards(folder: Path) -> Checkpoint:
    return tiny.save(tiny.build("llama").bfloat16(), folder, max_shard_size="30KB")


def fp8(folder: Path) -> Checkpoint:
    return fp8_model(folder, "block")


SOURCES: dict[str, Callable[[Path], Checkpoint]] = {
    "bf16": bf16,
    "shards": shards,
    "FP8": fp8,
    "MXFP4": packed_gpt_oss,
}
CASES = [("bf16", "auto"), ("shards", "auto"), ("FP8", "auto"), ("FP8", "keep"), ("MXFP4", "auto"), ("MXFP4", "keep")]


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def edited(source: Checkpoint, folder: Path, out_dtype: str = "auto", *, keep: bool = True) -> Path:
    direction = folder.parent / "refusal.pt"
    RefusalDirection(R.unsqueeze(0), layer=2).save(direction)
    apply(str(source.folder), folder, refusal_pt=direction, out_dtype=out_dtype, keep_undo=keep)
    return folder


@pytest.fixture(autouse=True)
def notes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes on sources that no other test wrote; all else stays in the common cache."""
    folder = tmp_path_factory.mktemp("notes")
    monkeypatch.setattr(remembered, "cache_root", lambda: folder)


@pytest.mark.parametrize(("form", "out_dtype"), CASES)
def test_gives_every_file_back(tmp_path: Path, form: str, out_dtype: str) -> None:
    source = SOURCES[form](tmp_path / "model")
    before = contents(source.folder)
    output = edited(source, tmp_path / "edited", out_dtype)
    assert contents(output)["config.json"] == before["config.json"] or form != "bf16"

    from_source = undo(output, tmp_path / "from source")
    assert from_source.taken_from == source.folder
    assert contents(tmp_path / "from source") == before

    shutil.move(source.folder, tmp_path / "elsewhere")
    from_file = undo(output, tmp_path / "from file")
    assert from_file.taken_from == undo_path(output)
    assert contents(tmp_path / "from file") == before
    assert set(from_file.hashes.values()) <= set(before.values())

    undo_path(output).unlink()
    with pytest.raises(ForgeError, match=r"is not where it was, and edited\.undo does not exist"):
        undo(output, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    given = undo(output, tmp_path / "given", source=str(tmp_path / "elsewhere"))
    assert given.taken_from == tmp_path / "elsewhere"
    assert contents(tmp_path / "given") == before


def test_undo_file_holds_what_differs(tmp_path: Path) -> None:
    source = bf16(tmp_path / "model")
    output = edited(source, tmp_path / "edited")
    tensors = source.tensors
    changed = set(read_json(output / "abliteration.json")["changed"])
    header = min(info.start for info in tensors.values())
    kept = sum(tensors[name].size for name in changed) + header
    held = load_file(undo_path(output))
    assert held["model.safetensors"].numel() == kept
    assert set(held) == {"model.safetensors", "README.md"}


def test_a_changed_source_is_not_taken(tmp_path: Path) -> None:
    source = bf16(tmp_path / "model")
    before = contents(source.folder)
    output = edited(source, tmp_path / "edited")
    flip(source.folder / "model.safetensors", -1)
    assert undo(output, tmp_path / "back").taken_from == undo_path(output)
    assert contents(tmp_path / "back") == before
    with pytest.raises(ForgeError, match="is not the source of"):
        undo(output, tmp_path / "again", source=str(source.folder))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "of another output", "edited output"])
def test_damage_is_refused(tmp_path: Path, damage: str) -> None:
    source = bf16(tmp_path / "model")
    output = edited(source, tmp_path / "edited")
    kept = undo_path(output)
    if damage == "flipped":
        flip(kept, -200)
    elif damage == "truncated":
        kept.write_bytes(kept.read_bytes()[:-100])
    elif damage == "of another output":
        other = edited(shards(tmp_path / "other"), tmp_path / "other edited")
        shutil.copyfile(undo_path(other), kept)
    else:
        flip(output / "model.safetensors", -1)
    shutil.rmtree(source.folder)
    with pytest.raises(ForgeError, match=r"do not give the source back|is truncated|undo file of another output"):
        undo(output, tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} & {"back", "back.partial"} == set()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_paths_leave_no_trace_and_targets_are_kept(tmp_path: Path) -> None:
    output = edited(bf16(tmp_path / "model"), tmp_path / "edited")
    for path in (output / "abliteration.json", output.with_name("edited.edit.safetensors"), undo_path(output)):
        assert str(tmp_path).encode() not in path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        undo(output, output)
    with pytest.raises(UsageError, match="not one GGUF file"):
        undo(output, tmp_path / "x.gguf")
    with pytest.raises(ForgeError, match=r"has no abliteration\.json"):
        undo(tmp_path / "model", tmp_path / "back")


def test_an_undo_file_writes_only_inside_its_folder(tmp_path: Path) -> None:
    output = edited(bf16(tmp_path / "model"), tmp_path / "edited")
    shutil.rmtree(tmp_path / "model")
    name = "../outside"
    described = {"format": 1, "files": [[name, "0" * 64, [["kept", 3]]]]}
    save_file({name: torch.zeros(3, dtype=torch.uint8)}, undo_path(output), {"undo": json.dumps(described)})
    with pytest.raises(ForgeError, match="is not an undo file"):
        undo(output, tmp_path / "back")
    assert not (tmp_path / "outside").exists()


def test_the_names_of_an_output_stay_inside_the_folder(tmp_path: Path) -> None:
    output = edited(bf16(tmp_path / "model"), tmp_path / "edited")
    record = read_json(output / "abliteration.json")
    (digest,) = record["source"]["files"].values()
    (tmp_path / "sources" / "model").mkdir(parents=True)
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "sources" / "outside")
    record["source"]["files"] = {"../outside": digest}
    write_json(output / "abliteration.json", record)
    with pytest.raises(ForgeError, match="does not name the hashes"):
        undo(output, tmp_path / "back", source=str(tmp_path / "sources" / "model"))
    assert not (tmp_path / "outside").exists()


def test_run_keeps_undo(tmp_path: Path) -> None:
    planned = settings(tmp_path, evaluate=False, verify=False, keep_undo=True, ollama=OllamaSettings(register=False))
    before = contents(Path(planned.model))
    run(planned)
    shutil.rmtree(planned.model)
    output = tmp_path / "out" / "checkpoint"
    assert undo(output, tmp_path / "back").taken_from == undo_path(output)
    assert contents(tmp_path / "back") == before


def test_options_that_undo_does_not_take_are_refused(tmp_path: Path) -> None:
    command = ("abliterate", "apply", "--model", "edited")
    for options, message in (
        (("--undo", "--output-dir", "back", "--strength", "2"), "--strength has no meaning with --undo"),
        (("--undo",), "give either --output-dir or --output"),
        (("--source", "model", "--output-dir", "back"), "--source is for --undo"),
    ):
        assert message in complaint(forge(*command, *options, folder=tmp_path), 2)[0]


# -- GGUF files ----------------------------------------------------------------------------------------------------


def edited_file(source: GgufCheckpoint, path: Path) -> Path:
    model = map_checkpoint(source)
    chosen = EditSettings(targets=("attention", "mlp"), skip_begin_layers=1, skip_end_layers=0)
    direction = RefusalDirection(tiny.unit_vector(3, model.d_model).unsqueeze(0), layer=1)
    plan = plan_orthogonal(model, direction, chosen, vector_reader(source.tensors))
    write_gguf(source, model, plan, path, settings=chosen)
    return path


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q4_1])
def test_gives_a_gguf_file_back(tmp_path: Path, gguf_models: Mapping[str, Model], kind: Type) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    source = gguf_models["qwen3_moe"].with_types(folder / "model.gguf", lambda tensor: kind)
    with source.path.open("ab") as file:
        file.write(b"what a program left behind the tensors")
    source = gguf_models["qwen3_moe"].opened(source.path)
    before = sha256_file(source.path)
    output = edited_file(source, tmp_path / "edited.gguf")
    kept = keep_undo(source, output)
    assert kept == tmp_path / "edited.gguf.undo"
    assert kept.stat().st_size < 0.9 * source.path.stat().st_size  # the embeddings and layer 0 are in the output
    assert str(tmp_path).encode() not in output.read_bytes() + kept.read_bytes()

    assert undo(output, tmp_path / "back").taken_from == source.path
    assert sha256_file(tmp_path / "back" / "model.gguf") == before
    source.path.rename(folder / "moved.gguf")
    assert undo(output, tmp_path / "back.gguf").taken_from == kept
    assert sha256_file(tmp_path / "back.gguf") == before
    flip(output, next(tensor.start for tensor in read_gguf(output).tensors if tensor.name == "token_embd.weight"))
    with pytest.raises(ForgeError, match="do not give the source back"):
        undo(output, tmp_path / "again.gguf")
    assert {path.name for path in tmp_path.iterdir()} & {"again.gguf", "again.gguf.partial"} == set()
    given = undo(output, tmp_path / "given.gguf", source=str(folder / "moved.gguf"))
    assert (given.taken_from, sha256_file(tmp_path / "given.gguf")) == (folder / "moved.gguf", before)


def test_the_parts_of_a_split_file_are_given_back(tmp_path: Path, gguf_models: Mapping[str, Model]) -> None:
    model = gguf_models["llama"]
    folder = tmp_path / "models"
    folder.mkdir()
    writer = GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=60)
    for tensor in GGUFReader(model.path).tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = contents(folder)
    assert set(before) == {"tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"}
    source = model.opened(folder / "tiny-00001-of-00002.gguf")
    output = edited_file(source, tmp_path / "edited.gguf")
    kept = keep_undo(source, output)

    with pytest.raises(UsageError, match="not one GGUF file"):
        undo(output, tmp_path / "back.gguf")
    assert undo(output, tmp_path / "back").taken_from == source.path
    assert contents(tmp_path / "back") == before
    moved = folder.rename(tmp_path / "moved")
    assert undo(output, tmp_path / "from file").taken_from == kept
    assert contents(tmp_path / "from file") == before
    second = moved / "tiny-00002-of-00002.gguf"
    assert undo(output, tmp_path / "given", source=str(second)).taken_from == second
    assert contents(tmp_path / "given") == before
    second.unlink()
    with pytest.raises(ForgeError, match="its weight files are missing or have other hashes"):
        undo(output, tmp_path / "again", source=str(moved))
    assert not (tmp_path / "again").exists()


def test_the_command_keeps_undo_of_a_gguf_file(tmp_path: Path, gguf_models: Mapping[str, Model]) -> None:
    source = gguf_models["llama"].with_types(tmp_path / "model.gguf", lambda tensor: Type.Q4_K)
    direction = RefusalDirection(tiny.unit_vector(3, map_checkpoint(source).d_model).unsqueeze(0), layer=1)
    direction.save(tmp_path / "refusal.pt")
    before = sha256_file(source.path)
    command = ("abliterate", "apply", "--model")
    done = forge(
        *command, "model.gguf", "--refusal-pt", "refusal.pt", "--output", "edited.gguf", "--keep-undo", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sha256_file(tmp_path / "edited.gguf") != before
    source.path.unlink()
    undone = forge(*command, "edited.gguf", "--undo", "--output", "back.gguf", "--json", folder=tmp_path)
    assert undone.returncode == 0, undone.stderr
    assert json.loads(undone.stdout) == {
        "path": "back.gguf", "taken_from": "edited.gguf.undo", "sha256": {"model.gguf": before}
    }  # fmt: skip
    assert sha256_file(tmp_path / "back.gguf") == before


def test_a_file_that_a_run_converted_names_what_can_be_undone(tmp_path: Path, gguf_models: Mapping[str, Model]) -> None:
    file = read_gguf(gguf_models["llama"].path)
    entries = {"ollama_forge.version": value_of("1"), "ollama_forge.source": value_of("model")}
    retype(replace(file, metadata={**file.metadata, **entries}), tmp_path / "run.gguf", lambda tensor: tensor.type)
    with pytest.raises(ForgeError, match="converted from an edited checkpoint, which is what can be undone") as caught:
        undo(tmp_path / "run.gguf", tmp_path / "back")
    assert "give the folder of that checkpoint as --model" in caught.value.hint

"""What ``apply`` writes for a GGUF source: files, records and metadata; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.torch import load_file

from ollama_forge.api import GgufOptions, apply
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf, value_of, write_header
from ollama_forge.checkpoints.storage import decode_tensor, tensor_bytes
from ollama_forge.cli.main import cli
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import blocks, gguf_output
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.gguf_output import HISTORY, write_gguf
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.proven import examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_workers import ShardSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.verify import verify
from ollama_forge.files import partial_of, read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests.gguf_models import Model, R, retype

SETTINGS = EditSettings(targets=("attention", "mlp", "embedding"), skip_begin_layers=0, skip_end_layers=0)
DIRECTION = RefusalDirection(R.unsqueeze(0), layer=1)
CPU = LoadSettings(device="cpu", dtype="float32")


@pytest.fixture
def model(gguf_models: Mapping[str, Model]) -> Model:
    return gguf_models["gpt2"]


@pytest.fixture
def source(model: Model, tmp_path: Path) -> Path:
    """A file whose matrices are Q4_K; its folder holds the direction too."""
    DIRECTION.save(tmp_path / "refusal.pt")
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "tiny.Q4_K_M.gguf"
    retype(read_gguf(model.path), path, lambda tensor: Type.Q4_K)
    return path


def options(model: Model, **given: Any) -> GgufOptions:
    return GgufOptions(base=str(model.checkpoint.folder), **given)


def applied_to(source: Path, folder: Path | None, gguf: GgufOptions, **given: Any) -> GgufCheckpoint:
    given = {"refusal_pt": source.parents[1] / "refusal.pt", "settings": SETTINGS, **given}
    written, _ = apply(str(source), folder, gguf=gguf, **given)
    assert isinstance(written, GgufCheckpoint)
    return written


def planned(source: GgufCheckpoint) -> EditPlan:
    return plan_orthogonal(examine(source).model_map, DIRECTION, SETTINGS, vector_reader(source.tensors))


def metadata(path: Path) -> dict[str, Any]:
    entries = {key: value.python() for key, value in read_gguf(path).metadata.items()}
    return {key.removeprefix("ollama_forge."): entries[key] for key in entries if key.startswith("ollama_forge.")}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what is written ------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_file_the_edit_and_the_records(model: Model, source: Path, tmp_path: Path) -> None:
    before = digest(source)
    written = applied_to(source, tmp_path / "out", options(model))
    names = ["README.md", "abliteration.json", "tiny.Q4_K_M.edit.safetensors", "tiny.Q4_K_M.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert written.path == tmp_path / "out" / "tiny.Q4_K_M.gguf"
    assert digest(source) == before
    record = read_json(tmp_path / "out" / "abliteration.json")
    assert record["files"] == ["tiny.Q4_K_M.gguf"]
    assert (record["source"]["model"], record["source"]["revision"]) == (source.name, before)
    assert record["certificate"]["tier"] == "proven"
    changed = record["changed"]["transformer.h.1.mlp.c_proj.weight"]
    assert changed["stored_as"] == "Q4_K"
    assert 0 < changed["leak"] < 0.02
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- gguf" in card
    assert "are stored as Q4_K; rounding to it undid at most" in card
    entries = metadata(written.path)
    assert record["source"].items() <= json.loads(entries["source"]).items()
    assert json.loads(entries["settings"]) == record["settings"]
    assert (entries["factors"], json.loads(entries["certificate"])) == ("orthogonal", record["certificate"])
    edit = EditRecord.load(tmp_path / "out" / "tiny.Q4_K_M.edit.safetensors")
    assert edit.fingerprint == before
    assert edit.matrices.keys() == record["changed"].keys()


def test_the_edit_of_a_file_and_of_its_release_are_exchanged(model: Model, source: Path, tmp_path: Path) -> None:
    """Without a norm rule, factors of the release and of the file differ by the rounding of the file alone."""
    plain = replace(SETTINGS, norm_preserving=False)
    of_file = applied_to(source, tmp_path / "first", options(model), settings=plain)
    again = applied_to(
        source, tmp_path / "again", options(model), edit_file=tmp_path / "first" / "tiny.Q4_K_M.edit.safetensors",
        refusal_pt=None, settings=None,
    )  # fmt: skip
    same = [(decoded(of_file, name) == decoded(again, name)).float().mean() for name in of_file.tensors.packed]
    assert min(same) > 0.98
    apply(str(model.checkpoint.folder), tmp_path / "release", refusal_pt=tmp_path / "refusal.pt", settings=plain)
    edit = tmp_path / "release.edit.safetensors"
    given = {"edit_file": edit, "refusal_pt": None, "settings": None}
    of_release = applied_to(source, tmp_path / "third", options(model), **given)
    r = R.double()
    name = "transformer.h.1.mlp.c_proj.weight"
    components = [(decoded(made, name).double() @ r).norm() for made in (of_file, of_release, model.opened(source))]
    assert components[0] < components[1] < components[2] / 5
    with pytest.raises(ForgeError, match="another model"):
        applied_to(source, tmp_path / "fourth", GgufOptions(), **given)


def decoded(checkpoint: GgufCheckpoint, name: str) -> torch.Tensor:
    return checkpoint.tensors.read_packed(name).decode()


def test_a_file_alone_and_on_the_command_line(model: Model, source: Path, tmp_path: Path) -> None:
    """Without --base, all that is known of the model comes from the file."""
    target = tmp_path / "here" / "edited.gguf"
    command = ["abliterate", "apply", "--model", str(source), "--output", str(target), "--targets", "attention,mlp"]
    command += ["--refusal-pt", str(tmp_path / "refusal.pt"), "--skip-begin-layers", "0", "--skip-end-layers", "0"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any(line.endswith(f"tensors changed: {target}") for line in lines)
    assert any(line.startswith("largest leak: 0.") and "(Q4_K)" in line for line in lines)
    assert f"edit file: {target.parent / 'edited.edit.safetensors'}" in lines
    names = ["edited.abliteration.json", "edited.edit.safetensors", "edited.gguf"]
    assert sorted(path.name for path in target.parent.iterdir()) == names
    done = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["files"] == [str(target)]
    assert told["checkpoint"] is None
    assert 0 < told["largest_leak"] < 0.02


def test_several_types_and_a_checkpoint(model: Model, source: Path, tmp_path: Path) -> None:
    applied_to(source, tmp_path / "out", options(model, quants=("Q8_0", "Q5_K_M"), keep_checkpoint=True))
    folder, before = tmp_path / "out", read_gguf(source)
    files = {path.name: read_gguf(path) for path in folder.glob("*.gguf")}
    assert files.keys() == {"tiny-Q8_0.gguf", "tiny-Q5_K_M.gguf"}
    for name, main_type in (("tiny-Q8_0.gguf", Type.Q8_0), ("tiny-Q5_K_M.gguf", Type.Q5_K)):
        file = files[name]
        assert main_type in {tensor.type for tensor in file.tensors}
        assert [t.name for t in file.tensors if t.type == Type.Q4_K] == ["position_embd.weight"]  # never quantised
        assert [t.name for t in file.tensors] == [t.name for t in before.tensors]
    checkpoint = Checkpoint(folder / "checkpoint", "kept", "folder")
    kept = load_file(folder / "checkpoint" / "model.safetensors")
    loaded = ChatModel.load(checkpoint, CPU)
    assert (folder / "checkpoint" / "tokenizer.json").is_file()
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert loaded.model_map.n_layers == 2
    exact = model.opened(folder / "tiny-Q8_0.gguf")
    for name, tensor in kept.items():
        packed = exact.tensors.packed.get(name)
        if packed is not None and packed.codec.label == "Q8_0":
            assert (tensor.float() - decoded(exact, name)).abs().max() < 0.02, name
    assert not [path for path in folder.rglob("*") if ".partial" in path.name or path.name.endswith(".edited")]


def test_an_earlier_edit_becomes_history(model: Model, source: Path, tmp_path: Path) -> None:
    first = applied_to(source, tmp_path / "first", options(model))
    second = applied_to(first.path, tmp_path / "second", options(model), refusal_pt=tmp_path / "refusal.pt")
    third = applied_to(second.path, tmp_path / "third", options(model), refusal_pt=tmp_path / "refusal.pt")
    one, two, three = (metadata(made.path) for made in (first, second, third))
    assert "history" not in one
    assert json.loads(two["history"]) == [one]
    earlier = {key: value for key, value in two.items() if key != "history"}
    assert json.loads(three["history"]) == [one, earlier]
    assert json.loads(three["source"])["revision"] == digest(second.path)
    assert list(read_gguf(third.path).metadata)[-1] == HISTORY


def test_block_sizes_do_not_matter(model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = applied_to(source, tmp_path / "whole", options(model))
    read: list[int] = []
    original = type(whole.tensors).read_packed_rows

    def counted(self: Any, name: str, expert: int | None, rows: slice) -> Any:
        read.append(rows.stop - rows.start)
        return original(self, name, expert, rows)

    monkeypatch.setattr(type(whole.tensors), "read_packed_rows", counted)
    monkeypatch.setattr(blocks, "BLOCK", 16 << 10)
    in_blocks = applied_to(source, tmp_path / "blocks", options(model))
    assert digest(whole.path) == digest(in_blocks.path)
    assert max(read) == 64
    edits = [EditRecord.load(tmp_path / name / "tiny.Q4_K_M.edit.safetensors") for name in ("whole", "blocks")]
    hashes = [[(m.source_hash, m.result_hash) for m in edit.matrices.values()] for edit in edits]
    assert hashes[0] == hashes[1]


# -- odd files ------------------------------------------------------------------------------------------------------


def test_a_type_that_cannot_be_encoded(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TQ1_0 can be read; edited tensors become Q2_K."""
    path, file = tmp_path / "ternary.gguf", read_gguf(model.path)
    write_ternary(file, path)
    source = model.opened(path)
    plan = planned(source)
    applied = write_gguf(source, examine(source).model_map, plan, tmp_path / "out.gguf", settings=SETTINGS)
    assert "TQ1_0 cannot be encoded, so the edited tensors are Q2_K" in capsys.readouterr().err
    written = source.with_file(tmp_path / "out.gguf")
    assert {t.type for t in written.file.tensors if t.name.endswith("ffn_down.weight")} == {Type.Q2_K}
    assert set(applied.packed_as.values()) == {"Q2_K", "F32"}
    checks = verify(source, written, ChatModel.load(written, CPU), plan, DIRECTION)
    assert [check for check in checks if not check.passed] == []


def write_ternary(file: Gguf, path: Path) -> None:
    kinds = {t.name: Type.TQ1_0 if t.name.endswith("ffn_down.weight") else t.type for t in file.tensors}
    with path.open("wb", buffering=0) as out:
        placed = write_header(out, file.metadata, [replace(t, type=kinds[t.name]) for t in file.tensors])
        for before, after in zip(file.tensors, placed, strict=True):
            data = file.path.read_bytes()[before.start : before.start + before.size]
            if after.type == Type.TQ1_0:
                values = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(before.rows, -1)
                data = quants.quantize(values.numpy(), Type.TQ1_0).tobytes()
            out.seek(after.start)
            out.write(data)


def test_a_second_copy_of_the_embedding(model: Model, tmp_path: Path) -> None:
    """A file may hold the embedding twice, in two types: both copies are edited, and both are verified."""
    path, file = tmp_path / "twice.gguf", read_gguf(model.path)
    embedding = next(tensor for tensor in file.tensors if tensor.name == "token_embd.weight")
    copy = replace(embedding, name="output.weight", type=Type.F16)
    data = file.path.read_bytes()
    with path.open("wb", buffering=0) as out:
        for before, after in zip(
            [*file.tensors, embedding], write_header(out, file.metadata, [*file.tensors, copy]), strict=True
        ):
            own = data[before.start : before.start + before.size]
            if after.name == copy.name:
                own = bytes(tensor_bytes(torch.frombuffer(bytearray(own), dtype=torch.float32).half()))
            out.seek(after.start)
            out.write(own)
    once = model.opened(model.path)
    parts = {**once.layout.parts, copy.name: once.layout.parts[embedding.name]}
    source = replace(once, file=read_gguf(path), revision=None, layout=replace(once.layout, parts=parts))
    plan = planned(source)
    write_gguf(source, examine(source).model_map, plan, tmp_path / "out.gguf", settings=SETTINGS, direction=DIRECTION)
    written = source.with_file(tmp_path / "out.gguf")
    second = next(tensor for tensor in written.file.tensors if tensor.name == copy.name)
    rows = written.path.read_bytes()[second.start : second.start + second.size]
    values = decode_tensor(bytearray(rows), "F16", (second.rows, second.row_length))
    assert (values @ R).abs().max() < 1e-3
    loaded = ChatModel.load(written, CPU)
    assert [check for check in verify(source, written, loaded, plan, DIRECTION) if not check.passed] == []
    before = next(tensor for tensor in source.file.tensors if tensor.name == copy.name)
    with written.path.open("r+b") as out:
        out.seek(second.start)
        out.write(path.read_bytes()[before.start : before.start + before.size])
    damaged = source.with_file(written.path)
    failed = [check for check in verify(source, damaged, loaded, plan, DIRECTION) if not check.passed]
    assert any("transformer.wte.weight" in check.where for check in failed)


def test_a_split_source_gives_one_file(model: Model, source: Path, tmp_path: Path) -> None:
    whole = applied_to(source, tmp_path / "whole", options(model))
    file = read_gguf(source)
    for number, tensors in enumerate((file.tensors[:7], file.tensors[7:])):
        numbers = {"no": number, "count": 2, "tensors.count": len(file.tensors)}
        entries = {f"split.{key}": value_of(value) for key, value in numbers.items()}
        entries = {**(file.metadata if number == 0 else {}), **entries}
        with (tmp_path / f"tiny-{number + 1:05}-of-00002.gguf").open("wb", buffering=0) as out:
            for before, after in zip(tensors, write_header(out, entries, tensors), strict=True):
                out.seek(after.start)
                out.write(source.read_bytes()[before.start : before.start + before.size])
    parts = tmp_path / "tiny-00001-of-00002.gguf"
    joined = applied_to(parts, tmp_path / "joined", options(model), refusal_pt=tmp_path / "refusal.pt")
    assert not any(key.startswith("split.") for key in joined.file.metadata)
    one, other = (made.path.read_bytes()[made.file.tensors[0].start :] for made in (whole, joined))
    assert one == other


# -- what is refused ------------------------------------------------------------------------------------------------


def test_refusals_leave_everything_as_it_was(model: Model, source: Path, tmp_path: Path) -> None:
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    store = tmp_path / "store"
    for name in ("blobs", "manifests"):
        (store / name).mkdir(parents=True)
    foreign = tmp_path / "foreign.gguf"
    shutil.copyfile(source, foreign)
    before[foreign] = digest(foreign)
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    for target, said in (
        (source, "is the model itself"),
        (link, "is the model itself"),
        (foreign, "is not a file that this program wrote"),
        (tmp_path / "edited.bin", "does not end in .gguf"),
        (store / "blobs" / "x.gguf", "lies in Ollama's own store"),
    ):
        with pytest.raises(UsageError, match=said):
            applied_to(source, None, options(model, output=target))
    for folder, said in ((source.parent, "holds the model itself"), (store, "holds something else")):
        with pytest.raises(UsageError, match=said):
            applied_to(source, folder, options(model))
    assert {path: digest(path) for path in before} == before
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gguf": GgufOptions()}, "give either --output-dir or --output"),
        ({"gguf": GgufOptions(output=Path("x.gguf"), keep_checkpoint=True)}, "--output takes one file alone"),
        ({"gguf": GgufOptions(output=Path("x.gguf"), quants=("Q8_0", "Q4_0"))}, "--output takes one file alone"),
        ({"gguf": GgufOptions(output=Path("x.gguf"), imatrix=Path("i"))}, "--imatrix is for --quant"),
        ({"gguf": GgufOptions(output=Path("x.gguf")), "out_dtype": "bf16"}, "--out-dtype bf16 has no meaning"),
        ({"gguf": GgufOptions(output=Path("x.gguf")), "shards": ShardSettings(2)}, "--workers and --link are for"),
        ({"gguf": GgufOptions(output=Path("x.gguf")), "cluster": object()}, "written as one, by one machine"),
    ],
)
def test_options_that_exclude_each_other(model: Model, source: Path, given: dict[str, Any], said: str) -> None:
    gguf = replace(given.pop("gguf"), base=str(model.checkpoint.folder))
    with pytest.raises(UsageError, match=said):
        apply(str(source), gguf=gguf, refusal_pt=source.parents[1] / "refusal.pt", settings=SETTINGS, **given)


def test_options_of_gguf_files_on_a_checkpoint(model: Model, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a GGUF file"):
        apply(
            str(model.checkpoint.folder), tmp_path / "out", gguf=GgufOptions(quants=("Q8_0",)),
            refusal_pt=tmp_path / "refusal.pt",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk(model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = source.stat().st_size
    monkeypatch.setattr(gguf_output, "free_space", lambda _: size - 1)
    target = tmp_path / "edited.gguf"
    with pytest.raises(ForgeError, match="the edited file needs"):
        applied_to(source, None, options(model, output=target))
    monkeypatch.setattr(gguf_output, "free_space", lambda _: size * 2)
    applied_to(source, None, options(model, output=target))
    assert not partial_of(target).exists()


def test_a_failure_leaves_the_old_file(
    model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "edited.gguf"
    applied_to(source, None, options(model, output=target))
    before = digest(target)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blocks.BlockwiseEdit, "encode_parts", fail)
    with pytest.raises(KeyboardInterrupt):
        applied_to(source, None, options(model, output=target))
    assert digest(target) == before
    assert not partial_of(target).exists()

"""``run`` on a GGUF file: the file is edited in place, measured, and registered; and its other forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf.file import read_gguf, value_of, write_header
from ollama_forge.cli.closing import closing_lines
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_workers import ShardSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.plan import ExportSettings, plan_export
from ollama_forge.files import read_json, sha256_file
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.names import run_output
from ollama_forge.ollama.registration import OllamaSettings
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.pipeline.report import Report
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.search.rule import Limits
from ollama_forge.sources.resolve import resolve
from tests import fake_ollama, tiny
from tests.gguf_models import Model
from tests.ollama_store import Store, gguf_of

WRITERS = EditSettings(
    targets=("writers",), skip_begin_layers=0, skip_end_layers=0, norm_preserving=False, strength=1.0
)
EDITED = ("attn_output.weight", "ffn_down.weight")


def settings(folder: Path, model: str, **changes: Any) -> RunSettings:
    """A short run: the edit is given, nothing is tried."""
    for side, seed in (("harmful", 1), ("harmless", 2)):
        (folder / f"{side}.txt").write_text("\n".join(tiny.lines(240, seed)), encoding="utf-8")
    made = RunSettings(
        model=model,
        name="tiny",
        output_dir=str(folder / "out"),
        prompts=PromptSettings(str(folder / "harmful.txt"), str(folder / "harmless.txt"), max_measured=12),
        load=LoadSettings(device="cpu", dtype="float32"),
        edit=WRITERS,
        allow_few_refusals=True,  # the weights are random
        ollama=OllamaSettings(register=False),
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def source(gguf_models: Mapping[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of several types."""
    path = tmp_path_factory.mktemp("source") / "source.gguf"
    gguf_models["llama"].with_types(path, lambda tensor: Type.Q4_K if "attn" in tensor.name else Type.Q6_K)
    return path


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSettings, Report]:
    made = settings(tmp_path_factory.mktemp("run"), str(source), keep_checkpoint=True)
    return made, run(made)


def test_the_file_is_edited_in_place(done: tuple[RunSettings, Report], source: Path) -> None:
    made, report = done
    before, after = read_gguf(source), read_gguf(made.folder / "tiny.gguf")
    assert report.verified
    assert [(t.name, t.shape, t.type) for t in after.tensors] == [(t.name, t.shape, t.type) for t in before.tensors]
    assert {key: after.metadata[key] for key in before.metadata} == dict(before.metadata)
    old, new = source.read_bytes(), (made.folder / "tiny.gguf").read_bytes()
    changed = {
        one.name
        for one, other in zip(before.tensors, after.tensors, strict=True)
        if old[one.start : one.start + one.size] != new[other.start : other.start + other.size]
    }
    assert changed == {tensor.name for tensor in before.tensors if tensor.name.endswith(EDITED)}


def test_it_is_measured_as_transformers_and_llama_cpp_run_it(done: tuple[RunSettings, Report]) -> None:
    _, report = done
    assert report.file is not None
    quant = report.file.quant
    assert list(report.rows) == ["base", "random direction", "edited", f"GGUF ({quant})"]
    file, edited = report.rows[f"GGUF ({quant})"], report.rows["edited"]
    assert replace(file.damage, answer_nll=None) == replace(edited.damage, answer_nll=None)  # the same weights
    assert edited.damage.first_token_kl.value > 0
    assert file.harmful.total == edited.harmful.total == 12
    assert report.file.quantised_by == "in place"
    assert report.tokens is not None


def test_records_lie_beside_it(
    done: tuple[RunSettings, Report], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, report = done
    provenance = read_json(made.folder / "abliteration.json")
    assert provenance["verified"] is True
    assert set(provenance["measurements"]) == set(report.rows)
    assert provenance["source"]["fingerprint"] == sha256_file(source)
    leaks = [entry["leak"] for entry in provenance["changed"].values()]
    assert len(leaks) == 24
    assert max(leaks) < 0.02
    record = EditRecord.load(made.folder / "tiny.edit.safetensors")
    assert sorted(record.matrices) == sorted(provenance["changed"])
    assert (made.folder / "checkpoint" / "model.safetensors").is_file()
    closing_lines(report, climbed=False, limits=Limits())
    out = capsys.readouterr().out
    for name in ("tiny.gguf", "tiny.edit.safetensors", "checkpoint", "Modelfile"):
        assert f"{made.folder / name} (" in out
    assert out.splitlines()[-1].endswith(str(made.folder / "tiny.gguf"))


def test_other_types_are_made_of_the_edit_itself(source: Path, tmp_path: Path) -> None:
    made = settings(tmp_path, str(source), export=ExportSettings("Q8_0,Q4_0"), evaluate=False)
    report = run(made)
    assert report.verified
    names = ["tiny-Q8_0.gguf", "tiny-Q4_0.gguf"]
    assert [file.path.name for file in report.files] == names
    for name, kind in zip(names, (Type.Q8_0, Type.Q4_0), strict=True):
        assert {t.type for t in read_gguf(made.folder / name).tensors if t.name.endswith(EDITED)} == {kind}
    assert sorted(path.name for path in made.folder.rglob("*.gguf")) == sorted(names)


def test_computed_on_the_hugging_face_release(
    gguf_models: Mapping[str, Model], source: Path, done: tuple[RunSettings, Report], tmp_path: Path
) -> None:
    base = gguf_models["llama"].checkpoint.folder
    made = settings(tmp_path, str(source), base=str(base), evaluate=False)
    report = run(made)
    assert report.verified
    one, other = (EditRecord.load(run.folder / "tiny.edit.safetensors") for run in (made, done[0]))
    assert one.matrices.keys() == other.matrices.keys()
    assert any((one.matrices[name].L != other.matrices[name].L).any() for name in one.matrices)  # another direction


def test_a_model_of_ollama_gets_an_adapter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    monkeypatch.setenv("OLLAMA_MODELS", str(store.path))
    data = source.read_bytes()
    store.add("smol", model=data, projector=gguf_of("mmproj"), system="Be brief.")
    blob = store.blob(data)
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        weights = [fake.keep(data), fake.keep(gguf_of("mmproj"))]
        fake.models["smol:latest"] = fake_ollama.Model(weights=weights, system="Be brief.")
        made = settings(tmp_path, "ollama:smol", ollama=OllamaSettings(as_adapter=True))
        report = run(made)
        (sent,) = fake.bodies("/api/create")
    adapter = made.folder / "tiny-adapter.gguf"
    assert sent["from"] == "smol:latest"
    assert sent["adapters"] == {adapter.name: f"sha256:{sha256_file(adapter)}"}
    assert adapter.stat().st_size < 0.1 * len(data)
    assert read_gguf(adapter).get("general.type") == "adapter"
    assert list(report.rows) == ["base", "random direction", "edited", "GGUF (adapter)", "in Ollama"]
    assert report.registered is not None
    assert report.registered.prompts.owner == "the checkpoint"
    assert not list(made.folder.glob("tiny.gguf"))
    assert blob.path.read_bytes() == data
    assert "the system prompt that smol:latest has in Ollama takes no part here" in capsys.readouterr().err


def test_a_name_stands_for_what_its_run_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("abliterate-org-tiny-x")
    folder.mkdir()
    for name in ("org-tiny-x-adapter.gguf", "other.gguf"):
        (folder / name).touch()
    with pytest.raises(ForgeError, match="holds no edited model"):
        run_output("org/tiny:x")
    for name in ("org-tiny-x-Q8_0.gguf", "org-tiny-x.gguf", "checkpoint"):
        (folder / name).mkdir() if name == "checkpoint" else (folder / name).touch()
        assert run_output("org/tiny:x") == folder / name


def test_options_without_a_meaning(source: Path, gguf_models: Mapping[str, Model], tmp_path: Path) -> None:
    folder = str(gguf_models["llama"].checkpoint.folder)
    for changes, match in (
        ({"model": folder, "keep_checkpoint": True}, "--keep-checkpoint has no meaning"),
        ({"model": str(source), "out_dtype": "bf16"}, "--out-dtype has no meaning"),
        ({"model": str(source), "shards": ShardSettings(link=True)}, "--workers and --link are for"),
        ({"model": str(source), "export": ExportSettings(llama_cpp_dir="x")}, "--llama-cpp-dir has no use"),
        ({"model": folder, "base": folder}, "--base is for a GGUF file"),
    ):
        with pytest.raises(UsageError, match=match):
            run(replace(settings(tmp_path, ""), **changes))
    assert not (tmp_path / "out").exists()


def split(source: Path, folder: Path) -> list[Path]:
    """A file in two parts, as llama.cpp splits it."""
    file, data, parts = read_gguf(source), source.read_bytes(), []
    half = len(file.tensors) // 2
    for number, tensors in enumerate((file.tensors[:half], file.tensors[half:])):
        parts.append(folder / f"split-0000{number + 1}-of-00002.gguf")
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": len(file.tensors)}
        metadata = {**(file.metadata if number == 0 else {}), **{key: value_of(value) for key, value in keys.items()}}
        with parts[-1].open("wb", buffering=0) as out:
            for before, after in zip(tensors, write_header(out, metadata, tensors), strict=True):
                out.seek(after.start)
                out.write(data[before.start : before.start + before.size])
    return parts


def test_a_split_file_is_edited_to_one_file(source: Path, tmp_path: Path) -> None:
    parts = split(source, tmp_path)
    made = settings(tmp_path, str(parts[1]), evaluate=False)
    report = run(made)
    assert report.verified
    whole = read_gguf(source)
    joined = read_gguf(made.folder / "tiny.gguf")
    assert [(t.name, t.shape, t.type) for t in joined.tensors] == [(t.name, t.shape, t.type) for t in whole.tensors]
    assert joined.parts == (made.folder / "tiny.gguf",)


@pytest.mark.parametrize("changes", [{"keep_checkpoint": True}, {"keep_undo": True}])
def test_an_adapter_leaves_nothing_to_keep(changes: dict[str, Any]) -> None:
    adapter = OllamaSettings(as_adapter=True)
    with pytest.raises(UsageError, match="have no effect"):
        RunSettings(model="ollama:x", name="x", ollama=adapter, edit=WRITERS, **changes).check()


def test_an_importance_matrix_has_no_effect_on_floats() -> None:
    with pytest.raises(UsageError, match="--imatrix has no effect"):
        ExportSettings(requantize=False, imatrix="x.gguf")


def test_an_importance_matrix_is_looked_at_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="IQ2_XS has too few bits"):
        ExportSettings("Q8_0,IQ2_XS")
    (tmp_path / "damaged.dat").write_bytes(b"\x01\x00\x00\x00\xff")
    with pytest.raises(ForgeError, match=r"damaged\.dat is not an importance matrix"):
        run(settings(tmp_path, str(source), export=ExportSettings("Q8_0", imatrix=str(tmp_path / "damaged.dat"))))
    assert not (tmp_path / "out").exists()


def test_the_files_of_a_gguf_source_are_counted_once(source: Path, tmp_path: Path) -> None:
    checkpoint = resolve(str(source))
    assert plan_export(checkpoint, "x", tmp_path, ExportSettings("Q8_0")).disk_space == 0
    assert plan_export(checkpoint, "x", tmp_path, ExportSettings()).files[0].quant == "F32"  # what the file states

"""refusal.pt: writing is deterministic, every common form is read, and the file of another model is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ollama_forge.cli.abliterate import apply
from ollama_forge.directions.basis import independent_rows, orthonormal
from ollama_forge.directions.direction import FORMAT, RefusalDirection
from ollama_forge.errors import ForgeError
from tests import tiny

D, L, K = 32, 4, 3


def rows(count: int, seed: int = 0, d: int = D) -> Tensor:
    """Unit rows, orthonormal while there are no more than ``d``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, count, generator=generator, dtype=torch.float64)).Q.T.float().contiguous()


def load(path: Path) -> RefusalDirection:
    return RefusalDirection.load(path, D, L)


def stored(path: Path, content: Any, **sidecar: Any) -> Path:
    torch.save(content, path)
    if sidecar:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


FULL = RefusalDirection(
    rows(1),
    layer=2.5,
    position=-2,
    method="difference-of-means",
    details={"seed": 7, "fingerprint": "abc", "candidates": [{"layer": 1, "score": 0.5}], "note": "é"},
)


@pytest.mark.parametrize(
    "direction",
    [
        FULL,
        RefusalDirection(rows(K), method="svd", layer=1),
        RefusalDirection(rows(L), per_layer=True, method="difference-of-means", details={"seed": 1}),
        RefusalDirection(rows(1)),
    ],
)
def test_what_is_saved_is_loaded(tmp_path: Path, direction: RefusalDirection) -> None:
    path = tmp_path / "deep" / "refusal.pt"
    direction.save(path)
    found = load(path)
    assert torch.allclose(found.vectors, direction.vectors, atol=1e-7)
    assert found.vectors.dtype == torch.float32
    for name in ("per_layer", "layer", "position", "method", "details"):
        assert getattr(found, name) == getattr(direction, name)
    assert sorted(file.name for file in path.parent.iterdir()) == ["refusal.json", "refusal.pt"]


def test_the_sidecar_says_what_the_file_holds(tmp_path: Path) -> None:
    FULL.save(tmp_path / "refusal.pt")
    sidecar = json.loads((tmp_path / "refusal.json").read_text(encoding="utf-8"))
    assert sidecar == {
        "format": FORMAT,
        "method": "difference-of-means",
        "kind": "directions",
        "shape": [1, D],
        "layer": 2.5,
        "position": -2,
        **FULL.details,
    }


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    for name in ("refusal.pt", "another-name.pt", "sub/x.pt"):
        FULL.save(tmp_path / name)
    first = (tmp_path / "refusal.pt").read_bytes()
    sidecar = (tmp_path / "refusal.json").read_bytes()
    FULL.save(tmp_path / "refusal.pt")
    for name in ("refusal.pt", "another-name.pt", "sub/x.pt"):
        assert (tmp_path / name).read_bytes() == first
        assert (tmp_path / name).with_suffix(".json").read_bytes() == sidecar
    RefusalDirection(rows(1, seed=1)).save(tmp_path / "refusal.pt")
    assert (tmp_path / "refusal.pt").read_bytes() != first


def test_a_slice_is_saved_without_the_rest(tmp_path: Path) -> None:
    RefusalDirection(rows(L)[1:2]).save(tmp_path / "slice.pt")
    RefusalDirection(rows(L)[1:2].clone()).save(tmp_path / "clone.pt")
    assert (tmp_path / "slice.pt").stat().st_size == (tmp_path / "clone.pt").stat().st_size


def test_each_layer_gets_its_directions() -> None:
    several = RefusalDirection(rows(K))
    assert torch.equal(several.for_layer(3), several.vectors)
    layered = RefusalDirection(rows(L), per_layer=True)
    assert all(torch.equal(layered.for_layer(i), layered.vectors[i : i + 1]) for i in range(L))
    assert several.d_model == layered.d_model == D


# Forms in use

FORMS: dict[str, tuple[Callable[[], Any], int]] = {
    "(d,)": (lambda: rows(1)[0], 1),
    "(1, d)": (lambda: rows(1), 1),
    "(d, 1)": (lambda: rows(1).T, 1),
    "(d, k)": (lambda: rows(K).T, K),
    "(k, d)": (lambda: rows(K), K),
    "a parameter": (lambda: torch.nn.Parameter(rows(1)), 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 12.5])
def test_forms_of_directions(tmp_path: Path, form: str, dtype: torch.dtype, scale: float) -> None:
    make, count = FORMS[form]
    content = make()
    found = load(
        stored(tmp_path / "refusal.pt", (content.data * scale).to(dtype) if form != "a parameter" else content)
    )
    assert found.vectors.dtype == torch.float32
    assert found.vectors.shape == (count, D)
    assert not found.vectors.requires_grad
    assert torch.allclose(found.vectors, rows(count), atol=0.02 if dtype.itemsize == 2 else 1e-6)
    assert torch.allclose(found.vectors.norm(dim=-1), torch.ones(count), atol=1e-6)
    assert (found.per_layer, found.layer, found.position, found.method) == (False, None, -1, "unknown")


def test_a_dictionary_per_layer(tmp_path: Path) -> None:
    found = load(stored(tmp_path / "refusal.pt", {"per_layer": True, "directions": rows(L) * 3}))
    assert found.per_layer
    assert torch.allclose(found.vectors, rows(L), atol=1e-6)


def test_a_dictionary_not_per_layer(tmp_path: Path) -> None:
    found = load(stored(tmp_path / "refusal.pt", {"per_layer": False, "directions": rows(L)}))
    assert not found.per_layer
    assert found.vectors.shape == (L, D)


def test_mean_diffs_give_the_last_position_per_layer(tmp_path: Path) -> None:
    differences = torch.stack([rows(L, seed=1) * 2, rows(L, seed=2) * 5])
    found = load(stored(tmp_path / "mean_diffs.pt", differences))
    assert found.per_layer
    assert torch.allclose(found.vectors, rows(L, seed=2), atol=1e-6)


def test_the_first_layer_without_a_difference_gets_the_next_ones(tmp_path: Path) -> None:
    """Before the first layer the last position holds the same token of the template in every prompt."""
    differences = rows(L, seed=2).double().repeat(2, 1, 1)
    differences[-1, 0] = torch.randn(D, dtype=torch.float64) * 1e-16
    found = load(stored(tmp_path / "mean_diffs.pt", differences)).vectors
    assert torch.allclose(found, rows(L, seed=2)[[1, 1, 2, 3]], atol=1e-6)
    differences[-1, 2] = 0.0
    with pytest.raises(ForgeError, match="zero"):
        load(stored(tmp_path / "mean_diffs.pt", differences))


def test_rows_are_layers_where_the_sidecar_says_so(tmp_path: Path) -> None:
    path = stored(tmp_path / "refusal.pt", rows(L), kind="per-layer")
    assert load(path).per_layer
    path.with_suffix(".json").write_text('{"kind": "directions"}')
    assert not load(path).per_layer


# Which kind the rows are


@pytest.mark.parametrize("content", ["rows", "columns", "dictionary"])
@pytest.mark.parametrize("count", [L, L + 1, D - 1])
def test_rows_of_an_unknown_kind_are_refused(tmp_path: Path, count: int, content: str) -> None:
    vectors = rows(count)
    forms: dict[str, Any] = {"rows": vectors, "columns": vectors.T, "dictionary": {"directions": vectors}}
    path = stored(tmp_path / "refusal.pt", forms[content])
    with pytest.raises(ForgeError, match=f"holds {count} directions") as refusal:
        load(path)
    assert "--per-layer" in refusal.value.hint
    assert "--joint" in refusal.value.hint
    joint = RefusalDirection.load(path, D, L, per_layer=False)
    assert not joint.per_layer
    assert torch.allclose(joint.vectors, vectors, atol=1e-6)
    if count == L:
        layered = RefusalDirection.load(path, D, L, per_layer=True)
        assert layered.per_layer
        assert torch.allclose(layered.vectors, vectors, atol=1e-6)
    else:
        with pytest.raises(ForgeError, match=f"{count} layers, this model has {L}"):
            RefusalDirection.load(path, D, L, per_layer=True)


def test_as_many_rows_as_a_small_model_has_layers_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "refusal.pt", rows(2))
    with pytest.raises(ForgeError, match="joint or one for each layer"):
        RefusalDirection.load(path, D, 2)
    assert len(RefusalDirection.load(path, D, 3).vectors) == 2
    assert len(RefusalDirection.load(stored(tmp_path / "one.pt", rows(1)), D, 1).vectors) == 1


def test_apply_is_told_which_kind_the_rows_are(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    stored(tmp_path / "rows.pt", rows(L))
    RefusalDirection(rows(L), per_layer=True).save(tmp_path / "layers.pt")

    def weights(name: str, *options: str) -> bytes:
        folder = tmp_path / f"edited-{name}{''.join(options)}"
        command = ["--model", str(source.folder), "--output-dir", str(folder), "--refusal-pt", str(tmp_path / name)]
        apply.main([*command, "--targets", "writers", *options], standalone_mode=False)
        return (folder / "model.safetensors").read_bytes()

    with pytest.raises(ForgeError, match="joint or one for each layer"):
        weights("rows.pt")
    assert weights("rows.pt", "--per-layer") == weights("layers.pt") != weights("rows.pt", "--joint")


@pytest.mark.parametrize("layered", [True, False])
def test_a_file_is_not_taken_for_the_other_kind(tmp_path: Path, layered: bool) -> None:
    path = tmp_path / "refusal.pt"
    RefusalDirection(rows(L), per_layer=layered).save(path)
    assert RefusalDirection.load(path, D, L, per_layer=layered).per_layer == layered
    with pytest.raises(ForgeError, match="says that it holds"):
        RefusalDirection.load(path, D, L, per_layer=not layered)


def test_the_sidecar_of_another_file_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RefusalDirection(rows(1), layer=2).save(tmp_path / "refusal.pt")
    found = load(stored(tmp_path / "refusal.pt", rows(2)))
    assert (found.layer, len(found.vectors)) == (None, 2)
    assert "describes another file" in capsys.readouterr().err


# Joint directions are orthonormal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_repeated_direction_does_not_become_another_axis(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = rows(2)
    found = load(stored(tmp_path / "refusal.pt", torch.stack([first, -2.7 * first, second]).to(dtype)))
    assert torch.allclose(found.vectors, rows(2), atol=0.02 if dtype.itemsize == 2 else 1e-6)
    assert "1 of the 3 directions" in capsys.readouterr().err


def test_joint_directions_are_made_orthonormal(tmp_path: Path) -> None:
    first, second = rows(2)
    found = load(stored(tmp_path / "refusal.pt", torch.stack([first, 0.8 * first + 0.6 * second]))).vectors
    assert torch.allclose(found @ found.T, torch.eye(2), atol=1e-6)
    assert torch.allclose(found, rows(2), atol=1e-6)


def test_a_basis_spans_what_it_is_given() -> None:
    first, second, third = rows(3)
    mixed = torch.stack([first, first, second, first - 3 * second, third + first])
    assert independent_rows(mixed) == [0, 2, 4]
    basis = orthonormal(mixed)
    assert basis.shape == (D, 3)
    assert torch.allclose(basis @ basis.T, rows(3).T @ rows(3), atol=1e-6)


@pytest.mark.parametrize("content", ["not json", "[]", "3", "\udcff", '{"layer": "x"}', '{"kind": "guess"}'])
def test_a_bad_sidecar_does_no_harm(tmp_path: Path, content: str) -> None:
    path = stored(tmp_path / "refusal.pt", rows(1))
    path.with_suffix(".json").write_bytes(content.encode(errors="surrogateescape"))
    assert torch.allclose(load(path).vectors, rows(1), atol=1e-6)


# Refusals


def per_layer_of(count: int) -> dict[str, Any]:
    return {"per_layer": True, "directions": rows(count)}


def spoilt(value: float) -> Tensor:
    vectors = rows(K)
    vectors[1, 5] = value
    return vectors


OTHER_MODEL: dict[str, Any] = {
    "too long": rows(1, d=D + 1),
    "too short": rows(1, d=D - 1)[0],
    "neither axis": torch.ones(5, 7),
    "layers of a dictionary": per_layer_of(L + 1),
    "width of a dictionary": {"per_layer": True, "directions": rows(L, d=D * 2)},
    "mean_diffs of more layers": torch.ones(2, L + 1, D),
    "mean_diffs of another width": torch.ones(2, L, D + 1),
    "four axes": torch.ones(1, 1, 1, D),
    "a scalar": torch.tensor(1.0),
}


@pytest.mark.parametrize("case", OTHER_MODEL)
def test_the_direction_of_another_model_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(ForgeError, match="of another model"):
        load(stored(tmp_path / "refusal.pt", OTHER_MODEL[case]))


def test_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match=f"5 layers, this model has {L}"):
        load(stored(tmp_path / "refusal.pt", rows(5), kind="per-layer"))


UNUSABLE: dict[str, Any] = {
    "nan": spoilt(float("nan")),
    "infinite": spoilt(float("inf")),
    "zero": torch.zeros(1, D),
    "one zero among several": torch.cat([rows(1), torch.zeros(1, D)]),
    "a zero layer": {"per_layer": True, "directions": torch.cat([rows(L - 1), torch.zeros(1, D)])},
    "no rows": torch.zeros(0, D),
    "no positions": torch.zeros(0, L, D),
    "integers": torch.ones(1, D, dtype=torch.int64),
    "complex": torch.ones(1, D, dtype=torch.complex64),
    "a list": [1.0, 2.0],
    "a number": 3,
    "an empty dictionary": {},
    "a state dict": {"weight": rows(1)},
    "none": None,
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_direction_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(ForgeError):
        load(stored(tmp_path / "refusal.pt", UNUSABLE[case]))


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="does not exist"):
        load(tmp_path / "none.pt")


def test_a_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ForgeError):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"])
def test_a_text_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "refusal.pt").write_bytes(content)
    with pytest.raises(ForgeError, match="not a tensor file"):
        load(tmp_path / "refusal.pt")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside a dictionary"])
def test_code_in_a_file_is_not_run(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "refusal.pt", tmp_path / "mark"
    trap: Any = Trap(mark)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif kind == "inside a dictionary":
        torch.save({"per_layer": True, "directions": rows(L), "more": trap}, path)
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ForgeError, match="not a tensor file"):
        load(path)
    assert not mark.exists()


def sample(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(rows(1), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SAMPLE, OLD_SAMPLE = sample(True), sample(False)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(SAMPLE)),
)
def test_a_damaged_file_is_read_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(SAMPLE)
    for place, value in changes:
        damaged[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "refusal.pt"
        for content in (damaged, damaged[:cut]):
            path.write_bytes(content)
            try:
                found = load(path)
            except ForgeError:
                continue
            assert found.vectors.shape[-1] == D


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_pickle_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    """The old format has no checksums: the unpickler sees the damage."""
    damaged = bytearray(OLD_SAMPLE)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "refusal.pt"
        path.write_bytes(damaged)
        try:
            found = load(path)
        except ForgeError:
            return
        assert found.vectors.shape[-1] == D


# The reference implementation's use of the file


def test_the_file_works_in_the_reference_arithmetic(tmp_path: Path) -> None:
    unit = tiny.unit_vector(3)
    RefusalDirection(unit.unsqueeze(0) * 1.0).save(tmp_path / "refusal.pt")
    loaded = torch.load(tmp_path / "refusal.pt", weights_only=True)
    assert loaded.shape == (1, D)
    assert loaded.dtype == torch.float32
    column = loaded.view(-1, 1)
    assert column.norm().item() == pytest.approx(1.0, abs=1e-6)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    removed = x - (x @ column) * column.T
    assert (removed @ column).abs().max().item() < 1e-5
    assert torch.allclose(removed + (x @ unit).outer(unit), x, atol=1e-5)

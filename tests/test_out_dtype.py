"""Storage types of the edited checkpoint, the estimate of its size, and the ``dtype`` in its config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollama_forge.api import apply
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import stored_tensor
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import edit_file_path, output_size, weights_size
from ollama_forge.edits.out_dtype import HELP, OutDtype
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json
from tests import tiny
from tests.test_apply import packed_gpt_oss

R = tiny.unit_vector(7)
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL = EditSettings(targets=("attention", "mlp", "embedding"))


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    RefusalDirection(R.unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


def stored_as(folder: Path, kinds: dict[str, str], family: str = "llama") -> Checkpoint:
    """A tiny model whose tensors are stored in the type of the first pattern that their name matches."""
    tiny.save(tiny.build(family), folder)
    tensors = {
        name: tensor.to(TYPES[next(kind for pattern, kind in kinds.items() if re.search(pattern, name))])
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder, folder.name, "folder")


MIXED = {"norm": "F32", "q_proj": "F64", "embed": "BF16", "": "F16"}


@pytest.mark.parametrize("rule", OutDtype)
def test_each_tensor_is_stored_as_the_rule_says(tmp_path: Path, refusal: Path, rule: OutDtype) -> None:
    source = stored_as(tmp_path / "model", MIXED)
    _, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=ALL, out_dtype=rule)
    after = Checkpoint(tmp_path / "edited", "edited", "folder").tensors
    assert len(applied.changed) > 10
    for name, info in source.tensors.items():
        assert after[name].dtype == ("BF16" if rule is OutDtype.BF16 else info.dtype), name
        if name in applied.changed:
            continue
        before = source.tensors.read_bytes(name)
        if after[name].dtype == info.dtype:
            assert after.read_bytes(name) == before
        else:
            rounded = stored_tensor(before, info.dtype, info.shape).float().bfloat16()
            torch.testing.assert_close(stored_tensor(after.read_bytes(name), "BF16", info.shape), rounded)


def test_the_default_leaves_what_is_not_edited_as_it_is(tmp_path: Path, refusal: Path) -> None:
    source = stored_as(tmp_path / "model", MIXED)
    result, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
    for name in source.tensors.keys() - applied.changed:
        assert result.tensors.read_bytes(name) == source.tensors.read_bytes(name)


@pytest.mark.parametrize("rule", OutDtype)
@pytest.mark.parametrize("kind", [*TYPES, "mixed", "sharded", "MXFP4"])
def test_the_size_promised_is_an_upper_bound(tmp_path: Path, refusal: Path, rule: OutDtype, kind: str) -> None:
    model = tmp_path / "model"
    if kind == "MXFP4":
        source = packed_gpt_oss(model)
    elif kind == "sharded":
        source = tiny.save(tiny.build("llama"), model, max_shard_size="30KB")
    else:
        source = stored_as(model, MIXED if kind == "mixed" else {"": kind})
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=ALL, out_dtype=rule)
    shards = sum(path.stat().st_size for path in (tmp_path / "edited").glob("*.safetensors"))
    index = sum(path.stat().st_size for path in (tmp_path / "edited").glob("*.index.json"))
    promised = weights_size(source, rule)
    assert shards + index <= promised <= shards + index + 512 * len(source.tensors)
    everything = sum(path.stat().st_size for path in (tmp_path / "edited").rglob("*"))
    assert everything + edit_file_path(tmp_path / "edited").stat().st_size <= output_size(source, rule)


def test_the_size_of_packed_experts_that_are_kept_is_bounded_too(tmp_path: Path, refusal: Path) -> None:
    source = packed_gpt_oss(tmp_path / "model")
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, out_dtype="keep")
    assert (tmp_path / "edited" / "model.safetensors").stat().st_size <= weights_size(source, OutDtype.KEEP)


def configured(folder: Path, **entries: Any) -> None:
    """Set entries of config.json (None: leave the key out), in a layout that this program does not write."""
    config = {**read_json(folder / "config.json"), **entries}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=5))


@pytest.mark.parametrize(
    ("stated", "rule", "written"),
    [
        ({"dtype": "float16"}, "auto", {"dtype": "float16"}),
        ({"dtype": "float32"}, "auto", {"dtype": "float16"}),
        ({"dtype": "float16"}, "bf16", {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, "bf16", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "torch.float16"}, "keep", {"torch_dtype": "torch.float16"}),
        ({"dtype": None}, "bf16", {}),
    ],
)
def test_the_config_names_the_type_of_most_bytes(
    tmp_path: Path, refusal: Path, stated: dict[str, Any], rule: str, written: dict[str, Any]
) -> None:
    source = stored_as(tmp_path / "model", MIXED)
    configured(source.folder, **stated)
    before = (source.folder / "config.json").read_bytes()
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, out_dtype=rule)
    after = read_json(tmp_path / "edited" / "config.json")
    assert {key: after[key] for key in ("dtype", "torch_dtype") if key in after} == written
    assert after == {**json.loads(before), **written}
    same = written == {key: value for key, value in stated.items() if value is not None}
    assert ((tmp_path / "edited" / "config.json").read_bytes() == before) == same


def test_the_config_of_the_text_model_names_it_too(tmp_path: Path, refusal: Path) -> None:
    source = stored_as(tmp_path / "model", {"": "F16"}, "gemma3")
    text = {**source.config["text_config"], "dtype": "float32"}
    configured(source.folder, dtype="float32", text_config=text)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
    after = read_json(tmp_path / "edited" / "config.json")
    wanted = {**read_json(source.folder / "config.json"), "dtype": "float16"}
    assert after == {**wanted, "text_config": {**text, "dtype": "float16"}}


def test_an_edit_too_large_for_float16_says_what_to_do(tmp_path: Path, refusal: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    tensors = load_file(source.folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = (R / R.abs().max()).unsqueeze(1).expand(tiny.D, tiny.D).contiguous() * 60000
    save_file({k: v.half() for k, v in tensors.items()}, source.folder / "model.safetensors", metadata={"format": "pt"})
    doubling = EditSettings(targets=("writers",), strength=-1.0, norm_preserving=False)
    with pytest.raises(ForgeError, match=f"{name} holds the value 1.*too large for F16") as failure:
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=doubling)
    assert failure.value.hint == "use --out-dtype bf16"
    assert not (tmp_path / "edited").exists()
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=doubling, out_dtype="bf16")
    assert load_file(tmp_path / "edited" / "model.safetensors")[name].isfinite().all()


def test_the_documentation_says_what_help_says() -> None:
    page = (Path(__file__).parent.parent / "docs/run.md").read_text(encoding="utf-8")
    assert HELP.removesuffix(".") in page.replace("`", "").replace(" (default)", "")

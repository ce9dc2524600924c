"""``inspect``: the map of a model and what an edit would change, loud channels, and models on a stand-in Hub."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ollama_forge.api import apply
from ollama_forge.architectures.certificate.certificate import Certificate, EditKind, Failure, Leak, Tier
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cli.inspected import print_inspection
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import proven
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.proven import Examined, describe_certificate, with_proofs
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.inspection import inspect
from ollama_forge.inspection.rows import matrix_rows
from tests import tiny
from tests.fake_hub import Repository, environment, serving

SETTINGS = EditSettings(targets=("attention", "mlp", "embedding"), skip_end_layers=0, strength_kernel="linear-peak")


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


# The map


@pytest.mark.parametrize("family", ["llama-bias", "gemma3", "gpt2", "gpt_oss", "falcon"])
def test_what_inspect_calls_edited_is_what_the_edit_changes(tmp_path: Path, family: str) -> None:
    checkpoint = tiny.save(tiny.build(family), tmp_path / "model")
    model, read = map_checkpoint(checkpoint), vector_reader(checkpoint.tensors)
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=None)
    plan = plan_orthogonal(model, direction, SETTINGS, read)
    found = inspect(str(checkpoint.folder), settings=SETTINGS)
    assert {row.tensor: row.strength for row in found.matrices if row.reason is None} == {
        name: edit.strength for name, edit in plan.edits.items()
    }
    assert {row.tensor: row.reason for row in found.matrices if row.strength is None} == plan.skipped
    assert {row.tensor: row.norms != () for row in found.matrices} == {
        matrix.tensor: bool(matrix.post_norms if matrix.writes else matrix.reads) for matrix in model.matrices
    }


def test_sizes_and_tensors_without_a_role(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build("gemma3"), tmp_path / "model")
    found = inspect(str(checkpoint.folder))
    assert (found.model_type, found.tied, found.tier) == ("gemma3", True, Tier.PROVEN)
    assert found.sizes is not None
    assert (found.sizes.d_model, found.sizes.layers, found.sizes.vocabulary) == (tiny.D, 4, tiny.VOCABULARY)
    assert found.sizes.parameters == sum(
        value.numel() for value in load_file(checkpoint.folder / "model.safetensors").values()
    )
    projections = ("_proj.weight", "embed_tokens.weight")
    layer_norms = tuple(f"{name}layernorm.weight" for name in ("", "input_", "attention_", "feedforward_"))
    unused = [
        name
        for name in checkpoint.tensors
        if not (name.startswith("language_model") and name.endswith((*projections, *layer_norms)))
    ]
    assert found.unused is not None
    assert found.unused.count == len(unused)
    assert found.unused.parameters == sum(checkpoint.tensors[name].count for name in unused)
    assert any(name.startswith("vision_tower") for name in found.unused.groups)


def test_all_experts_of_a_layer_are_one_row(tmp_path: Path) -> None:
    """Whether they are a stack, or each a tensor of its own."""
    checkpoint = tiny.save(tiny.build("gpt_oss"), tmp_path / "model")
    model = map_checkpoint(checkpoint)
    stack = next(matrix for matrix in model.matrices if matrix.role is Role.DOWN and matrix.layer == 2)
    assert [row.experts for row in matrix_rows(model, checkpoint.tensors, SETTINGS) if row.tensor == stack.tensor] == [
        4
    ]
    names = [f"model.layers.2.mlp.experts.{number}.down_proj.weight" for number in range(3)]
    rewrite(checkpoint.folder, **{name: torch.zeros(32, 48) for name in names})
    apart = tuple(
        replace(stack, tensor=name, shape=(32, 48), experts=False, expert=number, bias=None)
        for number, name in enumerate(names)
    )
    tensors = Checkpoint(checkpoint.folder, "apart", "folder").tensors
    (row,) = matrix_rows(replace(model, matrices=apart), tensors, SETTINGS)
    assert (row.tensor, row.experts, row.shape) == ("model.layers.2.mlp.experts.N.down_proj.weight", 3, (32, 48))


def test_a_model_that_cannot_be_edited_is_refused_and_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    rewrite(folder, **{"model.layers.0.self_attn.odd.weight": torch.zeros(2, 2)})
    found = inspect(str(folder))
    assert found.tier is Tier.REFUSED
    assert "self_attn.odd.weight" in found.reasons[0]
    assert found.to_json()["tier"] == "refused"
    rewrite(folder, **{"model.layers.0.self_attn.odd.weight": torch.zeros(2, 2, dtype=torch.int32)})
    set_config(folder, quantization_config={"quant_method": "awq"})
    assert "AWQ" in inspect(str(folder)).reasons[0]
    with pytest.raises(ForgeError, match="does not exist"):
        inspect(str(tmp_path / "nowhere"))


# Loud channels


def loud(folder: Path, layers: tuple[int, ...], gain: float, part: str = "feedforward") -> list[str]:
    """The warnings about a Gemma 3 whose post-norms have this gain at channel 7 in these layers."""
    checkpoint = tiny.save(tiny.build("gemma3_text"), folder)
    planted = {}
    for layer in layers:
        name = f"model.layers.{layer}.post_{part}_layernorm.weight"
        planted[name] = load_file(folder / "model.safetensors")[name].clone()
        planted[name][7] = gain - 1
    rewrite(folder, **planted)
    return list(inspect(str(checkpoint.folder)).warnings)


@pytest.mark.parametrize("part", ["feedforward", "attention"])
def test_a_channel_that_the_post_norms_amplify_is_warned_of(tmp_path: Path, part: str) -> None:
    median = 2.0  # about: the gains of tiny models are drawn around 2
    (warning,) = loud(tmp_path / "all", (0, 1, 2, 3), 6 * median, part)
    assert warning.startswith("channel 7 of the residual stream is loud")
    assert ("MLP's post-norm" if part == "feedforward" else "attention's post-norm") in warning
    assert "every layer" in warning
    assert "--method projected" in warning


def test_how_loud_is_too_loud(tmp_path: Path) -> None:
    assert loud(tmp_path / "none", (), 0) == []
    assert loud(tmp_path / "gemma2", (0, 1, 2, 3), 2.7 * 2.0) == []
    assert loud(tmp_path / "half", (1,), 6 * 2.0) == []  # one layer's write is soon drowned by the others'
    (warning,) = loud(tmp_path / "one", (1,), 40 * 2.0)  # but not this one
    assert "in 1 of 4 layers" in warning


def test_a_loud_channel_of_the_reading_norms_is_no_warning(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    gains = {name: load_file(folder / "model.safetensors")[name].clone() for name in names}
    for gain in gains.values():
        gain[5] = -30.0
    rewrite(folder, **gains)
    found = inspect(str(folder))
    assert found.warnings == ()
    assert [(channel.channel, channel.part, channel.post_norms) for channel in found.loud] == [(5, "attention", False)]
    assert found.loud[0].ratio > 10


# Proof


BLOCKS = tuple(f"layers.{layer}" for layer in range(4))
LEAKS = tuple(Leak(layer, f"layers.{layer}", 3e-7, 0.5, 0) for layer in range(4))
FAILURE = Failure(EditKind.WRITERS, 2, "layers.2.odd", 0.2, "layer 2: odd still writes 0.2")
PARTIAL = Certificate(BLOCKS, LEAKS, LEAKS, (FAILURE,), ())


@pytest.fixture
def partly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose writers of layer 2 are not proven."""
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder

    def examine(checkpoint: Checkpoint, **_: object) -> Examined:
        own = replace(map_checkpoint(checkpoint), alike=tuple((block,) for block in BLOCKS))  # its own twin
        return Examined(with_proofs(own, PARTIAL), PARTIAL)

    for module in ("ollama_forge.api", "ollama_forge.inspection.main"):
        monkeypatch.setattr(f"{module}.examine", examine)
    return folder


def test_a_partly_proven_model_is_edited_where_it_is_proven(
    partly: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pt = tmp_path / "edited", tmp_path / "r.pt"
    RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2).save(pt)
    settings = EditSettings(targets=("attention", "mlp"))
    with pytest.raises(ForgeError, match="layer 2: odd still writes") as caught:
        apply(str(partly), out, refusal_pt=pt, settings=settings)
    assert "--allow-partial" in caught.value.hint
    assert not out.exists()
    _, applied = apply(str(partly), out, refusal_pt=pt, settings=settings, allow_partial=True)
    assert "2 of 14 matrices are not proven and left as they are: layer 2: odd still writes" in capsys.readouterr().err
    layer = {name for name in applied.changed if ".layers.2." in name}
    assert {name.split(".")[-2] for name in layer} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert any("layers.1.mlp.down_proj" in name for name in applied.changed)
    record = json.loads((out / "abliteration.json").read_text(encoding="utf-8"))
    assert record["certificate"]["tier"] == "partial"
    writers = {f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert record["certificate"]["unproven"] == dict.fromkeys(writers, FAILURE.message)
    assert {name for name, reason in record["skipped"].items() if reason.startswith("not proven")} == writers
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "**Tier: partial.** 2 matrices" in card
    assert FAILURE.message in card


def test_an_edit_file_does_not_touch_what_is_not_proven(
    partly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EditSettings(targets=("writers",))
    direction = tmp_path / "r.pt"
    RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2).save(direction)
    with monkeypatch.context() as undone:
        undone.setattr("ollama_forge.api.examine", proven.examine)
        apply(str(partly), tmp_path / "whole", refusal_pt=direction, settings=settings)
    edit = tmp_path / "whole.edit.safetensors"
    _, applied = apply(str(partly), tmp_path / "part", edit_file=edit, allow_partial=True)
    assert {name.split(".")[2] for name in applied.changed} == {"1"}


def test_what_is_not_proven_is_shown(partly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(str(partly), settings=EditSettings(targets=("writers",)))
    assert (found.tier, found.reasons) == (Tier.PARTIAL, (FAILURE.message,))
    unproven = [row.tensor for row in found.matrices if row.reason == f"not proven: {FAILURE.message}"]
    assert unproven == ["model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    print_inspection(found)
    out = capsys.readouterr().out
    assert "tier: partial (on its twin, an edit of all writers left 3e-07 of the stream" in out
    assert f"  layer 2: not proven: {FAILURE.message}" in out
    assert "--allow-partial" in out


def test_modules_that_never_run_on_text_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    idle = ("layers.1.cross", "layers.3.cross")
    monkeypatch.setattr(
        "ollama_forge.inspection.main.examine",
        lambda checkpoint, **_: replace(proven.examine(checkpoint), idle=idle),
    )
    assert inspect(str(folder)).tier is Tier.PROVEN
    assert any("layers.1.cross and 1 more" in warning for warning in inspect(str(folder)).warnings)
    examined = replace(proven.examine(Checkpoint(folder, "it", "folder")), idle=idle)
    examined.require_proven("it", None, allow_partial=False)
    assert "left as they are: layers.1.cross and 1 more" in capsys.readouterr().err


def test_a_refused_model_is_not_edited_even_in_part(tmp_path: Path) -> None:
    model = map_checkpoint(tiny.save(tiny.build("llama"), tmp_path / "model"))
    refused = Examined(model, replace(PARTIAL, obstacles=("the stream itself passes a norm",)))
    with pytest.raises(ForgeError, match="the stream itself passes a norm"):
        refused.require_proven("it", None, allow_partial=True)
    whole = Examined(model, replace(PARTIAL, failures=()))
    assert whole.require_proven("it", None, allow_partial=False) is model
    described = describe_certificate(whole)
    assert described == {
        "tier": "proven",
        "reasons": [],
        "writers_left": 3e-7,
        "readers_left": 3e-7,
        "unproven_matrices": 0,
        "unproven": {},
        "idle": [],
    }


# What is printed


def printed(capsys: pytest.CaptureFixture[str], folder: Path, **settings: Any) -> list[str]:
    print_inspection(inspect(str(folder), settings=EditSettings(**settings)))
    return capsys.readouterr().out.splitlines()


def test_layers_that_are_alike_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tiny.build("gemma3_text"), tmp_path / "model").folder
    lines = printed(capsys, folder)
    assert "layers 0-3: model.layers.N." in lines
    assert [line for line in lines if line.startswith("layers ")] == ["layers 0-3: model.layers.N."]
    columns = next(line for line in lines if line.startswith("q ")).split("  ")
    cells = [cell.strip() for cell in columns if cell.strip()]
    assert cells == ["q", "self_attn.q_proj", "32 x 32", "F32", "reads", "input_layernorm + 1", "1 in 1-2"]
    assert "  layer 0: first layers are skipped" in lines
    assert any(line.strip().startswith("embedding, gate, up, down: not in --targets attention") for line in lines)
    lines = printed(capsys, folder, targets=("writers",), strength_kernel="gaussian", skip_begin_layers=0)
    assert next(line for line in lines if line.startswith("down ")).endswith("0.607 to 1 in 0-2")
    assert next(line for line in lines if line.startswith("up ")).endswith("-")


def test_layers_that_differ_are_shown_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, **{name: stored[name].bfloat16()})
    titles = [line for line in printed(capsys, folder) if line.startswith("layer")]
    assert titles == ["layers 0-1, 3: model.layers.N.", "layer 2: model.layers.N."]


def test_a_terminal_gets_tables_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    folder = tiny.save(tiny.build("gemma3_text"), tmp_path / "model").folder
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_inspection(inspect(str(folder)))
    rows = [line for line in terminal.getvalue().splitlines() if "_proj" in line]
    assert len(rows) == 7
    assert all(len(line.rstrip()) <= 100 for line in rows)
    assert all(line.split()[1].startswith(("self_attn.", "mlp.")) for line in rows)


# On the Hub


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two shards, some 14 MB, most of it embedding and head."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=26_000, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "large"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="7MB")
    return folder


def ask(home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "inspect", *arguments]
    return subprocess.run(
        command, env=environment(home, endpoint), cwd=home, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_hub_model_is_inspected_without_its_weights(large: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in large.iterdir()}
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    with serving({"owner/large": Repository(files)}) as hub:
        done = ask(tmp_path, hub.url, "--model", "owner/large", "--json", "--strength", "0.5")
        assert done.returncode == 0, done.stderr
        assert hub.sent < sum(map(len, files.values())) / 20
        assert hub.whole & {*shards} == set()
    found, local = json.loads(done.stdout), inspect(str(large), settings=EditSettings(strength=0.5)).to_json()
    assert (found.pop("model"), found.pop("revision")) == ("owner/large", "a" * 40)
    assert found == {key: value for key, value in local.items() if key not in ("model", "revision")}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_host_that_answers_no_ranges_sends_no_weights(large: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in large.iterdir()}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    with serving({"owner/whole": Repository(files, ranges=False), "owner/bin": Repository(pickled)}) as hub:
        whole = ask(tmp_path, hub.url, "--model", "owner/whole")
        pickle = ask(tmp_path, hub.url, "--model", "owner/bin")
        none = ask(tmp_path, hub.url, "--model", "owner/none")
    assert "answers no byte ranges" in whole.stdout + whole.stderr
    assert "tier: refused" in pickle.stdout
    assert "hf download owner/bin" in pickle.stdout
    assert none.returncode == 1
    assert "'owner/none' is neither a folder here nor a public model on the Hub" in none.stderr


@pytest.mark.parametrize(
    ("scale", "block", "words"),
    [
        ((1, 1), [32, 32], "F8_E4M3, one scale"),
        ((2, 2), [16, 16], "F8_E4M3, 16x16 blocks"),
    ],
    ids=["whole", "blocks"],
)
def test_the_storage_of_fp8_names_its_blocks(
    tmp_path: Path, scale: tuple[int, int], block: list[int], words: str
) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    name = "model.layers.1.self_attn.q_proj.weight"
    codes = torch.ones(32, 32).to(torch.float8_e4m3fn)
    rewrite(folder, **{name: codes, f"{name}_scale_inv": torch.ones(scale)})
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    stored = {row.tensor: row.storage for row in inspect(str(folder)).matrices}
    assert stored[name] == words
    assert stored["model.layers.1.self_attn.k_proj.weight"] == "F32"

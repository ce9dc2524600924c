"""Values of --model: folders, files, and Hub ids, with a fake Hub on loopback."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.sources.resolve import resolve
from tests import tiny
from tests.fake_hub import COMMIT, OTHER_COMMIT, REVISIONS, TOKEN, Hub, Repository, ask_in_process, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("model") / "tiny-llama").folder


# On disk


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(str(folder))
    assert (checkpoint.folder, checkpoint.kind, checkpoint.revision) == (folder.resolve(), "folder", None)
    assert map_checkpoint(checkpoint).n_layers == 4
    monkeypatch.chdir(folder.parent)
    relative = resolve(folder.name)
    assert (relative.folder, relative.label) == (folder.resolve(), folder.name)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}").folder == folder.resolve()


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ForgeError, match=r"not a model folder: it has no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "config.json", "empty.gguf"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("" if name.startswith("empty") else "GGML? no.\n")
    with pytest.raises(ForgeError, match="is not a GGUF file"):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    "model",
    [
        *("/nowhere/at/all", "./nowhere", "../x", "nowhere.gguf", "owner/nowhere.gguf", "a/b/c"),
        *("white space", "nul\0", "é", "~no_such_user/model", "long" * 100, "owner/" + "long" * 100),
    ],
)
def test_what_is_nowhere_is_one_error(model: str) -> None:
    """None of these gets as far as a request."""
    with pytest.raises(ForgeError):
        resolve(model)


@pytest.mark.parametrize("model", ["owner/na--me", "owner/na..me", "owner/-name", "owner/name.git"])
def test_what_the_hub_could_not_have_is_one_error(model: str) -> None:
    with pytest.raises(ForgeError, match="neither a folder here nor a Hub id"):
        resolve(model)


@pytest.mark.parametrize("wrong", ["tiny-lama", "./tiny-lama", "demoo", "tiny.guf", "ru/tiny"])
def test_what_is_like_a_model_at_hand_is_asked_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tiny-llama").mkdir()
    (tmp_path / "tiny-llama" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tiny.gguf").touch()
    (tmp_path / "run/tiny").mkdir(parents=True)
    (tmp_path / "run/tiny/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ForgeError) as caught:
        resolve(wrong)
    meant = {"tiny.guf": "tiny.gguf", "demoo": "demo", "ru/tiny": "run/tiny"}.get(wrong, "tiny-llama")
    assert caught.value.hint.startswith(f"did you mean {meant}?")


@pytest.mark.parametrize("kind", ["folder", "file", "demo", "demo-base"])
def test_a_revision_is_for_the_hub_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    model = {"folder": str(folder), "file": str(file)}.get(kind, kind)
    with pytest.raises(ForgeError, match="--revision has no meaning"):
        resolve(model, "main")


def test_a_folder_named_demo_is_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert resolve("demo").kind == "folder"


# On the Hub


def forms(whole: dict[str, bytes]) -> dict[str, Repository]:
    """Repositories that hold the tiny model, or something else, in other forms."""
    beside = {name: data for name, data in whole.items() if name != "model.safetensors"}
    weights = load(whole["model.safetensors"])
    names = sorted(weights)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    weight_map = {name: file for file, members in parts.items() for name in members}
    shards = {
        **{file: save({name: weights[name] for name in members}) for file, members in parts.items()},
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
    }
    others = {"consolidated.safetensors": b"", "model.fp16.safetensors": b"", "pytorch_model.bin.index.json": b"{}"}
    pickled = io.BytesIO()
    torch.save(weights, pickled)
    packed = {"a": torch.zeros(4, 4, dtype=torch.uint8)}

    def marked(config: dict[str, object], data: dict[str, torch.Tensor]) -> dict[str, bytes]:
        changed = json.dumps({**json.loads(whole["config.json"]), **config}).encode()
        return {**beside, "config.json": changed, "model.safetensors": save(data)}

    awq: dict[str, object] = {"quantization_config": {"quant_method": "awq"}}
    return {
        "owner/shards": Repository({**beside, **shards, **others, "adapter_config.json": b"{}", "LICENSE": b"free"}),
        "owner/both": Repository({**whole, **shards}),
        "owner/bin": Repository({**beside, "pytorch_model.bin": pickled.getvalue(), "tf_model.h5": b""}),
        "owner/gguf": Repository({"a-Q4_K_M.gguf": b"GGUF", "b-Q8_0.gguf": b"GGUF", "README.md": b""}),
        "owner/diffusion": Repository({**beside, "diffusion_pytorch_model.safetensors": b""}),
        "owner/awq": Repository(marked(awq, packed), base_model="owner/tiny"),
        "owner/stray": Repository(marked(awq, weights)),
        "owner/unknown": Repository(marked({"model_type": "llama99", "transformers_version": "99.0"}, packed)),
        "owner/large": Repository(whole, claimed={"model.safetensors": 10**18}),
        "owner/torn": Repository({**beside, **{name: data for name, data in shards.items() if "00002-of" not in name}}),
    }


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain = {
        **whole,
        "README.md": b"# tiny",
        "pytorch_model.bin": b"pickle",
        "tiny.gguf": b"GGUF",
        "onnx/model.safetensors": whole["model.safetensors"],
        "original/params.json": b"{}",
    }
    repositories = {
        **forms(whole),
        "owner/tiny": Repository(plain, REVISIONS),
        "owner/gated": Repository(whole, gated=True),
        "owner/private": Repository(whole, private=True),
    }
    with serving(repositories) as served:
        yield served


SCRIPT = """
import json, sys
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.sources.resolve import resolve
from ollama_forge.errors import ForgeError
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        found = resolve(model, revision)
        files = sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file())
        answers.append({"folder": str(found.folder), "label": found.label, "kind": found.kind,
                        "revision": found.revision, "files": files, "layers": map_checkpoint(found).n_layers})
    except ForgeError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""


ask = partial(ask_in_process, SCRIPT)


def test_a_hub_model_is_fetched_once_and_then_had_offline(hub: Hub, tmp_path: Path) -> None:
    (first,) = ask(tmp_path, hub.url, ("owner/tiny", None))
    assert first["revision"] == COMMIT
    assert (first["kind"], first["label"], first["layers"]) == ("hub", "owner/tiny", 4)
    assert Path(first["folder"]).is_relative_to(tmp_path)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"chat_template.jinja", "README.md"} == set(first["files"]) == hub.fetched
    content = (Path(first["folder"]) / "model.safetensors").read_bytes()
    assert content == hub.repositories["owner/tiny"].files["model.safetensors"]
    hub.seen.clear()
    assert ask(tmp_path, hub.url, ("owner/tiny", None)) == [first]
    assert hub.fetched == set()
    hub.seen.clear()
    assert ask(tmp_path, hub.url, ("owner/tiny", None), HF_HUB_OFFLINE="1") == [first]
    assert hub.seen == []


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    branch, commit, unknown, no_commit = ask(
        tmp_path, hub.url, *(("owner/tiny", revision) for revision in ("v2", OTHER_COMMIT, "v3", "c" * 40))
    )
    assert branch["revision"] == commit["revision"] == OTHER_COMMIT
    assert branch["folder"] == commit["folder"]
    for answer, revision in ((unknown, "v3"), (no_commit, "c" * 40)):
        assert answer["message"] == f"owner/tiny has no revision '{revision}'"
        assert "branch, tag or commit" in answer["hint"]


def test_refusals_of_the_hub_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    unknown, private, gated = ask(
        tmp_path, hub.url, ("owner/none", None), ("owner/private", None), ("owner/gated", None)
    )
    assert "'owner/none' is neither a folder here nor a public model on the Hub" in unknown["message"]
    assert "'owner/private' is neither a folder here nor a public model on the Hub" in private["message"]
    assert "set HF_TOKEN" in private["hint"]
    assert gated["message"] == "access to owner/gated is restricted"
    assert "accept the terms" in gated["hint"]
    assert "HF_TOKEN" in gated["hint"]


def test_a_token_opens_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    private, gated = ask(tmp_path, hub.url, ("owner/private", None), ("owner/gated", None), HF_TOKEN=TOKEN)
    assert (private["revision"], private["layers"]) == (COMMIT, 4)
    assert gated["message"] == "access to owner/gated is restricted"
    other = tmp_path / "other"
    other.mkdir()
    (wrong,) = ask(other, hub.url, ("owner/private", "v9"), HF_TOKEN="hf_another")
    assert "private" in wrong["message"]
    assert "hf_another" not in json.dumps(wrong)


def test_without_the_hub_an_unknown_model_is_not_in_the_cache(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    (offline,) = ask(tmp_path, closed, ("owner/tiny", None), HF_HUB_OFFLINE="1")
    (unreachable,) = ask(tmp_path, closed, ("owner/tiny", None))
    for answer in (offline, unreachable):
        assert answer["message"] == "owner/tiny is not in the local cache, and the Hub cannot be reached"
        assert "HF_HUB_OFFLINE" in answer["hint"]


def test_one_form_of_the_weights_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """The one that transformers loads: a single file before shards, .bin only where there is nothing else."""
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    index, parts = "model.safetensors.index.json", {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    files = {
        "owner/shards": {*parts, index, "LICENSE"},
        "owner/both": {"model.safetensors"},
        "owner/bin": {"pytorch_model.bin"},
    }
    cache = tmp_path / "cache"
    answers = ask(tmp_path, hub.url, *((repo, None) for repo in files), OLLAMA_FORGE_CACHE=str(cache))
    for repo, found in zip(files, answers, strict=True):
        assert (found["kind"], found["label"], found["revision"], found["layers"]) == ("hub", repo, COMMIT, 4)
        asked = [line for line in hub.seen if line.startswith(f"GET /{repo}/resolve/")]
        assert {line.split("/resolve/")[1].split("/", 1)[1] for line in asked} == beside | files[repo]
        assert Path(found["folder"]).is_relative_to(cache) is (repo == "owner/bin")


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    names = ("gguf", "diffusion", "awq", "unknown", "large", "torn", "stray")
    gguf, diffusion, awq, unknown, large, torn, stray = ask(
        tmp_path, hub.url, *((f"owner/{name}", None) for name in names)
    )
    assert gguf["message"] == "owner/gguf holds only GGUF files: a-Q4_K_M.gguf, b-Q8_0.gguf"
    assert gguf["hint"] == "name one of them: --model owner/gguf:a-Q4_K_M.gguf"
    assert "of a diffusion model: diffusion_pytorch_model.safetensors" in diffusion["message"]
    assert awq["message"].startswith("owner/awq is quantised (AWQ, library autoawq)")
    assert awq["hint"] == "use the unquantised model, owner/tiny according to the model card"
    assert "does not support the model_type 'llama99' of owner/unknown" in unknown["message"]
    assert "transformers>=99.0" in unknown["hint"]
    assert "fetching owner/large needs 1000000.0 TB" in large["message"]
    assert "HF_HOME" in large["hint"]
    assert "owner/torn lacks 1 of its shards, such as model-00002-of-00002.safetensors" in torn["message"]
    assert stray["layers"] == 4
    whole = [line for line in hub.seen if line.startswith("GET") and "/resolve/" in line and "stray" not in line]
    assert {line.rsplit("/", 1)[1] for line in whole} <= {
        "config.json",
        "model.safetensors.index.json",
        "model.safetensors",
    }
    assert not any("model.safetensors" in line and "awq" not in line for line in whole if not line.endswith(".json"))


def test_half_a_download_is_not_taken_for_a_model(hub: Hub, tmp_path: Path) -> None:
    """Without a connection, every file that is missing is named; with one, the missing files alone are fetched."""
    asked: tuple[tuple[str, str | None], ...] = (("owner/tiny", None), ("owner/shards", None))
    first = ask(tmp_path, hub.url, *asked)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    missing = ["model.safetensors", *shards, "tokenizer.json"]
    for found, names in zip(first, (missing[:1], missing[1:]), strict=True):
        for name in names:
            (Path(found["folder"]) / name).unlink()
    offline = ask(tmp_path, hub.url, *asked, HF_HUB_OFFLINE="1")
    unreachable = ask(tmp_path, "http://127.0.0.1:9", *asked)
    assert offline == unreachable
    single, several = offline
    assert single["message"].endswith("the local cache of owner/tiny lacks the weights (model.safetensors)")
    assert several["message"].endswith(f"lacks the tokenizer (tokenizer.json), {', '.join(shards)}")
    assert "fetches only the missing files" in single["hint"]
    hub.seen.clear()
    assert ask(tmp_path, hub.url, *asked) == first
    assert hub.fetched <= set(missing)

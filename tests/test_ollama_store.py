"""Models in Ollama's store: found by name, refused with the way out, and copied with every layer but the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import sha256_file
from ollama_forge.ollama.client import Client
from ollama_forge.ollama.made_from import create_request
from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.ollama.register import register, register_adapter
from ollama_forge.ollama.registration import OllamaSettings, plan_registration
from ollama_forge.ollama.shown import Shown
from ollama_forge.ollama.template import template_of
from ollama_forge.pipeline import RunSettings
from ollama_forge.sources import ollama_names, ollama_store
from ollama_forge.sources.ollama_names import OllamaName
from ollama_forge.sources.ollama_store import StoredModel, find_model
from ollama_forge.sources.resolve import resolve, resolve_gguf
from tests import fake_ollama
from tests.fake_ollama import FakeOllama, Model, recorded, tiny_gguf
from tests.ollama_store import Store, gguf_of

BEFORE, CREATE, AFTER, ADD, ADDED = (recorded("layers.jsonl")[at] for at in (0, 1, 2, 4, 5))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    return Store(tmp_path / "models")


@pytest.fixture
def fake(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        yield fake


def vision(store: Store) -> StoredModel:
    """The recorded model, which has every kind of layer, as it lies in the store."""
    body = CREATE["body"]
    store.add(
        "vis",
        model=gguf_of("model"),
        projector=gguf_of("mmproj"),
        template=body["template"],
        adapter=gguf_of("adapter"),
        system=body["system"],
        license=body["license"],
        params=json.dumps(body["parameters"]),
        messages=json.dumps(body["messages"]),
        config={key: body[key] for key in ("renderer", "parser", "requires")},
    )
    return find_model("vis")


def same_model(fake: FakeOllama, stored: StoredModel) -> None:
    """Let Ollama have the model of the store, as it shows it in the recording."""
    blobs = (stored.weights, *stored.projectors, *stored.adapters)
    fake.blobs = {blob.digest: blob.path.read_bytes() for blob in blobs}
    fake.models[stored.name] = Model(
        weights=[blob.digest for blob in (stored.weights, *stored.projectors)],
        adapters=[blob.digest for blob in stored.adapters],
        template=stored.template,
        system=stored.system,
        renderer=stored.renderer,
        parser=stored.parser,
        parameters=CREATE["body"]["parameters"],
        licenses=list(stored.licenses),
        messages=CREATE["body"]["messages"],
        requires=stored.requires,
    )


def wire(exchange: dict[str, Any], digests: dict[str, str]) -> Any:
    """A recorded body with the digests of these files, by the names that they have in it."""
    body = json.loads(json.dumps(exchange["body"]))
    for part in ("files", "adapters"):
        if part in body:
            body[part] = {name: digests[name] for name in body[part]}
    return body


# -- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "shown"),
    [
        ("llama3.2", "registry.ollama.ai/library/llama3.2/latest", "llama3.2:latest"),
        ("llama3.2:1b", "registry.ollama.ai/library/llama3.2/1b", "llama3.2:1b"),
        ("user/model:tag", "registry.ollama.ai/user/model/tag", "user/model:tag"),
        ("registry.ollama.ai/library/x:latest", "registry.ollama.ai/library/x/latest", "x:latest"),
        ("hf.co/user/repo-GGUF:Q4_K_M", "hf.co/user/repo-GGUF/Q4_K_M", "hf.co/user/repo-GGUF:Q4_K_M"),
        ("https://hf.co/user/repo", "hf.co/user/repo/latest", "hf.co/user/repo:latest"),
        ("box:5000/a/b", "box:5000/a/b/latest", "box:5000/a/b:latest"),
        ("box:5000/a/b:c", "box:5000/a/b/c", "box:5000/a/b:c"),
    ],
)
def test_a_name_and_its_manifest(store: Store, name: str, path: str, shown: str) -> None:
    assert "/".join(OllamaName.parse(name).parts) == path
    store.add(path, model=gguf_of("model"))
    for spelling in (name, name.upper() if "://" not in name else name):
        found = find_model(spelling)
        assert found.name == shown
        assert found.weights.path.read_bytes() == gguf_of("model")
        assert found.weights.digest == f"sha256:{sha256_file(found.weights.path)}"


def test_every_layer_is_read_and_no_file_is_changed(store: Store) -> None:
    before = {path: path.stat() for path in store.path.rglob("*")}
    found = vision(store)
    body = CREATE["body"]
    assert found == StoredModel(
        "vis:latest",
        store.blob(gguf_of("model")),
        (store.blob(gguf_of("mmproj")),),
        (store.blob(gguf_of("adapter")),),
        template=body["template"],
        renderer="rr",
        parser="pp",
        system="Be brief.",
        parameters={"temperature": 0.5, "stop": ("xx",)},
        messages=(("user", "hi"), ("assistant", "yes")),
        licenses=("one", "two"),
        requires="0.1.0",
    )
    assert {path: path.stat() for path in before} == before


def test_manifest_and_show_give_the_same_picture(store: Store) -> None:
    found, shown = vision(store), Shown.of("vis:latest", BEFORE["answer"])
    assert (found.template, found.renderer, found.parser, found.system, found.requires) == (
        shown.template, shown.renderer, shown.parser, shown.system, shown.requires,
    )  # fmt: skip
    assert (found.parameters, found.messages, "\n".join(found.licenses)) == (
        shown.parameters, shown.messages, shown.license,
    )  # fmt: skip
    assert (len(shown.projectors), len(shown.adapters)) == (len(found.projectors), len(found.adapters)) == (1, 1)


def test_where_stores_are_looked_for(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    service = Store(tmp_path / "service")
    monkeypatch.setattr(ollama_names, "SERVICE_STORES", (str(service.path),))
    with pytest.raises(ForgeError, match=r"Ollama keeps no models in .*home") as caught:
        find_model("m")
    assert "OLLAMA_MODELS" in caught.value.hint
    service.add("m", model=gguf_of("service's"))
    assert find_model("m").weights.path.is_relative_to(service.path)
    Store(tmp_path / "home" / ".ollama" / "models").add("m", model=gguf_of("mine"))
    assert find_model("m").weights.path.read_bytes() == gguf_of("mine")
    store.add("m", model=gguf_of("given"))
    monkeypatch.setenv("OLLAMA_MODELS", f' "{store.path}" ')
    assert find_model("m").weights.path.read_bytes() == gguf_of("given")


def test_the_checkpoint_of_a_name(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: list[tuple[Path, str | None]] = []

    def read(path: Path, label: str, *, sha256: str | None = None) -> Checkpoint:
        given.append((path, sha256))
        return Checkpoint(path.parent, label, "gguf", "0" * 64)

    monkeypatch.setattr(ollama_store, "gguf_checkpoint", read)
    store.add("vis", model=tiny_gguf(tmp_path / "m.gguf").read_bytes(), adapter=gguf_of("adapter"))
    stored = find_model("vis")
    found = resolve("ollama:VIS")
    assert given == [(stored.weights.path, sha256_file(stored.weights.path))]  # which the store knows
    assert (found.kind, found.label, found.public_name) == ("ollama", "vis:latest", "vis:latest")
    assert "has an adapter: the weights under it are computed on" in capsys.readouterr().err
    monkeypatch.setattr(ollama_store, "gguf_checkpoint_of", lambda base, path, label: replace(base, label=label))
    assert resolve_gguf("ollama:vis", None, replace(found, folder=tmp_path)).folder == tmp_path
    with pytest.raises(ForgeError, match="--revision has no meaning"):
        resolve("ollama:vis", "main")


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(name: str, match: str, way_out: str) -> None:
    with pytest.raises(ForgeError, match=match) as caught:
        find_model(name)
    assert way_out in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_model_that_is_not_there(store: Store) -> None:
    for name in ("llama3.2:1b", "llama3.2:3b", "qwen3", "user/smollm"):
        store.add(name, model=gguf_of("model"))
    refused("lama3.2:1b", "has no model lama3.2:1b in ", "it has llama3.2:1b")
    refused("llama3.2", "has no model llama3.2:latest in ", "llama3.2:1b, llama3.2:3b")
    refused("gemma", "has no model gemma:latest in ", "ollama pull gemma:latest")
    with pytest.raises(UsageError, match="not a valid model name"):
        find_model("a b")


@pytest.mark.parametrize(
    ("config", "layers", "match", "way_out"),
    [
        ({"remote_host": "https://ollama.com:443"}, {}, "is a cloud model.*ollama.com", "ollama pull m:20b"),
        ({"model_format": "safetensors"}, {"tensor": b"x"}, "stored as safetensors", "Hugging Face release"),
        ({}, {"model": [b"a", b"b"]}, "has 2 files of weights", "joins split files"),
        ({}, {"system": "x"}, "has 0 files of weights", "pull it again"),
    ],
)
def test_a_model_that_is_no_gguf_file(
    store: Store, config: dict[str, str], layers: dict[str, Any], match: str, way_out: str
) -> None:
    store.add("m:20b-cloud", config=config, **layers)
    refused("m:20b-cloud", match, way_out)


def test_a_cloud_model_without_a_manifest(store: Store) -> None:
    refused("gpt-oss:120b-cloud", "is a cloud model", "ollama pull gpt-oss:120b")
    refused("gpt-oss:cloud", "is a cloud model", "ollama pull gpt-oss")


@pytest.mark.parametrize(
    ("written", "told"), [(b"llama", b"gptos"), (b"token_embd.weight", b"v.patch_embd.bias")], ids=["name", "tensors"]
)
def test_a_file_of_ollamas_own_converter(store: Store, tmp_path: Path, written: bytes, told: bytes) -> None:
    content = tiny_gguf(tmp_path / "m.gguf").read_bytes()
    store.add("m", model=content.replace(written, told))
    with pytest.raises(ForgeError, match="m:latest is in a form of Ollama's own") as caught:
        resolve("ollama:m")
    assert told.decode() in caught.value.message
    assert "ollama pull hf.co/" in caught.value.hint


@pytest.mark.parametrize("kind", ["model", "projector"])
def test_an_interrupted_download(store: Store, kind: str) -> None:
    store.add("m", model=gguf_of("model"), projector=gguf_of("mmproj"))
    path = store.blob(gguf_of("model" if kind == "model" else "mmproj")).path
    path.write_bytes(path.read_bytes()[:-1])
    refused(
        "m", f"m:latest is incomplete in Ollama's store: {path.name} has .* bytes instead of", "ollama pull m:latest"
    )
    path.rename(path.with_name(f"{path.name}-partial"))
    refused("m", f"m:latest is incomplete in Ollama's store: {path.name} is missing", "ollama pull m:latest")


def test_a_damaged_manifest(store: Store) -> None:
    manifest = store.add("m", model=gguf_of("model"))
    for text in ("", "[]", '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../x"}]}'):
        manifest.write_text(text)
        refused("m", "damaged", "ollama pull m:latest")


@pytest.mark.parametrize("part", ["manifests", "blobs"])
def test_a_store_that_this_user_may_not_read(store: Store, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    store.add("m", model=gguf_of("model"))
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> Any:
        if path.is_relative_to(store.path / part):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    refused("m", f"this user may not read Ollama's store {store.path}", "usermod -aG ollama")
    refused("m", "may not read", 'sudo install -m 644 "$(ollama show --modelfile m:latest')


def test_an_ollama_on_another_machine(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("m", model=gguf_of("model"))
    monkeypatch.setenv("OLLAMA_HOST", "box.example:1234")
    assert find_model("m").name == "m:latest"  # OLLAMA_MODELS names a store on this one
    monkeypatch.delenv("OLLAMA_MODELS")
    refused("m", "OLLAMA_HOST is http://box.example:1234, and .* not here", "copy the model's GGUF file")


# -- creating ---------------------------------------------------------------------------------------------------------


def test_a_new_model_has_every_layer_as_recorded(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    edited = tiny_gguf(tmp_path / "edited.gguf")
    with Client() as client:
        made = register(client, edited, "new", plan=template_of(stored), source=stored)
    digests = {
        "edited.gguf": f"sha256:{sha256_file(edited)}",
        "projector-0.gguf": stored.projectors[0].digest,
        "adapter-0.gguf": stored.adapters[0].digest,
    }
    assert fake.bodies("/api/create") == [wire(CREATE, digests)]
    assert fake.blob_requests() == ["HEAD", "POST", "HEAD", "HEAD"]  # the store's blobs are there already
    assert made.differences == ()
    assert made.shown.capabilities == tuple(AFTER["answer"]["capabilities"]) == ("completion", "vision")
    shown = Shown.of("new", AFTER["answer"])
    assert replace(made.shown, weights=(), adapters=(), quantization="") == replace(
        shown, weights=(), adapters=(), quantization=""
    )


def test_an_ollama_with_another_store_gets_the_blobs(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    with Client() as client:
        made = register(client, tiny_gguf(tmp_path / "e.gguf"), "new", plan=template_of(stored), source=stored)
    assert fake.blob_requests() == ["HEAD", "POST"] * 3
    assert made.differences == ()


def test_a_lost_projector_is_told(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    fake.drops_projectors = True
    with Client() as client:
        made = register(client, tiny_gguf(tmp_path / "e.gguf"), "new", plan=template_of(stored), source=stored)
    assert made.differences == ("it has 0 of 1 projectors", "it lost vision, which vis:latest is capable of")


def test_what_the_user_gives_takes_precedence(store: Store) -> None:
    stored = vision(store)
    plan = replace(template_of(stored), stop=("mine",))
    request = create_request("new", plan, system="Mine.", parameters={"temperature": 1.0}, source=stored)
    assert (request.system, request.parameters) == ("Mine.", {"temperature": 1.0, "stop": ("mine",)})
    no_stop = create_request("new", replace(plan, stop=()), source=stored)
    assert no_stop.parameters == {"temperature": 0.5}  # stops belong to a template


def test_a_draft_model_is_kept(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    store.add("m", model=gguf_of("model"), draft=gguf_of("draft"))
    stored = find_model("m")
    with Client() as client:
        made = register(client, tiny_gguf(tmp_path / "e.gguf"), "new", plan=template_of(stored), source=stored)
    assert fake.bodies("/api/create")[0]["draft_files"] == {"draft-0.gguf": stored.drafts[0].digest}
    assert made.differences == ()


def planned(stored: StoredModel, folder: Path, **settings: Any) -> Any:
    source = Checkpoint(folder, stored.name, "ollama")
    return plan_registration(source, "new", folder, OllamaSettings(**settings))


def test_a_run_registers_with_all_layers(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    registration = planned(stored, tmp_path)
    made = registration.register(tiny_gguf(tmp_path / "edited.gguf"))
    assert made.template_from == "vis:latest"
    assert fake.bodies("/api/create")[0]["license"] == ["one", "two"]
    registration.write_modelfile(tmp_path / "edited.gguf")
    assert registration.commands(tmp_path / "edited.gguf") == (f"ollama create new -f {tmp_path / 'Modelfile'}",)
    assert Modelfile.parse((tmp_path / "Modelfile").read_text()) == Modelfile(
        sources=("./edited.gguf", str(stored.projectors[0].path)),
        adapters=(str(stored.adapters[0].path),),
        template=stored.template,
        system=stored.system,
        renderer="rr",
        parser="pp",
        parameters=(("temperature", "0.5"), ("stop", "xx")),
        licenses=("one", "two"),
        messages=(("user", "hi"), ("assistant", "yes")),
        others=(("REQUIRES", "0.1.0"),),
    )


def test_another_models_template_and_its_own_other_layers(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    fake.models["other:latest"] = Model(["sha256:0"], template="{{ .Prompt }}!", parameters={"stop": ["!"]})
    planned(stored, tmp_path, template_from="other").register(tiny_gguf(tmp_path / "edited.gguf"))
    [body] = fake.bodies("/api/create")
    assert (body["template"], body["parameters"]) == ("{{ .Prompt }}!", {"temperature": 0.5, "stop": ["!"]})
    assert "renderer" not in body
    assert len(body["files"]) == 2


def test_without_ollama_the_modelfile_has_it_all(store: Store, tmp_path: Path) -> None:
    registration = planned(vision(store), tmp_path)
    assert "no Ollama at" in registration.problem
    registration.write_modelfile(tmp_path / "edited.gguf")
    assert "RENDERER rr" in (tmp_path / "Modelfile").read_text()


def test_a_parameter_of_old_versions_is_kept_except_in_a_modelfile(store: Store, tmp_path: Path) -> None:
    store.add("m", model=gguf_of("model"), params='{"num_gqa": 8, "num_ctx": 4096, "seed": null}')
    stored = find_model("m")
    assert create_request("new", template_of(stored), source=stored).parameters == {"num_gqa": 8, "num_ctx": 4096}
    planned(stored, tmp_path).write_modelfile(tmp_path / "edited.gguf")
    text = (tmp_path / "Modelfile").read_text()
    assert "# PARAMETER num_gqa left out" in text
    assert Modelfile.parse(text).parameters == (("num_ctx", "4096"),)


def test_two_adapters_cannot_be_created_with_new_weights(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    store.add("m", model=gguf_of("model"), adapter=[gguf_of("adapter"), gguf_of("another")])
    with pytest.raises(ForgeError, match="m:latest has 2 adapters") as caught:
        planned(find_model("m"), tmp_path)
    assert "--as-adapter" in caught.value.hint


# -- as an adapter ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_added_as_recorded(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    adapter = tiny_gguf(tmp_path / "b.gguf", holds="adapter")
    with Client() as client:
        made = register_adapter(client, adapter, "newa", stored)
    digest = f"sha256:{sha256_file(adapter)}"
    assert fake.bodies("/api/create") == [wire(ADD, {"b.gguf": digest})]
    assert made.differences == ()
    assert made.shown.adapters == (stored.adapters[0].digest, digest)
    assert len(Shown.of("newa", ADDED["answer"]).adapters) == 2
    assert made.shown.weights == (stored.weights.digest, stored.projectors[0].digest)


def test_an_adapter_that_ollama_drops_is_told(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    fake.drops_adapters = True
    with Client() as client:
        made = register_adapter(client, tiny_gguf(tmp_path / "b.gguf", holds="adapter"), "newa", stored)
    assert len(made.differences) == 1
    assert "its adapters is" in made.differences[0]


def test_an_adapter_for_other_weights_is_refused(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    adapter = tiny_gguf(tmp_path / "b.gguf", holds="adapter")
    with pytest.raises(ForgeError, match="has no vis:latest") as caught:
        planned(stored, tmp_path, as_adapter=True)
    assert "OLLAMA_HOST" in caught.value.hint
    same_model(fake, stored)
    registration = planned(stored, tmp_path, as_adapter=True)
    fake.models["vis:latest"].weights[0] = "sha256:" + "9" * 64  # pulled again meanwhile
    with pytest.raises(ForgeError, match="has another vis:latest"):
        registration.register(adapter)
    assert fake.bodies("/api/create") == []


def test_a_run_adds_its_adapter(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored = vision(store)
    same_model(fake, stored)
    adapter = tiny_gguf(tmp_path / "b.gguf", holds="adapter")
    registration = planned(stored, tmp_path, as_adapter=True)
    assert registration.register(adapter).name == "new"
    assert fake.bodies("/api/create")[0]["from"] == "vis:latest"
    registration.write_modelfile(adapter)
    assert (tmp_path / "Modelfile").read_text() == "FROM vis:latest\nADAPTER ./b.gguf\n"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "owner/model"}, "--model owner/model is none"),
        ({"escalate": False}, "restores norms after the edit"),
        ({"pick": "orthogonal on writers, layer 2"}, "restores norms after the edit"),
    ],
)
def test_a_run_as_adapter_that_cannot_work(changes: dict[str, Any], match: str) -> None:
    settings = RunSettings(**{"model": "ollama:m", "name": "n", "ollama": OllamaSettings(as_adapter=True), **changes})
    with pytest.raises(UsageError, match=match):
        settings.check()


def test_a_template_of_another_model_has_no_place_beside_an_adapter() -> None:
    with pytest.raises(UsageError, match="--template-from, --renderer and --parser have no"):
        OllamaSettings(template_from="m", as_adapter=True)


# -- templates in show ------------------------------------------------------------------------------------------------


def test_the_template_is_that_of_the_modelfile_where_ollama_shows_the_files() -> None:
    shown = {
        each["body"]["model"]: Shown.of("m", each["answer"])
        for each in recorded("templates.jsonl")
        if each["path"] == "/api/show"
    }
    assert shown["go-over-tools"].template.startswith("{{- range .Messages }}")
    assert "tools" not in shown["go-over-tools"].template  # the file's template, which is in the JSON, knows tools
    assert shown["kept"].template == ""  # it has no TEMPLATE, and its JSON has the file's template
    assert shown["kept"].jinja.startswith("{# kept")
    assert shown["knows-tools"].template == ""
    assert shown["recognised"].template == shown["go-over-kept"].template

"""GGUF files on the Hub: by file name or by type, as Ollama names them; a fake Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ollama_forge.checkpoints.hub_gguf import GgufReference, choose, gguf_reference
from ollama_forge.errors import ForgeError
from tests.fake_hub import COMMIT, OTHER_COMMIT, REVISIONS, Hub, Repository, ask_in_process, serving

FILES = {
    "README.md": b"# GGUF",
    "config.json": b"{}",
    "tiny-Q4_K_M.gguf": b"GGUF k4",
    "tiny-Q8_0.gguf": b"GGUF q8",
    "tiny-UD-Q4_K_M.gguf": b"GGUF ud",
    "mmproj-tiny-f16.gguf": b"GGUF projector",
    "BF16/tiny-BF16-00001-of-00002.gguf": b"GGUF bf16 first",
    "BF16/tiny-BF16-00002-of-00002.gguf": b"GGUF bf16 second",
}


@pytest.mark.parametrize(
    ("model", "repo", "name"),
    [
        ("owner/tiny:tiny-Q8_0.gguf", "owner/tiny", "tiny-Q8_0.gguf"),
        ("owner/tiny:BF16/tiny.gguf", "owner/tiny", "BF16/tiny.gguf"),
        ("owner/tiny:Q4_K_M", "owner/tiny", "Q4_K_M"),
        ("owner/tiny:latest", "owner/tiny", None),
        ("hf.co/owner/tiny", "owner/tiny", None),
        ("hf.co/owner/tiny:q8_0", "owner/tiny", "q8_0"),
        ("huggingface.co/owner/tiny.v2:Q8_0", "owner/tiny.v2", "Q8_0"),
    ],
)
def test_what_names_a_gguf_file(model: str, repo: str, name: str | None) -> None:
    assert gguf_reference(model) == GgufReference(repo, name)


@pytest.mark.parametrize(
    "model", ["owner/tiny", "tiny:Q8_0", "owner/tiny.gguf", "a/b/c:Q8_0", "hf.co/tiny", "owner/tiny:", "owner/tiny:a:b"]
)
def test_what_names_none(model: str) -> None:
    assert gguf_reference(model) is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        ("Q8_0", ["tiny-Q8_0.gguf"]),
        ("q8_0", ["tiny-Q8_0.gguf"]),
        (None, ["tiny-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["tiny-UD-Q4_K_M.gguf"]),
        ("mmproj-tiny-f16.gguf", None),
        *[
            (name, [f"BF16/tiny-BF16-0000{n}-of-00002.gguf" for n in (1, 2)])
            for name in ("BF16", "tiny-BF16.gguf", "BF16/tiny-BF16.gguf", "tiny-BF16-00002-of-00002.gguf")
        ],
    ],
)
def test_which_file_is_meant(name: str | None, wanted: list[str] | None) -> None:
    reference = GgufReference("owner/tiny", name)
    if wanted is None:
        with pytest.raises(ForgeError):
            choose(reference, FILES)
    else:
        assert choose(reference, FILES) == wanted


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *[(f"M.{kind}.gguf", kind) for kind in ("Q4_1", "IQ2_XXS", "F32", "MXFP4", "TQ1_0", "bf16")],
        ("qwen2-7b-instruct-q5_k_m.gguf", "Q5_K_M"),
        ("phi3_q4_k_s.gguf", "Q4_K_S"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Q6_K/model-Q6_K-00001-of-00001.gguf", "Q6_K"),
    ],
)
def test_the_type_is_in_the_name(file: str, kind: str) -> None:
    assert choose(GgufReference("a/b", kind), [file, "other.gguf"]) == [file]


def test_what_is_not_one_file_is_listed() -> None:
    def refused(name: str | None, files: list[str]) -> ForgeError:
        with pytest.raises(ForgeError) as caught:
            choose(GgufReference("owner/tiny", name), files)
        assert "\n" not in caught.value.message
        return caught.value

    none = refused("Q5_K_M", list(FILES))
    assert "owner/tiny holds no GGUF file for 'Q5_K_M'" in none.message
    assert "tiny-Q4_K_M.gguf, tiny-Q8_0.gguf, tiny-UD-Q4_K_M.gguf" in none.message
    assert "mmproj" not in none.message
    assert none.hint == "name one of them: owner/tiny:FILE.gguf"
    several = refused("Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf"])
    assert "holds 2 GGUF files for 'Q8_0': it has a-Q8_0.gguf, b-Q8_0.gguf" in several.message
    assert "no GGUF file of type Q4_K_M" in refused(None, ["a-Q8_0.gguf", "b-Q4_0.gguf"]).message
    assert choose(GgufReference("owner/tiny", None), ["a-Q8_0.gguf", "mmproj-a.gguf"]) == ["a-Q8_0.gguf"]
    many = refused(None, [f"m{n}-Q8_0.gguf" for n in range(100)])
    assert "and 88 more" in many.message
    assert "holds no GGUF file of a model" in refused(None, ["model.safetensors", "mmproj.gguf"]).message
    torn = refused("BF16", [name for name in FILES if "00001" not in name])
    assert "holds 1 of the 2 parts of BF16/tiny-BF16.gguf" in torn.message


@pytest.fixture
def hub() -> Iterator[Hub]:
    repositories = {
        "owner/tiny": Repository(FILES, REVISIONS),
        "owner/large": Repository(FILES, claimed={"tiny-Q8_0.gguf": 10**18}),
        "owner/gated": Repository(FILES, gated=True),
    }
    with serving(repositories) as served:
        yield served


SCRIPT = """
import json, sys
from ollama_forge.checkpoints.hub_gguf import fetch_gguf, gguf_reference
from ollama_forge.errors import ForgeError
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        path = fetch_gguf(gguf_reference(model), revision)
        beside = sorted(beside.name for beside in path.parent.iterdir())
        answers.append({"path": str(path), "content": path.read_text(), "beside": beside})
    except ForgeError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""


ask = partial(ask_in_process, SCRIPT)


def test_one_file_is_fetched_once_and_then_had_offline(hub: Hub, tmp_path: Path) -> None:
    model = ("hf.co/owner/tiny:Q8_0", None)
    first, again = ask(tmp_path, hub.url, model, model)
    assert again == first
    assert first["content"] == "GGUF q8"
    assert first["beside"] == ["tiny-Q8_0.gguf"]
    assert [line for line in hub.seen if line.startswith("GET") and "/resolve/" in line] == [
        f"GET /owner/tiny/resolve/{COMMIT}/tiny-Q8_0.gguf"
    ]
    assert Path(first["path"]).is_relative_to(tmp_path)
    hub.seen.clear()
    offline, absent, named, unknown = ask(
        tmp_path,
        hub.url,
        *(model, ("owner/tiny:Q4_K_M", None), ("owner/tiny:tiny-Q8_0.gguf", None), ("owner/none:Q8_0", None)),
        HF_HUB_OFFLINE="1",
    )
    assert offline == named == first
    assert hub.seen == []
    assert "the local cache of owner/tiny holds no GGUF file for 'Q4_K_M'" in absent["message"]
    assert "not in the local cache, and the Hub cannot be reached" in unknown["message"]


def test_parts_are_fetched_together_and_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    parts, revised, large, gated, none, revision = ask(
        tmp_path,
        hub.url,
        ("owner/tiny:BF16", None),
        ("owner/tiny:Q8_0", "v2"),
        ("owner/large:Q8_0", None),
        ("owner/gated:Q8_0", None),
        ("owner/none:Q8_0", None),
        ("owner/tiny:Q8_0", "v3"),
    )
    assert parts["content"] == "GGUF bf16 first"
    assert parts["beside"] == [f"tiny-BF16-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert OTHER_COMMIT in revised["path"]
    assert "fetching owner/large needs 1000000.0 TB" in large["message"]
    assert gated["message"] == "access to owner/gated is restricted"
    assert "'owner/none' is neither a folder here nor a public model on the Hub" in none["message"]
    assert revision["message"] == "owner/tiny has no revision 'v3'"

"""llama.cpp's converter: the models it supports, the replacements for what it lacks, and messages of its failures."""

from __future__ import annotations

import json
import os
import signal
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf import converter
from ollama_forge.checkpoints.gguf.converter import SCRIPT, find_converter, supported_architectures
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.tokens import TokenCheck, check_tokens
from ollama_forge.export import converter_worker
from ollama_forge.export.convert import (
    convert,
    error_line,
    fallback_pre_tokenizer,
    unsupported_reason,
)
from ollama_forge.files import partial_of
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llama_server
from ollama_forge.models.servers.token_server import RemoteModel
from ollama_forge.records import from_json, to_json
from ollama_forge.text.tokenizer import Tokenizer
from tests import planted, tiny
from tests.first_tokens import first_log_probs as of_model
from tests.first_tokens import kl_per_prompt
from tests.llamacpp_scores import first_log_probs

# words end behind their space, as with no tokenizer that llama.cpp knows
FOREIGN = (("e", "Ġ"), ("s", "Ġ"), ("Ġ", "Ġ"), ("t", "h"), ("th", "eĠ"))


def byte_pairs(merges: tuple[tuple[str, str], ...]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges that nothing holds back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*tiny.SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tiny.SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = tiny.TEMPLATE
    return fast


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path, str | None]:
    """A checkpoint with that tokenizer, its file, and the pre-tokenizer that stood in."""
    folder = tmp_path_factory.mktemp("foreign")
    model = tiny.build("llama")
    model.resize_token_embeddings(tiny.VOCABULARY + len(FOREIGN))  # type: ignore[operator]
    checkpoint = tiny.save(model, folder / "model")
    byte_pairs(FOREIGN).save_pretrained(folder / "model")
    made = convert(find_converter(None), checkpoint, folder / "out.gguf", outtype="f16", name="Foreign")
    return checkpoint, made.path, made.fallback


def test_an_unknown_pre_tokenizer_falls_back_and_conversion_completes(
    foreign: tuple[Checkpoint, Path, str | None],
) -> None:
    _, path, fallback = foreign
    assert fallback == "default"
    file = read_gguf(path)
    assert file.get("tokenizer.ggml.pre") == "default"
    assert file.get("general.name") == "Foreign"
    assert len(file.get("tokenizer.ggml.tokens")) == tiny.VOCABULARY + len(FOREIGN)
    assert any(tensor.name == "blk.3.ffn_down.weight" for tensor in file.tensors)


def test_the_converter_gets_keys_that_transformers_drops(tmp_path: Path) -> None:
    def load_hparams(_: Path, *, is_mistral_format: bool) -> dict[str, Any]:
        return {"hidden_size": 64}

    load = converter_worker.with_all_keys(staticmethod(load_hparams))
    assert load(tmp_path, is_mistral_format=True) == {"hidden_size": 64}  # no config.json
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "rotary_pct": 0.25}', encoding="utf-8")
    assert load(tmp_path, is_mistral_format=False) == {"hidden_size": 64, "rotary_pct": 0.25}


def test_the_token_check_finds_what_the_fallback_gets_wrong(foreign: tuple[Checkpoint, Path, str | None]) -> None:
    checkpoint, path, _ = foreign
    tokenizer = Tokenizer.load(checkpoint.folder)
    with llama_server(path, 256) as server:
        found = check_tokens(tokenizer, server.tokenize)
        assert server.tokenize("the sea") != tokenizer.encode("the sea")
    assert found.texts >= 200
    assert found.mismatches >= found.garbled > 20
    first = found.examples[0]
    assert "".join(first.expected) == "".join(first.found)  # the same bytes, cut elsewhere
    assert first.expected != first.found
    assert from_json(TokenCheck, json.loads(json.dumps(to_json(found)))) == found


def test_the_file_answers_as_the_checkpoint_does(foreign: tuple[Checkpoint, Path, str | None]) -> None:
    checkpoint, path, _ = foreign
    settings = LoadSettings(device="cpu", dtype="float32")
    chat = ChatModel.load(checkpoint, settings)
    prompts = chat.tokenizer.instructions_ids(tiny.lines(6))
    wanted, scores = chat.answer(prompts, 12), of_model(chat, prompts)
    with llama_server(path, 256, slots=8) as server:
        found = RemoteModel(server, chat.tokenizer).answer(prompts, 12)
        first = first_log_probs(server, prompts, chat.tokenizer.encode("a")[-1])
    assert float(kl_per_prompt(scores, first).max()) < 1e-3
    agreeing = sum(a[:3] == b[:3] for a, b in zip(wanted, found, strict=True))
    assert agreeing >= 5  # a near tie may fall the other way in f16


def test_mismatches_are_told_apart() -> None:
    tokenizer = tiny.tokenizer()

    def wrong(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        space, x = tokenizer("  x", add_special_tokens=False).input_ids[::2]
        return [space, *ids] if text.startswith("The harbour") else [x, *ids] if text == "🚀" else ids

    found = check_tokens(Tokenizer(tokenizer), wrong)
    assert (found.mismatches, found.garbled) == (2, 1)
    assert found.examples[0].text == "🚀"
    assert found.composed == 0
    right = check_tokens(Tokenizer(tokenizer), lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    assert (right.mismatches, right.garbled, right.examples) == (0, 0, ())


def test_composition_alone_garbles_no_text() -> None:
    """A tokenizer that composes accents, as Qwen's, beside one that does not."""
    plain, composing = tiny.tokenizer(), tiny.tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    found = check_tokens(Tokenizer(composing), lambda text: plain(text, add_special_tokens=False).input_ids)
    assert found.mismatches == found.composed > 0
    assert found.garbled == 0
    assert unicodedata.normalize("NFC", found.examples[0].text) != found.examples[0].text
    both = check_tokens(Tokenizer(composing), lambda text: [0, *plain(text, add_special_tokens=False).input_ids])
    assert (both.composed, both.garbled) == (0, both.mismatches)


def test_the_check_reads_special_tokens_and_the_rendered_template() -> None:
    seen: list[str] = []
    tokenizer = tiny.tokenizer()

    def tokenize(text: str) -> list[int]:
        seen.append(text)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    check_tokens(Tokenizer(tokenizer, system="Be brief."), tokenize)
    assert any(
        text.startswith("<|system|>Be brief.<|end|><|user|>") and text.endswith("<|assistant|>") for text in seen
    )
    assert "<|end|>" in seen
    assert len(seen) == len(set(seen)) >= 200


# what the converter knows


def test_architectures_are_read_without_running_it() -> None:
    known = supported_architectures(find_converter(None))
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForConditionalGeneration"} <= known
    assert "MadeUpForCausalLM" not in known


def test_architectures_of_older_converters(tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text(
        '@ModelBase.register("OneForCausalLM", "OtherModel")\nclass A: ...\n@Model.register("Third")\nclass B: ...\n',
        encoding="utf-8",
    )
    assert supported_architectures(tmp_path) == {"OneForCausalLM", "OtherModel", "Third"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ""),
        ({"architectures": ["MadeUpForCausalLM"]}, "does not know MadeUpForCausalLM"),
        ({"architectures": ["X"], "text_config": {"architectures": ["LlamaForCausalLM"]}}, ""),
        ({}, "names no architecture"),
    ],
)
def test_preflight(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = unsupported_reason(find_converter(None), Checkpoint(tmp_path, "x", "folder"))
    assert words in found
    assert bool(words) == bool(found)


def test_preflight_of_a_tokenizer(tmp_path: Path) -> None:
    assert "WordLevel" in unsupported_reason(find_converter(None), planted.save(tmp_path / "planted"))


def test_which_pre_tokenizer_stands_in() -> None:
    assert fallback_pre_tokenizer({"model_type": "llama"}) == "default"
    assert (
        fallback_pre_tokenizer({"model_type": "gemma3"})
        == fallback_pre_tokenizer({"model_type": "gemma3_text"})
        == "llama-bpe"
    )


# failures, with a converter of our own


def other_converter(folder: Path, body: str) -> Path:
    """A llama.cpp folder whose converter has ``out``, the path to write."""
    folder.mkdir()
    (folder / "gguf-py").mkdir()
    (folder / SCRIPT).write_text(
        "import sys\ndef main():\n    out = sys.argv[sys.argv.index('--outfile') + 1]\n"
        + "".join(f"    {line}\n" for line in body.splitlines()),
        encoding="utf-8",
    )
    return find_converter(str(folder))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise NotImplementedError('no such thing')", "no such thing"),
        ("open(out, 'w').write('half')\nraise OSError(28, 'No space left on device')", "No space left on device"),
        (
            "print('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr)\nsys.exit(1)",
            "Model X is not supported",
        ),
        ("import os, signal\nopen(out, 'w').write('half')\nos.kill(os.getpid(), signal.SIGKILL)", "exit status -9"),
        ("open(out, 'wb').write(b'GGUF' + bytes(3))", "truncated"),
        ("pass", "cannot read"),
    ],
    ids=["raises", "disk full", "says so", "killed", "half a file", "no file"],
)
def test_a_failing_converter(tmp_path: Path, body: str, words: str) -> None:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "model")
    target = tmp_path / "out.gguf"
    target.write_bytes(b"earlier")
    with pytest.raises(ForgeError, match=words) as caught:
        convert(other_converter(tmp_path / "llama.cpp", body), checkpoint, target, outtype="f16", name="x")
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert target.read_bytes() == b"earlier"
    assert not partial_of(target).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_converter_of_a_killed_run_ends(tmp_path: Path) -> None:
    started = tmp_path / "started"
    body = f"import os, time\nopen({str(started)!r}, 'w').write(f'{{os.getpid()}} ')\ntime.sleep(60)"
    folder = other_converter(tmp_path / "llama.cpp", body)
    checkpoint = tiny.save(tiny.build("llama"), tmp_path / "model")
    killed = os.fork()
    if not killed:
        convert(folder, checkpoint, tmp_path / "out.gguf", outtype="f16", name="x")
    within(20, lambda: started.exists() and started.read_text().endswith(" "))
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    left = psutil.Process(int(started.read_text()))
    within(20, lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE)


def within(seconds: float, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForgeError, match="holds no convert_hf_to_gguf"):
        find_converter(str(tmp_path))
    monkeypatch.setattr(converter, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(ForgeError, match="not installed") as caught:
        find_converter(None)
    assert "--llama-cpp-dir" in caught.value.hint


def test_last_words() -> None:
    assert error_line("") == error_line("INFO:x:done\nWriting: 3%\n") == ""
    assert error_line("Traceback (most recent call last):\n  File\nValueError: bad thing\n") == "bad thing"
    assert error_line("a.b.SomeError\n") == "a.b.SomeError"
    assert error_line("Traceback:\nKeyError: 'n_ctx'\n") == "the converter looks for 'n_ctx', which this model lacks"
    bare = '  File "x.py", line 3, in f\n    assert a < b\n           ^^^^^\nAssertionError\n'
    assert error_line(bare) == "AssertionError at assert a < b"
    assert error_line("plain\nINFO:x:more") == "plain"

"""The commands that ``kills.py`` kills, on tiny models with a planted refusal direction."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests import planted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ollama_forge.cli.main import main
from ollama_forge.models import holder, lockstep
from ollama_forge.pipeline import gguf_stages

_LAYERS = 8  # of the model that is streamed
_MEMORY = 100_000  # bytes that it may take: some layers fit
_LISTS = ("--harmful", "harmful.txt", "--harmless", "harmless.txt")
_RUN = (*_LISTS, "--name", "planted", "--output-dir", "out", "--max-measured", "12")


@dataclass(frozen=True)
class Scenario:
    """A command of ``ollama-forge abliterate`` that writes to the folder ``out``.

    Attributes:
        share: part of ``--kills`` that it gets.
        learned: whether the cache has what the program learns of the architecture first, so that no kill comes then.
        patches: values of attributes, by owner and name, without which so small a model would not come to the point.
    """

    name: str
    arguments: Sequence[str]
    share: float
    learned: bool = False
    patches: Mapping[tuple[Any, str], Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run the command, and end the process."""
        sys.argv = ["ollama-forge", "--debug", "abliterate", *self.arguments]
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = 1 if ended.code else 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)


SCENARIOS = (
    Scenario("run", ("run", "--model", "words", *_RUN), 0.7),
    Scenario(
        "run with a GGUF file",
        ("run", "--model", "bytes", *_RUN),
        0.3,
        # with the time that the checkpoint took, llama.cpp answers now more prompts, now fewer
        patches={(gguf_stages, "measure_file"): lambda *args, **_: _measure_file(*args, seconds=float("inf"))},
    ),
    Scenario(
        "streamed",
        (
            *("compute-dir", "--model", "deep", *_LISTS, "--output", "out/refusal.pt", "--factors", "least-squares"),
            *("--batch-size", "64"),  # so little memory would make a batch of every prompt
        ),
        0.2,
        learned=True,
        patches={(holder, "memory_bound"): lambda _: _MEMORY, (lockstep, "_SHARE_OF_READING"): 0},
    ),
    Scenario(
        "apply",
        ("apply", "--model", "deep", "--refusal-pt", "direction.pt", "--output-dir", "out/edited", "--workers", "2"),
        0.2,
        learned=True,
    ),
)
_measure_file = gguf_stages.measure_file


def write_inputs(folder: Path) -> None:
    """Write the lists, and models: one tokenized by words, one that llama.cpp takes, one of many layers in shards."""
    planted.write_lists(folder)
    planted.save(folder / "words")
    _write_convertible(folder / "bytes")
    deep = planted.build(1, _LAYERS)
    deep.save_pretrained(folder / "deep", max_shard_size="50KB")
    planted.tokenizer().save_pretrained(folder / "deep")
    torch.save(torch.eye(planted.D)[planted.R : planted.R + 1], folder / "direction.pt")


def _write_convertible(folder: Path) -> None:
    """Write the planted model with bytes as further tokens, because llama.cpp has no tokenizer of words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*planted.TOKENS, *alphabet, "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(planted.TOKENS[1:4])
    backend.add_tokens(planted.TOKENS[4:])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    fast.chat_template = planted.TEMPLATE
    model, known = planted.build(1), len(planted.TOKENS)
    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    with torch.no_grad():
        added = model.model.embed_tokens.weight[known:]
        added[:] = torch.randn(added.shape) * 0.3
        added[:, : planted.WORD] = 0.0
        added[:, planted.ONE] = 1.0
        model.lm_head.weight[known:] = 0.0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)

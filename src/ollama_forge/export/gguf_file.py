"""The GGUF file of a run: converted, quantised, its tokens compared with the checkpoint's, and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ollama_forge import __version__
from ollama_forge.checkpoints.gguf_io import Gguf, Value, read_gguf, value_of
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import ANSWER_TOKENS, Measurement, measure
from ollama_forge.evaluation.tokens import TokenCheck, check_tokens
from ollama_forge.export.plan import ExportPlan
from ollama_forge.export.quantise import find_tool, quantise
from ollama_forge.models.gguf_model import SLOTS, TOKENIZING_CONTEXT, GgufModel, llama_server
from ollama_forge.models.thoughts import THOUGHT_TOKENS, detect_thought
from ollama_forge.progress import say, status
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ShippedFile:
    """The GGUF file of a run.

    Attributes:
        quantised_by: ``embedded``, or the tool that did it.
        pre_tokenizer_fallback: the rules that stand in for ones the converter does not know; None where it does.
        tokenizer_of_source: the file kept the tokenizer of a GGUF source.
        verified: the checkpoint it was made from passed its verification; None where that was left out.
    """

    path: Path
    quant: str
    size: int
    quantised_by: str
    pre_tokenizer_fallback: str | None
    tokenizer_of_source: bool = False
    verified: bool | None = None

    @property
    def row(self) -> str:
        """Its name among the measurements."""
        return f"GGUF ({self.quant})"

    def described(self) -> dict[str, Any]:
        """What ``report.json`` says of it."""
        return {
            "file": self.path.name,
            "quant": self.quant,
            "bytes": self.size,
            "quantised_by": self.quantised_by,
            "pre_tokenizer_fallback": self.pre_tokenizer_fallback,
            "tokenizer_of_source": self.tokenizer_of_source,
            "verified": self.verified,
        }


def quantise_file(
    plan: ExportPlan, converted: Path, fallback: str | None, provenance: Mapping[str, Any], verified: bool | None
) -> ShippedFile:
    """Write the converted file in the types of the plan, its origin in the metadata.

    Args:
        fallback: the pre-tokenizer that the converter was given, if it knew none.
        provenance: what the metadata shall say of the edit.

    Raises:
        ForgeError: it fails; nothing broken stands at ``plan.path``.
    """
    say(f"making {plan.path.name} ({plan.quant})")
    marked = {"version": __version__, "verified": {True: "yes", False: "no", None: "not checked"}[verified]}
    changes = {
        f"ollama_forge.{key}": value_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in {**marked, **provenance}.items()
    }
    if plan.source_file is not None:
        changes |= tokenizer_of(plan.source_file, read_gguf(converted))
    made_by = quantise(converted, plan.path, plan.quant, changes, find_tool())
    if fallback:
        say(f"warning: llama.cpp's converter does not know this tokenizer; it was given the rules of {fallback!r}")
    size, of_source = plan.path.stat().st_size, plan.source_file is not None
    return ShippedFile(plan.path, plan.quant, size, made_by, fallback, of_source, verified)


def check_file_tokens(file: ShippedFile, tokenizer: Tokenizer) -> TokenCheck:
    """Compare the tokens that llama.cpp makes with the file with those of the checkpoint's tokenizer."""
    with status("checking tokens"), llama_server(file.path, TOKENIZING_CONTEXT) as server:
        return check_tokens(tokenizer, server.tokenize)


def measure_file(file: ShippedFile, tokenizer: Tokenizer, prompts: PartPrompts, base_first: Tensor) -> Measurement:
    """Measure the file as the checkpoint was measured, fed with the same ids.

    Args:
        base_first: the base model's first-token log-probabilities ``[prompts, vocabulary]`` on the harmless prompts.
    """
    say(f"measuring {file.path.name} on report prompts")
    ids = tokenizer.instructions_ids((*prompts.harmful, *prompts.harmless))
    thought = THOUGHT_TOKENS if tokenizer.thinking else 0
    longest = max(map(len, ids), default=0) + thought + 16  # llama.cpp wants some room
    with llama_server(file.path, longest + ANSWER_TOKENS, SLOTS) as server:
        model = GgufModel(server, tokenizer, vocabulary=base_first.shape[1])
        detect_thought(model)
        return measure(model, prompts, base_first, file.row)[0]


def tokenizer_of(source: Gguf, converted: Gguf) -> dict[str, Value]:
    """The source's tokenizer and chat template as changes to a converted file.

    Raises:
        ForgeError: it has another number of tokens than the converted file has embeddings.
    """
    tokens = len(source.get("tokenizer.ggml.tokens", ()))
    embeddings = next((tensor.rows for tensor in converted.tensors if tensor.name == "token_embd.weight"), tokens)
    if tokens != embeddings:
        raise ForgeError(f"{source.path} has {tokens} tokens and {embeddings} embeddings", "is it damaged?")
    return {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}

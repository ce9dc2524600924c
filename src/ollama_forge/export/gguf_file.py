"""The GGUF file of a run: quantise the converted file, compare its tokens with the checkpoint's, and measure it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ollama_forge import __version__
from ollama_forge.checkpoints.gguf.file import Gguf, Value, read_gguf, value_of
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
class QuantisedFile:
    """The GGUF file of a run.

    Attributes:
        quantised_by: ``embedded``, or the name of the external tool.
        pre_tokenizer_fallback: the pre-tokenizer used because the converter does not know the checkpoint's; else None.
        tokenizer_of_source: whether the file has the tokenizer of a GGUF source.
        verified: whether the checkpoint passed verification; None if it was not verified.
    """

    path: Path
    quant: str
    size: int
    quantised_by: str
    pre_tokenizer_fallback: str | None
    tokenizer_of_source: bool = False
    verified: bool | None = None

    @property
    def row_name(self) -> str:
        """The name of its row among the measurements."""
        return f"GGUF ({self.quant})"

    def described(self) -> dict[str, Any]:
        """Its entry in ``report.json``."""
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
) -> QuantisedFile:
    """Quantise the converted file as planned, with its provenance in the metadata.

    Args:
        fallback: the pre-tokenizer used if the converter did not know the checkpoint's; else None.
        provenance: entries about the edit, written under ``ollama_forge.``.

    Raises:
        ForgeError: quantising failed; ``plan.path`` is unchanged.
    """
    say(f"making {plan.path.name} ({plan.quant})")
    marked = {"version": __version__, "verified": {True: "yes", False: "no", None: "not checked"}[verified]}
    changes = {
        f"ollama_forge.{key}": value_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in {**marked, **provenance}.items()
    }
    if plan.source_file is not None:
        changes |= tokenizer_metadata(plan.source_file, read_gguf(converted))
    quantised_by = quantise(converted, plan.path, plan.quant, changes, find_tool())
    if fallback:
        say(f"warning: llama.cpp's converter does not know this tokenizer's rules; it used those of {fallback!r}")
    size, tokenizer_of_source = plan.path.stat().st_size, plan.source_file is not None
    return QuantisedFile(plan.path, plan.quant, size, quantised_by, fallback, tokenizer_of_source, verified)


def check_file_tokens(file: QuantisedFile, tokenizer: Tokenizer) -> TokenCheck:
    """Compare the tokens that llama.cpp makes with the file with those of the checkpoint's tokenizer."""
    with status("checking tokens"), llama_server(file.path, TOKENIZING_CONTEXT) as server:
        return check_tokens(tokenizer, server.tokenize)


def measure_file(
    file: QuantisedFile, tokenizer: Tokenizer, prompts: PartPrompts, base_log_probs: Tensor
) -> Measurement:
    """Measure the file with llama.cpp, on the same token ids as the checkpoint.

    Args:
        base_log_probs: the base model's first-token log-probabilities on the harmless prompts, float32
            ``[prompts, vocabulary]``.
    """
    say(f"measuring {file.path.name} on report prompts")
    ids = tokenizer.instructions_ids((*prompts.harmful, *prompts.harmless))
    thought = THOUGHT_TOKENS if tokenizer.thinking else 0
    longest = max(map(len, ids), default=0) + thought + 16  # margin for llama.cpp
    with llama_server(file.path, longest + ANSWER_TOKENS, SLOTS) as server:
        model = GgufModel(server, tokenizer, vocabulary=base_log_probs.shape[1])
        detect_thought(model)
        return measure(model, prompts, base_log_probs, file.row_name)[0]


def tokenizer_metadata(source: Gguf, converted: Gguf) -> dict[str, Value]:
    """The metadata of the source's tokenizer and chat template, to copy into a converted file.

    Raises:
        ForgeError: the number of the source's tokens differs from the number of the converted file's embeddings.
    """
    tokens = len(source.get("tokenizer.ggml.tokens", ()))
    embeddings = next((tensor.rows for tensor in converted.tensors if tensor.name == "token_embd.weight"), tokens)
    if tokens != embeddings:
        raise ForgeError(
            f"{source.path} has {tokens} tokens and {embeddings} embeddings", "use an undamaged copy of the file"
        )
    return {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}

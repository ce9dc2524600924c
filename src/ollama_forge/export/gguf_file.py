"""The GGUF file of a run: quantise the converted file, compare its tokens with the checkpoint's, and measure it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.checkpoints.gguf.file import value_of
from ollama_forge.evaluation.measure import Damage, Measured, longest_request, measure_answers
from ollama_forge.evaluation.tokens import TokenCheck, check_tokens
from ollama_forge.export.plan import ExportPlan
from ollama_forge.export.quantise import EMBEDDED, find_tool, quantise
from ollama_forge.models.gguf_model import SLOTS, TOKENIZING_CONTEXT, llama_server
from ollama_forge.models.servers.token_server import RemoteModel
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.progress import say, status, warn
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Tokenizer

IN_PLACE = "in place"
ADAPTER = "adapter"


@dataclass(frozen=True)
class QuantisedFile:
    """A GGUF file of a run.

    Attributes:
        quantised_by: ``embedded``, the name of the external tool, or ``in place`` if only edited tensors are new.
        pre_tokenizer_fallback: the pre-tokenizer used because the converter does not know the checkpoint's; else None.
        tokenizer_of_source: whether the file has the tokenizer of a GGUF source.
        verified: whether the checkpoint passed verification; None if it was not verified.
        base: the model to which the file, an adapter, is added; None if the file is a model.
    """

    path: Path
    quant: str
    size: int
    quantised_by: str
    pre_tokenizer_fallback: str | None
    tokenizer_of_source: bool = False
    verified: bool | None = None
    base: Path | None = None

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


@dataclass(frozen=True)
class QuantisedFiles:
    """The GGUF files of a run; the first one is registered in Ollama."""

    files: tuple[QuantisedFile, ...]


def quantise_files(
    plan: ExportPlan, source: Path, fallback: str | None, provenance: Mapping[str, Any], verified: bool | None
) -> QuantisedFiles:
    """Quantise a converted file to every planned type, with its provenance in the metadata.

    Args:
        source: the converted checkpoint.
        fallback: the pre-tokenizer used if the converter did not know the checkpoint's; else None.
        provenance: entries about the edit, written under ``ollama_forge.``.

    Raises:
        ForgeError: quantising failed; files that are not whole are not written.
    """
    marked = {"version": __version__, "verified": {True: "yes", False: "no", None: "not checked"}[verified]}
    changes = {
        f"ollama_forge.{key}": value_of(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in {**marked, **provenance}.items()
    }
    made = []
    for file in plan.files:
        say(f"making {file.path.name} ({file.quant})")
        tool = quantise(source, file.path, file.quant, changes, find_tool(), imatrix=plan.imatrix)
        size = file.path.stat().st_size
        made.append(QuantisedFile(file.path, file.quant, size, tool, fallback, verified=verified))
    if fallback:
        warn(f"llama.cpp's converter does not know this tokenizer's rules; it used those of {fallback!r}")
    return QuantisedFiles(tuple(made))


def edited_files(plan: ExportPlan, verified: bool | None) -> QuantisedFiles:
    """The edited files of a GGUF source, which are written already."""
    by = IN_PLACE if plan.in_place else EMBEDDED
    files = (
        QuantisedFile(file.path, file.quant, file.path.stat().st_size, by, None, True, verified) for file in plan.files
    )
    return QuantisedFiles(tuple(files))


def adapter_file(path: Path, base: Path) -> QuantisedFiles:
    """An adapter for the GGUF file ``base``."""
    return QuantisedFiles((QuantisedFile(path, ADAPTER, path.stat().st_size, IN_PLACE, None, True, None, base),))


def check_file_tokens(file: QuantisedFile, tokenizer: Tokenizer) -> TokenCheck:
    """Compare the tokens that llama.cpp makes with the file with those of the checkpoint's tokenizer."""
    with status("checking tokens"), llama_server(file.base or file.path, TOKENIZING_CONTEXT) as server:
        return check_tokens(tokenizer, server.tokenize)


def measure_file(
    file: QuantisedFile, tokenizer: Tokenizer, prompts: PartPrompts, damage: Damage, *, seconds: float
) -> Measured:
    """Measure the answers of the file with llama.cpp, on the same token ids as the checkpoint.

    Args:
        damage: that of the file's weights.
        seconds: the time for the answers; where llama.cpp is slower than that, it answers fewer prompts.
    """
    lists = [prompt for side in prompts.lists.values() for prompt in side]
    path, adapter = (file.path, None) if file.base is None else (file.base, file.path)
    with running(path, tokenizer, lists, adapter=adapter) as model:
        return measure_answers(model, prompts, damage, file.row_name, seconds=seconds)


@contextmanager
def running(
    path: Path, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, adapter: Path | None = None
) -> Iterator[RemoteModel]:
    """Run a GGUF file with llama.cpp inside the block, with room for answers to the prompts.

    Args:
        tokenizer: that of the checkpoint that the file was made from.
        adapter: a GGUF adapter to add to the model.
    """
    with llama_server(path, longest_request(tokenizer, prompts), SLOTS, adapter=adapter) as server:
        model = RemoteModel(server, tokenizer)
        detect_thought(model)
        yield model

"""The stages of a run in Ollama: registering the file, comparing its prompts, and measuring its answers there.

Each function returns a ``Stage``: its needs, its outputs, and its work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ollama_forge.checkpoints.gguf.file import read_part
from ollama_forge.evaluation.measure import measure_texts
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.models.chat_model import load_tokenizer
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.models.thoughts import THOUGHT_TOKENS
from ollama_forge.ollama.chat_template import ChatTemplate, FileTemplate
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import Stage, file_digest
from ollama_forge.pipeline.stages import MeasuredRow
from ollama_forge.progress import say
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.records import to_json
from ollama_forge.text.closed_thought import Thought
from ollama_forge.text.tokenizer import Tokenizer

ROW = "in Ollama"
_WRITTEN_OUT = (Thought.CLOSED, Thought.LEFT_OPEN, Thought.RUNS)  # no request to Ollama closes such a thought


def chat_template(ready: Preflight, file: QuantisedFile) -> ChatTemplate | None:
    """The checkpoint's chat template, for prompts of the file in Ollama; None for a base model."""
    tokenizer = load_tokenizer(ready.edited_checkpoint, ready.model_map, ready.settings.load)
    if not tokenizer.template.text:
        return None
    beginning = FileTemplate.of(read_part(file.base or file.path)).beginning
    return ChatTemplate(tokenizer.backend, tokenizer.template.text, "the checkpoint", beginning)


def register(registration: Registration, file: QuantisedFile, prompts: ChatTemplate | None) -> Stage[Registered]:
    """Register the file in Ollama, and compare the prompts there with those of the chat template."""
    needs = {
        "name": registration.name,
        "file": file_digest(file.path),
        "template": to_json(registration.template),
        "prompts": prompts and prompts.text,
        "parameters": to_json(registration.parameters),
        "source": registration.source and to_json(registration.source),
        "url": registration.state and registration.state.url,
    }
    return Stage("ollama", Registered, needs, lambda: registration.register(file.path, prompts))


def measure_in_ollama(ready: Preflight, file: QuantisedFile, made: Registered) -> Stage[MeasuredRow]:
    """Measure the answers that Ollama itself gives to the first harmful and harmless report prompts."""
    count, state = ready.settings.ollama.prompts, ready.registration.state
    assert state is not None
    server = ChatServer(state.url, made.name, ollama=True)
    report = ready.split.report
    prompts = PartPrompts(report.harmful[:count], report.harmless[:count])
    needs: dict[str, Any] = {
        **ready.model_needs,
        "file": file_digest(file.path),
        "made": made.described(),
        "url": state.url,
        "count": count,
    }

    def do() -> MeasuredRow:
        say(f"measuring {made.name} in Ollama on report prompts")
        tokenizer = load_tokenizer(ready.edited_checkpoint, ready.model_map, ready.settings.load)
        return MeasuredRow.of(lambda: measure_texts(asking(server, tokenizer), tokenizer, prompts, ROW))

    return Stage("ollama-measure", MeasuredRow, needs, do)


def asking(
    server: ChatServer, tokenizer: Tokenizer
) -> Callable[[Sequence[Prompt], int, Callable[[int], None]], list[str]]:
    """Ask a server for answers of at most so many tokens behind the thought, where a prompt cannot close that."""

    def ask(prompts: Sequence[Prompt], limit: int, progress: Callable[[int], None]) -> list[str]:
        if tokenizer.thought not in _WRITTEN_OUT:
            return server.answers(tokenizer, prompts, limit, progress)
        texts = server.answers(tokenizer, prompts, limit + THOUGHT_TOKENS, progress)
        encoded = [tokenizer.encode_plain(text) for text in texts]
        return [tokenizer.decode(ids[:limit]) for ids in encoded]

    return ask

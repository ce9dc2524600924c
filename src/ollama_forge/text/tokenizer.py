"""The one tokenizer of a checkpoint: renders its chat template, encodes, decodes, and knows which ids end an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ollama_forge.errors import ForgeError, first_line
from ollama_forge.files import read_json
from ollama_forge.quiet import quiet_transformers
from ollama_forge.text.closed_thought import Thought, closing_text, thought_of
from ollama_forge.text.template import Template, TemplateError, render_template
from ollama_forge.text.thinking import ThinkingSplit, thinking_of_vocabulary

_SHOWN = 60  # characters of an instruction in a message
Ids = list[int]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """A checkpoint's tokenizer with its chat template; ``Tokenizer.load`` makes one.

    Args:
        backend: the tokenizer that transformers loads.
        end_ids: the ids that end an answer, besides the backend's own.
        system: system prompt of every conversation that brings none.
        template_kwargs: arguments that the chat template always gets.
        vocabulary: rows of the model's embedding, where a model is known.
        positions: the most tokens that a model with learned positions takes; None for any other.

    Attributes:
        template: the chat template; its text is empty for a base model.
    """

    def __init__(
        self,
        backend: Any,
        *,
        end_ids: Sequence[int] = (),
        system: str | None = None,
        template_kwargs: Mapping[str, Any] = _NOTHING,
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> None:
        self.backend, self.system, self.template_kwargs = backend, system, template_kwargs
        self.vocabulary, self.positions = vocabulary, positions
        self.template = Template(template_text(backend))
        own = getattr(backend, "eos_token_id", None)
        self.end_ids = tuple(dict.fromkeys([*end_ids, *([own] if own is not None else [])]))

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] = _NOTHING,
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder. The other arguments are those of the class.

        Raises:
            ForgeError: it cannot be read.
        """
        from transformers import AutoTokenizer

        with quiet_transformers():
            try:
                backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # tokenizers raises bare Exceptions
                raise ForgeError(
                    f"the tokenizer in {folder} cannot be loaded: {first_line(error)}", "is it complete?"
                ) from error
        if not getattr(backend, "chat_template", None):
            backend.chat_template = _processor_template(folder)
        return cls(
            backend,
            end_ids=stored_end_ids(folder),
            system=system,
            template_kwargs=template_kwargs,
            vocabulary=vocabulary,
            positions=positions,
        )

    @property
    def pad_id(self) -> int:
        """An id for padding; attention masks it out, so any will do that the model can embed."""
        candidates = [self.backend.pad_token_id, *self.end_ids, 0]
        return next(int(pad) for pad in candidates if pad is not None and self._is_embedded(pad))

    def _is_embedded(self, token: int) -> bool:
        return self.vocabulary is None or token < self.vocabulary

    def render(self, messages: Sequence[Mapping[str, str]], **kwargs: Any) -> str:
        """The templated prompt, generation prompt included; bare text where there is no template.

        Args:
            kwargs: arguments for the template; those of ``template_kwargs`` win.

        Raises:
            ForgeError: the template refuses the messages.
        """
        turns = [dict(message) for message in messages]
        if self.system is not None and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        if not self.template.text:
            return "\n\n".join(turn["content"] for turn in turns)
        return render_template(self.backend, self.template.text, turns, arguments={**kwargs, **self.template_kwargs})

    def encode(self, text: str) -> Ids:
        """Ids of a text: templates write their own special tokens, a base model's bare text gets them here."""
        ids: Ids = self.backend(text, add_special_tokens=not self.template.text).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    @cached_property
    def thinking(self) -> ThinkingSplit | None:
        """Between which texts the model's thoughts stand, by its template or its vocabulary; None: it has no marks."""
        added: dict[str, int] = self.backend.get_added_vocab()
        return self.template.thinking or thinking_of_vocabulary(added)

    @cached_property
    def thought(self) -> Thought:
        """What is done about the thought before an answer to an instruction."""
        turn = [{"role": "user", "content": "Hello."}]
        off, on = (self.render(turn, **self.template.thinking_arguments(think)) for think in (False, True))
        return thought_of(self.template, off, on, self.template_kwargs)

    def instruction_ids(self, instruction: str) -> Ids:
        """The templated prompt of one instruction, as models are computed on and measured: its thought is closed.

        Raises:
            ForgeError: the template leaves the instruction out, or the model cannot take the prompt.
        """
        return self._fitting_ids(instruction, closed=not self.thought.must_run)

    def closed_ids(self, instruction: str) -> Ids:
        """The same with its thought closed in any case: where the first token of the answer stands."""
        return self._fitting_ids(instruction, closed=True)

    def _fitting_ids(self, instruction: str, *, closed: bool) -> Ids:
        text = self._instruction_text(instruction, closed=closed)
        start = repr(instruction[:_SHOWN] + ("…" if len(instruction) > _SHOWN else ""))
        if "".join(instruction.split()) not in "".join(text.split()):
            raise TemplateError(
                f"the chat template leaves the instruction out: {start} is not in the rendered prompt",
                "take a release of the model with a working chat template",
            )
        ids = self.encode(text)
        beyond = next((token for token in ids if not self._is_embedded(token)), None)
        if beyond is not None:
            raise ForgeError(
                f"the prompt of {start} holds token {beyond} ({self.backend.convert_ids_to_tokens(beyond)}), "
                f"but the model's embedding has {self.vocabulary} rows",
                "the tokenizer knows tokens that the model lacks: take the tokenizer of this very model",
            )
        if self.positions is not None and len(ids) > self.positions:
            raise ForgeError(
                f"the instruction {start} is {len(ids)} tokens long in the chat template, "
                f"and the model has {self.positions} learned positions",
                "shorten it, or take it out of the list",
            )
        return ids

    def _instruction_text(self, instruction: str, *, closed: bool) -> str:
        turn = [{"role": "user", "content": instruction}]
        text = self.render(turn, **self.template.thinking_arguments(False))
        if self.thinking is None or not closed or self.thought in (Thought.NONE, Thought.SWITCHED_OFF):
            return text
        return text + closing_text(self.thinking, text)

    def marked_text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included: the marks of a thought may be such."""
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text

    def instructions_ids(self, instructions: Sequence[str]) -> list[Ids]:
        return [self.instruction_ids(instruction) for instruction in instructions]


def template_text(backend: Any) -> str:
    """The chat template of a transformers tokenizer; of several named ones that for tools, "" for none."""
    found = getattr(backend, "chat_template", None) or ""
    if isinstance(found, Mapping):
        found = found.get("tool_use") or found.get("default") or ""
    return str(found)


def _processor_template(folder: Path) -> str | None:
    """The template in ``chat_template.json``, where processors of text and images keep it; None without one."""
    if not (folder / "chat_template.json").is_file():
        return None
    content = read_json(folder / "chat_template.json")
    template = content.get("chat_template") if isinstance(content, dict) else None
    return template if isinstance(template, str) else None


def stored_end_ids(folder: Path) -> list[int]:
    """Ids that end an answer by a folder's generation config and config."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            listed = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ids += [listed] if isinstance(listed, int) else listed or []
    return list(dict.fromkeys(ids))

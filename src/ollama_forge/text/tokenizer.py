"""The tokenizer of a checkpoint: renders its chat template, encodes, decodes, and knows its end-of-sequence ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ollama_forge.errors import ForgeError, first_line
from ollama_forge.files import read_json
from ollama_forge.prompts.conversation import Prompt, messages_of
from ollama_forge.quiet import quiet_transformers
from ollama_forge.text.closed_thought import Moment, Thought, closing_text, opening_text, thought_of
from ollama_forge.text.template import Template, render_template
from ollama_forge.text.template_process import TemplateError
from ollama_forge.text.thinking import ThinkingSplit, thinking_of_vocabulary

_EXCERPT = 60  # characters of an instruction in a message
Ids = list[int]
_NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """A checkpoint's tokenizer with its chat template; ``Tokenizer.load`` loads it.

    Args:
        backend: the transformers tokenizer.
        end_ids: end-of-sequence ids in addition to the backend's.
        system: system prompt of conversations that have none.
        template_kwargs: arguments of the chat template in every rendering.
        vocabulary: number of rows of the model's embedding; None: unknown.
        positions: number of learned positions of the model; None: it has none.

    Attributes:
        template: the chat template; its text is empty for a base model.
    """

    def __init__(
        self,
        backend: Any,
        *,
        end_ids: Sequence[int] = (),
        system: str | None = None,
        template_kwargs: Mapping[str, Any] = _NO_ARGUMENTS,
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
        template_kwargs: Mapping[str, Any] = _NO_ARGUMENTS,
        vocabulary: int | None = None,
        positions: int | None = None,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder. The other arguments are those of the class.

        Args:
            trust_remote_code: execute the Python code that the tokenizer's config names.

        Raises:
            ForgeError: the tokenizer cannot be loaded.
        """
        from transformers import AutoTokenizer

        with quiet_transformers():
            try:
                backend = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=trust_remote_code
                )
            except Exception as error:  # tokenizers raises bare Exceptions
                raise _load_error(folder, error, trust_remote_code) from error
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
        """The id for padding; the attention mask hides it, so it can be any id that the model can embed."""
        candidates = [self.backend.pad_token_id, *self.end_ids, 0]
        return next(int(pad) for pad in candidates if pad is not None and self._is_embedded(pad))

    def _is_embedded(self, token: int) -> bool:
        return self.vocabulary is None or token < self.vocabulary

    def render(self, messages: Sequence[Mapping[str, str]], **kwargs: Any) -> str:
        """Render messages with the chat template and the generation prompt; without a template, join their contents.

        Args:
            kwargs: arguments for the template; ``template_kwargs`` win over them.

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
        """Encode a text. Special tokens are added only without a chat template, because templates contain them.

        Raises:
            ForgeError: the tokenizer cannot encode the text.
        """
        return self._encode(text, special=not self.template.text)

    def encode_plain(self, text: str) -> Ids:
        """Encode a text without special tokens.

        Raises:
            ForgeError: the tokenizer cannot encode the text.
        """
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> Ids:
        try:
            ids: Ids = self.backend(text, add_special_tokens=special).input_ids
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = f"the tokenizer cannot encode a text of {len(text)} characters: {first_line(error)}"
            raise ForgeError(reason, "check that its files are complete") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode an answer without its special tokens."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    @cached_property
    def thinking(self) -> ThinkingSplit | None:
        """The tags around the model's thoughts, by its template or its vocabulary; None if it has none."""
        added: dict[str, int] = self.backend.get_added_vocab()
        return self.template.thinking or thinking_of_vocabulary(added)

    @cached_property
    def thought(self) -> Thought:
        """How prompts of instructions deal with the thought before the answer."""
        turn = [{"role": "user", "content": "Hello."}]
        off, on = (self.render(turn, **self.template.thinking_arguments(think)) for think in (False, True))
        return thought_of(self.template, off, on, self.template_kwargs)

    def instruction_ids(self, prompt: Prompt) -> Ids:
        """Encode one prompt for computing directions and for measuring: its thought is closed.

        Raises:
            ForgeError: the template leaves the instruction out, or the model cannot take the prompt.
        """
        closed = not self.thought.must_run
        return self._fitting_ids(prompt, self._prompt_text(messages_of(prompt), closed=closed))

    def closed_ids(self, prompt: Prompt) -> Ids:
        """Encode the prompt with its thought always closed, so that the first token of the answer comes next."""
        return self._fitting_ids(prompt, self._prompt_text(messages_of(prompt), closed=True))

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The moments at which a prompt can end; there is one of a thought if the model thinks."""
        split, turn = self.thinking, [{"role": "user", "content": "Hello."}]
        if split is None or self.thought is Thought.NONE:
            return (Moment.ANSWER,)
        never = self.render(turn, **self.template.thinking_arguments(True)).rstrip().endswith(split.closing)
        return (Moment.ANSWER,) if never else (Moment.ANSWER, Moment.THOUGHT)

    def thought_ids(self, prompt: Prompt) -> Ids:
        """Encode the prompt with a thought that has just been opened, so that its first token comes next."""
        assert self.thinking is not None
        text = self._rendered(messages_of(prompt), think=True)
        return self._fitting_ids(prompt, text + opening_text(self.thinking, text))

    def length(self, prompt: Prompt) -> int:
        """Number of tokens of a prompt, whose thought is closed."""
        return len(self.encode(self._prompt_text(messages_of(prompt), closed=True)))

    def _fitting_ids(self, prompt: Prompt, text: str) -> Ids:
        """Encode a rendered prompt that the model can take."""
        instruction = messages_of(prompt)[-1]["content"]
        start = repr(instruction[:_EXCERPT] + ("…" if len(instruction) > _EXCERPT else ""))
        if "".join(instruction.split()) not in "".join(text.split()):
            raise TemplateError(
                f"the chat template leaves the instruction out: {start} is not in the rendered prompt",
                "use a release of the model with a working chat template",
            )
        ids = self.encode(text)
        beyond = next((token for token in ids if not self._is_embedded(token)), None)
        if beyond is not None:
            raise ForgeError(
                f"the prompt of {start} holds token {beyond} ({self.backend.convert_ids_to_tokens(beyond)}), "
                f"but the model's embedding has {self.vocabulary} rows",
                "the tokenizer has more tokens than the model: use the tokenizer of this model",
            )
        if self.positions is not None and len(ids) > self.positions:
            raise ForgeError(
                f"the instruction {start} is {len(ids)} tokens long in the chat template, "
                f"and the model has {self.positions} learned positions",
                "shorten the instruction, or remove it from the list",
            )
        return ids

    def _prompt_text(self, messages: Sequence[Mapping[str, str]], *, closed: bool) -> str:
        text = self._rendered(messages, think=False)
        if self.thinking is None or not closed or self.thought in (Thought.NONE, Thought.SWITCHED_OFF):
            return text
        return text + closing_text(self.thinking, text)

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, think: bool) -> str:
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _without_system(messages)
        return self.render(messages, **self.template.thinking_arguments(think))

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the chat template renders a system message; some refuse it, and some leave it out."""
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
        try:
            return "Be brief." in self.render(turns)
        except ForgeError:
            return False

    def marked_text(self, ids: Sequence[int]) -> str:
        """Decode with special tokens, because the tags of a thought may be special tokens."""
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text

    def instructions_ids(self, prompts: Sequence[Prompt]) -> list[Ids]:
        return [self.instruction_ids(prompt) for prompt in prompts]


def _without_system(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The messages with the system message put in front of the first message of the user."""
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _load_error(folder: Path, error: Exception, trust_remote_code: bool) -> ForgeError:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not trust_remote_code and isinstance(config, dict) and config.get("auto_map"):
        return ForgeError(
            f"the tokenizer in {folder} needs Python code of its own, which is not executed",
            "read that code, then add --trust-remote-code to execute it",
        )
    return ForgeError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}", "check that it is complete")


def template_text(backend: Any) -> str:
    """The chat template of a transformers tokenizer; if it has several, the one for tools; "" if it has none."""
    found = getattr(backend, "chat_template", None) or ""
    if isinstance(found, Mapping):
        found = found.get("tool_use") or found.get("default") or ""
    return str(found)


def _processor_template(folder: Path) -> str | None:
    """The template in ``chat_template.json``, where processors of images and text keep it; None without the file."""
    if not (folder / "chat_template.json").is_file():
        return None
    content = read_json(folder / "chat_template.json")
    template = content.get("chat_template") if isinstance(content, dict) else None
    return template if isinstance(template, str) else None


def stored_end_ids(folder: Path) -> list[int]:
    """The end-of-sequence ids in a folder's ``generation_config.json`` and ``config.json``."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            listed = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        ids += [one for one in (listed if isinstance(listed, list) else [listed]) if type(one) is int and one >= 0]
    return list(dict.fromkeys(ids))

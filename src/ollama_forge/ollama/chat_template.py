"""Chat templates (Jinja): that of a GGUF file, and the one that Ollama's prompts are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.ollama.learned_template import LearnedTemplate, Messages, NotLearned, learn
from ollama_forge.sources.pre_tokenizers import PRE_TOKENIZERS
from ollama_forge.text.template import Template, render_template
from ollama_forge.text.template_renderer import TemplateRenderer

CHAT_TEMPLATE_KEY = "tokenizer.chat_template"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class FileTemplate:
    """What a GGUF file says of prompts.

    Attributes:
        text: its chat template; "" if it has none.
        special_tokens: texts of special tokens, by the names that chat templates use.
        beginning: the beginning-of-text token that llama.cpp puts in front of each prompt; "" if it puts none.
    """

    text: str
    special_tokens: Mapping[str, str]
    beginning: str = ""

    @classmethod
    def of(cls, file: Gguf) -> FileTemplate:
        """Read it from the metadata of a file."""
        tokens = file.get("tokenizer.ggml.tokens", [])
        numbers = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
        special = {
            name: str(tokens[number])
            for name, number in numbers.items()
            if isinstance(number, int) and 0 <= number < len(tokens)
        }
        adds = file.get("tokenizer.ggml.add_bos_token", _adds_bos(file))
        return cls(str(file.get(CHAT_TEMPLATE_KEY, "")), special, special.get("bos_token", "") if adds else "")

    @property
    def does_more(self) -> bool:
        """Whether Ollama goes by it in spite of a TEMPLATE, as it knows tools or thinking, by Ollama's own rule."""
        tools = "tools" in self.text or "tool_call" in self.text
        splits = any(f"content.split({quote}</think>{quote})" in self.text for quote in "'\"")
        return tools or ("</think>" in self.text and ("<think>" in self.text or splits))


def _adds_bos(file: Gguf) -> bool:
    """Whether llama.cpp adds the beginning-of-text token where the file does not say."""
    if file.get("tokenizer.ggml.model") != "gpt2":
        return True
    rule = PRE_TOKENIZERS.get(str(file.get("tokenizer.ggml.pre", "")))
    return rule is not None and rule.adds_bos


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template that Ollama's prompts are compared with.

    Attributes:
        backend: the transformers tokenizer, or a ``TemplateRenderer``.
        text: the Jinja template.
        owner: whose it is, such as ``the checkpoint``.
        beginning: the beginning-of-text token that llama.cpp puts in front of each prompt, which Ollama does not show.
    """

    backend: Any
    text: str
    owner: str
    beginning: str = ""

    @classmethod
    def of_file(cls, file: FileTemplate, text: str = "", owner: str = "the file") -> ChatTemplate:
        """The chat template of a GGUF file, or another one rendered with its special tokens."""
        return cls(TemplateRenderer(file.special_tokens), text or file.text, owner, file.beginning)

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads tools."""
        return Template(self.text).takes_tools

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, without the beginning that llama.cpp adds. Thinking is on, as it is by default in Ollama.

        Raises:
            ForgeError: the template refuses the conversation.
        """
        return self._whole(messages, tools).removeprefix(self.beginning)

    def _whole(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        arguments = Template(self.text).thinking_arguments(True)
        return render_template(self.backend, self.text, messages, tools=tools, arguments=arguments)

    @cached_property
    def learned(self) -> LearnedTemplate | None:
        """The template in Ollama's language; None where that cannot say it."""
        try:
            return learn(self._whole, self.beginning)
        except NotLearned:
            return None

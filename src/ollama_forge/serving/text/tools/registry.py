"""All tool call formats, the most specific first. A new format is one file, and one line here."""

from __future__ import annotations

from ollama_forge.serving.text.tools.base import ToolFamily
from ollama_forge.serving.text.tools.deepseek import DeepSeek
from ollama_forge.serving.text.tools.gemma import Gemma
from ollama_forge.serving.text.tools.hermes import Hermes
from ollama_forge.serving.text.tools.llama import Llama
from ollama_forge.serving.text.tools.mistral import Mistral
from ollama_forge.serving.text.tools.plain import Plain
from ollama_forge.serving.text.tools.qwen_coder import QwenCoder

FAMILIES: tuple[ToolFamily, ...] = (QwenCoder(), Mistral(), DeepSeek(), Gemma(), Llama(), Hermes(), Plain())


def family_of(template: str) -> ToolFamily:
    """The tool call format of a chat template; plain JSON if it has no other."""
    return next(family for family in FAMILIES if family.detect(template))

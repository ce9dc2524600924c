"""Render chat templates without a tokenizer, for a GGUF file of which only the template is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TemplateRenderer:
    """Stands for a tokenizer in ``render_template``.

    Args:
        special_tokens: by the names that templates use: ``bos_token``, ``eos_token``, ….
    """

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self.special_tokens = dict(special_tokens)

    def apply_chat_template(
        self, turns: Sequence[Mapping[str, Any]], *, chat_template: str, tokenize: bool, **options: Any
    ) -> str:
        """Render as transformers' tokenizers do; ``tokenize`` must be false."""
        from transformers.utils import chat_template_utils

        assert not tokenize
        render: Any = chat_template_utils.render_jinja_template
        rendered, _ = render([turns], chat_template=chat_template, **self.special_tokens, **options)
        return str(rendered[0])

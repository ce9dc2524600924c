"""What rendering a chat template takes of a tokenizer, for a GGUF file of which only the template is needed."""

from __future__ import annotations

from collections.abc import Mapping


class TemplateRenderer:
    """Stands for a tokenizer in ``render_template``.

    Args:
        special_tokens: by the names that templates use: ``bos_token``, ``eos_token``, ….
    """

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self.special_tokens_map = dict(special_tokens)

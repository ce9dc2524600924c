"""Completion of words with a colon in bash, which takes each colon for a word of its own (``ollama : llama3 : 8b``)."""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, CompletionItem, split_arg_string


class BashWithColons(BashComplete):
    """Puts words that bash took apart together again, and answers with what follows the last colon, as bash expects."""

    _answered = ""  # the part of the incomplete word that bash does not replace

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ["COMP_WORDS"])
        position = int(os.environ["COMP_CWORD"])
        current = words[position] if position < len(words) else ""
        joined: list[str] = []
        for word in [*words[1:position], current]:
            if joined and (word == ":" or joined[-1].endswith(":")):
                joined[-1] += word
            else:
                joined.append(word)
        *before, incomplete = joined
        self._answered = incomplete[: incomplete.rfind(":") + 1]
        return before, incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value.removeprefix(self._answered)}"

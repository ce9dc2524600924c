"""Prints an answer in the terminal as it comes, and notices an answer that says the same passage over and over."""

from __future__ import annotations

import os
from typing import TextIO

LONGEST_PASSAGE = 64  # pieces
MOST_TIMES = 100  # as many equal tokens as Ollama allows
MOST_PIECES = 400  # of a longer passage's repetitions: 50 lines of 8 tokens, or 6 passages of 64
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class RepetitionDetector:
    """Follows an answer piece by piece (a piece is the text of about one token).

    An answer repeats itself if it ends in one passage of at most 64 pieces that stands there more than a hundred times,
    or for more than 400 pieces, with nothing between. Honest repetition stays below that: other words come between a
    poem's refrains, and the lines of a table or of a count differ. A piece costs at most 64 comparisons.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._equal = [0] * (LONGEST_PASSAGE + 1)  # by length: how many of the last pieces equal the one so far back

    def add(self, piece: str) -> int:
        """Follow one more piece; return how many of the last pieces repeat the passage before them, or 0."""
        said = self._said
        for length in range(1, min(LONGEST_PASSAGE, len(said)) + 1):
            again = self._equal[length] + 1 if said[-length] == piece else 0
            self._equal[length] = again
            if again + length > min(MOST_TIMES * length, MOST_PIECES):
                return again
        said.append(piece)
        if len(said) > LONGEST_PASSAGE:
            del said[0]
        return 0


class RepetitionError(Exception):
    """The answer repeats itself."""


class AnswerPrinter:
    """Prints an answer as it comes: its thought dimmed on a terminal, in brackets elsewhere and under NO_COLOR.

    Attributes:
        thinking, content: the text so far; of a passage that repeats, only its first occurrence.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._marks = (_DIM, _PLAIN) if out.isatty() and not os.environ.get("NO_COLOR") else ("[", "]")
        self._pieces: list[tuple[str, str]] = []
        self._repetition = RepetitionDetector()
        self._thought = self._answered = False

    @property
    def thinking(self) -> str:
        return "".join(thinking for thinking, _ in self._pieces)

    @property
    def content(self) -> str:
        return "".join(content for _, content in self._pieces)

    def show(self, thinking: str, content: str) -> None:
        """Print one piece.

        Raises:
            RepetitionError: the answer repeats itself.
        """
        if thinking:
            self._out.write(thinking if self._thought else self._marks[0] + thinking)
            self._thought = True
        if content:
            if self._thought and not self._answered:
                self._out.write(self._marks[1] + "\n")
            self._out.write(content)
            self._answered = True
        self._out.flush()
        if not thinking and not content:
            return
        self._pieces.append((thinking, content))
        repeated = self._repetition.add(thinking + content)
        if repeated:
            del self._pieces[-repeated:]
            raise RepetitionError

    def end(self) -> None:
        if self._thought and not self._answered:
            self._out.write(self._marks[1])
        if self._thought or self._answered:
            self._out.write("\n")
        self._out.flush()

"""Notices that an answer says the same passage over and over."""

from __future__ import annotations

LONGEST_PASSAGE = 64  # pieces
MOST_TIMES = 100  # as many equal tokens as Ollama allows
MOST_PIECES = 400  # of a longer passage's repetitions: 50 lines of 8 tokens, or 6 passages of 64


class LoopWatch:
    """Follows an answer piece by piece (a piece is the text of about one token).

    An answer loops where it ends in one passage of at most 64 pieces, said more than a hundred times or for more than
    400 pieces with nothing between. Honest repetition stays below that: other words come between a poem's refrains,
    and the lines of a table or of a count differ. A piece costs at most 64 comparisons.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._equal = [0] * (LONGEST_PASSAGE + 1)  # by length: how many of the last pieces equal the one so far back

    def add(self, piece: str) -> int:
        """Follow one more piece; returns how many of the last pieces repeat the passage before them, 0 for no loop."""
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

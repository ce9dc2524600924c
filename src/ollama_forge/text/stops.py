"""Stop strings, also across the borders of streamed pieces of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and holds back text that may begin one.

    Attributes:
        stopped_by: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, text: str) -> str:
        """Add text; return the part that cannot belong to a stop string, and "" once one was found."""
        if not self._stops:
            return text
        if self.stopped_by is not None:
            return ""
        text = self._held + text
        begun = len(text) - max(held_back(text, stop) for stop in self._stops)
        place, stop = self._first(text)
        if stop is not None and place <= begun:
            return self._cut(text, place, stop)
        self._held = text[begun:]
        return text[:begun]

    def end(self) -> str:
        """The text that was held back, up to a stop string in it."""
        text, self._held = self._held, ""
        place, stop = self._first(text)
        return text if stop is None else self._cut(text, place, stop)

    def _first(self, text: str) -> tuple[int, str | None]:
        met = [(place, len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if not met:
            return len(text), None
        place, _, stop = min(met)
        return place, stop

    def _cut(self, text: str, place: int, stop: str) -> str:
        self._held, self.stopped_by = "", stop
        return text[:place]


def held_back(text: str, marker: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0

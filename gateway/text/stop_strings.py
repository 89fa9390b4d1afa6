"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, holding back what may be its beginning.

    The first is the one that is complete first (of those, the longest): then the outcome does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that can be shown now; after a match, nothing more."""
        if self.matched:
            return ""
        if not self._stops:
            return text
        self._held += text
        start = self._first_match()
        if start is not None:
            self.matched = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._may_begin()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _first_match(self) -> int | None:
        best: tuple[int, int] | None = None  # end, start
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _may_begin(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), len(self._stops[0]) - 1)
        for size in range(longest, 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

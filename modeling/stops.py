"""Stop texts, which end an answer before their first occurrence, whatever the backend and the split into pieces."""

from collections.abc import Sequence


class StopTexts:
    """Truncation of an answer that arrives in pieces.

    Args:
        stops: Texts that end the answer.

    Attributes:
        found: Stop text that ended the answer, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    @property
    def reached(self) -> bool:
        """True if a stop text ended the answer."""
        return self.found is not None

    def feed(self, text: str) -> str:
        """Add the next piece, and return the text to send. A possible beginning of a stop text is held back."""
        if not self._stops:
            return text
        self._held += text
        # The stop text that is complete first counts, as in a server that checks after each token. The leftmost one
        # would depend on the pieces: a longer stop text that began before it may still be incomplete.
        ends = [(place + len(stop), place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            _, place, self.found = min(ends)
            told, self._held = self._held[:place], ""
            return told
        keep = max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), 1 + len(self._held)))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told

    @property
    def holds(self) -> bool:
        """True if text is held back."""
        return bool(self._held)

    def rest(self) -> str:
        """Return the text held back, at the end of the answer."""
        told, self._held = self._held, ""
        return told

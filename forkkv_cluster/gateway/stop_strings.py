"""Stop strings on a stream of text: what may be sent, and where the output ends. Pure."""

from __future__ import annotations


class StopStringMatcher:
    """Cuts a text stream before the first occurrence of any stop string.

    Text that may yet turn out to begin a stop string is held back; the longest such tail is shorter than the longest
    stop string. Without stop strings everything passes at once.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain now. Once ``matched`` is set, nothing more comes."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(self._held.index(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            position, _, self.matched = min(found)
            certain, self._held = self._held[:position], ""
            return certain
        keep = self._held_len()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def flush(self) -> str:
        """The rest, at the end of the stream: no stop string can follow."""
        rest, self._held = self._held, ""
        return rest

    def _held_len(self) -> int:
        """Length of the longest tail of the held text that is a proper prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

"""Stop strings on a stream of text: what may be sent, and where the output ends. Pure."""

from __future__ import annotations


class StopStringMatcher:
    """Cuts a text stream before the first occurrence of any stop string, or after it if it ``is_included``.

    Text that may yet turn out to begin a stop string is held back; the longest such tail is shorter than the longest
    stop string. Without stop strings everything passes at once.
    """

    def __init__(self, stop: tuple[str, ...] = (), *, is_included: bool = False) -> None:
        self._stop = stop
        self._is_included = is_included
        self._held = ""
        self._num_unarmed = 0  # characters of the held text in which no stop string may end
        self.matched: str | None = None

    def push(self, text: str, *, is_armed: bool = True) -> str:
        """Text that is certain now. Once ``matched`` is set, nothing more comes.

        A stop string that ends inside a text that is not armed does not count.
        """
        if self.matched is not None:
            return ""
        self._held += text
        if not is_armed:
            self._num_unarmed = len(self._held)
        found = [(position, -len(stop), stop) for stop in self._stop if (position := self._find(stop)) >= 0]
        if found:
            position, _, self.matched = min(found)
            certain, self._held = self._held[: position + self._is_included * len(self.matched)], ""
            return certain
        keep = self._held_len()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        self._num_unarmed = max(0, self._num_unarmed - len(certain))
        return certain

    def flush(self) -> str:
        """The rest, at the end of the stream: no stop string can follow."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, stop: str) -> int:
        """Where the first ``stop`` begins that ends in armed text; -1 without one."""
        return self._held.find(stop, max(0, self._num_unarmed - len(stop) + 1)) if self._num_unarmed < len(self._held) else -1

    def _held_len(self) -> int:
        """Length of the longest tail of the held text that is a proper prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

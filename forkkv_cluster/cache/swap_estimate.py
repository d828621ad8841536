"""Whether copying KV back from the host is cheaper than computing it again. Pure: somebody else measures."""

from __future__ import annotations

DECAY = 0.9
"""Weight of all earlier measurements at each new one: the means follow the last ten or so, weighted by their size."""


class RunningRate:
    """Units a second, as a running mean."""

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0

    def note(self, units: float, seconds: float) -> None:
        """One measurement; one without a duration says nothing and is left out."""
        if units > 0 and seconds > 0:
            self._units = DECAY * self._units + units
            self._seconds = DECAY * self._seconds + seconds

    @property
    def per_second(self) -> float | None:
        """None before the first measurement."""
        return self._units / self._seconds if self._seconds else None


class SwapEstimate:
    """Decides from two measured rates of this engine: bytes copied and prompt tokens run, each by second."""

    def __init__(self) -> None:
        self.copied_bytes = RunningRate()
        self.prefilled_tokens = RunningRate()

    def pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether copying ``num_bytes`` takes less time than running ``num_tokens``; so it is as long as one is unknown."""
        bytes_per_s, tokens_per_s = self.copied_bytes.per_second, self.prefilled_tokens.per_second
        if num_tokens <= 0:
            return False
        if bytes_per_s is None or tokens_per_s is None:
            return True
        return num_bytes / bytes_per_s < num_tokens / tokens_per_s

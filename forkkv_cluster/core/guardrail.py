"""What shadow probes found of adapters in production: sliding windows, and when drift is too much. Pure: no clock.

A probe runs a finished branch again, once as it was served and once by the adapter's reference, teacher-forced on the tokens
that were served, and compares the two (``core.agreement``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import xxhash

from forkkv_cluster.core.agreement import Agreement, TextAgreement
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import Sharing


class DriftWindow:
    """The last probes of one adapter under one sharing: as many as hold ``max_positions``, and one more."""

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions
        self._probes: deque[TextAgreement] = deque()
        self._total = Agreement()

    def add(self, probe: TextAgreement) -> None:
        self._probes.append(probe)
        self._total += probe.agreement
        while self._total.num_positions - self._probes[0].agreement.num_positions >= self._max_positions:
            self._probes.popleft()
            # Counted anew: a running sum of floats would drift itself.
            self._total = sum((kept.agreement for kept in self._probes), Agreement())

    @property
    def num_probes(self) -> int:
        return len(self._probes)

    @property
    def total(self) -> Agreement:
        return self._total

    @property
    def num_diverged(self) -> int:
        """Probes with at least one disagreement."""
        return sum(1 for probe in self._probes if probe.first_divergence is not None)

    @property
    def first_divergence(self) -> int | None:
        """Median, over probes that diverged, of the output tokens before the first disagreement; None where none did."""
        found = sorted(probe.first_divergence for probe in self._probes if probe.first_divergence is not None)
        return found[len(found) // 2] if found else None


@dataclass(frozen=True, slots=True)
class DriftKey:
    """Whose drift: an adapter's content under one sharing."""

    adapter: AdapterDigest
    sharing: Sharing


@dataclass(slots=True)
class Guardrail:
    """Windows by adapter and sharing, and the rule on them.

    window_positions  positions of a window
    min_positions     fewer say nothing, whatever they say
    """

    window_positions: int
    min_positions: int
    _windows: dict[DriftKey, DriftWindow] = field(default_factory=dict)

    def note(self, key: DriftKey, probe: TextAgreement) -> DriftWindow:
        """One more probe; its window."""
        window = self._windows.setdefault(key, DriftWindow(self.window_positions))
        window.add(probe)
        return window

    def is_beyond(self, key: DriftKey, max_disagreement: float) -> bool:
        """Whether the window's disagreement is above ``max_disagreement`` with 95 % confidence (``Agreement.lower_bound``)."""
        window = self._windows.get(key)
        if window is None or window.total.num_positions < self.min_positions:
            return False
        return window.total.lower_bound > max_disagreement

    def forget(self, adapter: AdapterDigest) -> None:
        """The adapter is unloaded."""
        for key in [key for key in self._windows if key.adapter == adapter]:
            del self._windows[key]

    def windows(self) -> tuple[tuple[DriftKey, DriftWindow], ...]:
        return tuple(self._windows.items())


def is_chosen(request_id: str, share: float) -> bool:
    """Whether the request is among the ``share`` (0 to 1) that is probed: a function of its id, so that no pattern of traffic
    is in step with it."""
    return xxhash.xxh3_64_intdigest(request_id.encode()) < share * 2**64

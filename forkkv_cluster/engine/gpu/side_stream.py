"""Work beside the current stream's: forked from it, joined to it, in a captured graph as outside of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream of higher priority than others have; without a GPU nothing, all work is done in its turn.

    What is read or written inside ``fork`` has to live until ``join``; what is allocated inside is this stream's memory, and
    must not be used outside.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Launches inside run after all that was launched before, beside what is launched from now to ``join``."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on runs after all that was launched inside ``fork``."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

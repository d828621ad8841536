"""The host tier: weights of adapters in host memory, bounded in bytes, so that most slots are filled without a disk."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo


class Weights(Protocol):
    """One adapter's weights as a runner reads them: opaque, but for what bookkeeping must know."""

    @property
    def info(self) -> AdapterInfo: ...

    @property
    def residual_rank(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class HostAdapters:
    """Least recently used weights go first. Weights larger than the whole tier are not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._weights: OrderedDict[AdapterDigest, tuple[Weights, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._weights

    def get(self, digest: AdapterDigest) -> Weights | None:
        """The weights, which thereby are the most recently used."""
        found = self._weights.get(digest)
        if found is None:
            return None
        self._weights.move_to_end(digest)
        return found[0]

    def put(self, weights: Weights) -> None:
        self.drop(weights.info.digest)
        num_bytes = weights.num_bytes
        if num_bytes > self.max_bytes:
            return
        while self.num_bytes + num_bytes > self.max_bytes:
            _, (_, freed) = self._weights.popitem(last=False)
            self.num_bytes -= freed
        self._weights[weights.info.digest] = (weights, num_bytes)
        self.num_bytes += num_bytes

    def drop(self, digest: AdapterDigest) -> None:
        found = self._weights.pop(digest, None)
        if found is not None:
            self.num_bytes -= found[1]

    def counted_bytes(self) -> int:
        """What ``num_bytes`` must be, counted anew."""
        return sum(num_bytes for _, num_bytes in self._weights.values())

"""What an engine asks of the device side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.request import Guide, ModelInfo, TokenLogprob
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.engine.scores import TokenScores


class SampledToken(Protocol):
    """One sampled token. ``logprob`` is set when the request asks for log probabilities."""

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> TokenLogprob | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """tokens [R]: None for a row whose logits are not finite numbers, or whose guide gave up. scores: of the batch's
    ``scored_rows`` [n], None without any."""

    tokens: Sequence[SampledToken | None]
    scores: TokenScores | None = None


class Runner(Protocol):
    """The device side: weights, page memory, one forward pass and the sampler."""

    info: ModelInfo
    geometry: KVGeometry

    def allocate(self, kv_bytes: int, host_bytes: int = 0) -> None: ...

    def read_adapter(self, name: str, path: str) -> Weights:
        """Read a PEFT directory into host memory and check it against the model. Safe on any thread.

        Raises InvalidArgument or Unsupported.
        """
        ...

    def place_adapter(self, weights: Weights) -> int:
        """Put weights that it has read into a free slot of the device."""
        ...

    def unload_adapter(self, slot: int) -> None: ...

    def check_guide(self, guide: Guide) -> None:
        """Raises Unsupported for one that this model's outputs cannot be held to."""
        ...

    def swap(self, batch: Batch) -> None:
        """Copy the batch's whole pages to the host tier, then those from it; called before ``run`` where there are any."""
        ...

    def run(self, batch: Batch, sampling: Sequence[SamplingRow]) -> StepResult:
        """Run the batch and sample its logit rows; ``sampling`` [R] gives each row's params, position and tokens."""
        ...

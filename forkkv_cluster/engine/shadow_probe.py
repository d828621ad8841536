"""The guardrail's shell: which finished branches are run again, when, and what follows from it.

A probe takes place while no client's request waits, one at a time, in the background; when one waits, it is dropped. It writes
nothing that stays in the cache.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from forkkv_cluster.core.agreement import TextAgreement, compare
from forkkv_cluster.core.config import GuardrailConfig
from forkkv_cluster.core.guardrail import DriftKey, DriftWindow, Guardrail, is_chosen
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, GenerateRequest, SamplingParams, Sharing
from forkkv_cluster.core.request_builder import Envelope, RequestBuilder
from forkkv_cluster.core.status import AdapterDrift
from forkkv_cluster.engine.auto_sharing import AutoSharing
from forkkv_cluster.engine.background import Lane, Rounds
from forkkv_cluster.engine.calibration import NUM_TOP
from forkkv_cluster.engine.sequence import Turn

logger = logging.getLogger(__name__)

INTERNAL_TENANT = "(shadow probes)"
_OWNER = "probe"


class ShadowProbe:
    """Not thread-safe."""

    def __init__(self, config: GuardrailConfig, builder: RequestBuilder, auto: AutoSharing, lane: Lane) -> None:
        self._config = config
        self._builder = builder
        self._auto = auto
        self._lane = lane
        self._guardrail = Guardrail(config.window_positions, config.min_positions)
        self.num_probes = 0
        self.num_dropped = 0

    def note_served(self, turn: Turn) -> None:
        """A client's turn has ended, whose tokens were sent; perhaps it is probed."""
        adapter, request = turn.adapter, turn.request
        if adapter is None or turn.needs is None or adapter.info.invocation_tokens or turn.num_generated < 1:
            return
        if request.sharing is _reference(adapter.info):
            return
        if not is_chosen(request.request_id, max(self._config.share, self._config.named_share)):
            return
        chosen_by_auto = self._auto.is_chosen(adapter.info.digest, request.sharing)
        share = self._config.share if chosen_by_auto else self._config.named_share
        if not is_chosen(request.request_id, share):
            return
        # The last token's successor is sampled, too: where the model's length leaves no room for it, one token goes.
        tokens = turn.tokens[: min(turn.num_tokens, self._builder.model.max_model_len - 1)].copy()
        if len(tokens) <= request.num_prompt_tokens:
            return
        if self._lane.num_waiting >= self._config.max_pending:
            self._lane.drop_oldest()
            self.num_dropped += 1
        self._lane.start(_OWNER, self._rounds(request, adapter.info, tokens))

    def make_way(self) -> None:
        """A client waits: what runs is dropped."""
        self.num_dropped += self._lane.cancel()

    def forget(self, info: AdapterInfo) -> None:
        """The content is unloaded under every name."""
        self._guardrail.forget(info.digest)

    def drift(self, names: dict[str, str]) -> tuple[AdapterDrift, ...]:
        """What the windows hold; ``names`` by digest."""
        return tuple(_described(names.get(key.adapter, key.adapter), key, w) for key, w in self._guardrail.windows())

    def _rounds(self, request: GenerateRequest, info: AdapterInfo, tokens: TokenArray) -> Rounds:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=NUM_TOP, ignore_eos=True)
        replays = [
            replace(
                self._builder.replayed(request, tokens, sharing, sampling, Envelope(new_id("probe"), INTERNAL_TENANT)),
                is_private=True,
                scored_from=request.num_prompt_tokens,
            )
            for sharing in (_reference(info), request.sharing)
        ]
        reference, served = yield replays
        failed = reference.error or served.error
        if failed is not None or reference.scores is None or served.scores is None:
            self.num_dropped += 1
            logger.info("a shadow probe of adapter %s was dropped: %s", info.name, failed)
            return
        self.num_probes += 1
        self._note(info, request.sharing, compare(reference.scores, served.scores))

    def _note(self, info: AdapterInfo, sharing: Sharing, found: TextAgreement) -> None:
        key = DriftKey(info.digest, sharing)
        window = self._guardrail.note(key, found)
        demoted = self._auto.demote(
            info.digest, sharing, window.total, lambda bound: self._guardrail.is_beyond(key, bound)
        )  # fmt: skip
        for verdict in demoted:
            logger.warning("adapter %s falls back to %s: %s", info.name, verdict.sharing, verdict.reason)


def _reference(info: AdapterInfo) -> Sharing:
    return info.trained_for or Sharing.ISOLATED


def _described(name: str, key: DriftKey, window: DriftWindow) -> AdapterDrift:
    return AdapterDrift(
        adapter=name,
        digest=key.adapter,
        sharing=key.sharing,
        num_probes=window.num_probes,
        num_diverged=window.num_diverged,
        agreement=window.total,
        first_divergence=window.first_divergence,
    )

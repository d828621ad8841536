"""``core.request_builder`` with what only a gateway has: the salt of page identity, and defaults for what a client left out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from forkkv_cluster.core import request_builder
from forkkv_cluster.core.config import DefaultsConfig
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, GenerateRequest, ModelInfo, SamplingParams
from forkkv_cluster.core.request_builder import NO_MODES, Envelope, Modes, PromptSharing, served_choice
from forkkv_cluster.gateway.commands import SamplingChoice, StatelessTarget
from forkkv_cluster.gateway.identity import page_namespace

__all__ = ["Envelope", "RequestBuilder"]


class RequestBuilder(request_builder.RequestBuilder):
    """Knows the model, the block size, the server's salt and the defaults; keeps no state."""

    def __init__(self, model: ModelInfo, *, block_size: int, salt: str, defaults: DefaultsConfig) -> None:
        super().__init__(model, block_size=block_size, namespace_of=partial(page_namespace, salt))
        self._defaults = defaults

    def stateless(
        self,
        tokens: TokenArray,
        adapter: AdapterRef | None,
        target: StatelessTarget,
        sampling: SamplingParams,
        envelope: Envelope,
        modes: Modes = NO_MODES,
    ) -> GenerateRequest:
        """A request of its own, [n] int32; ``auto`` as ``modes`` say. Raises InvalidArgument for a fork point that makes no
        sense."""
        choice = PromptSharing(target.sharing, target.shared_prefix_tokens, target.sharing_group)
        return self.prompt(tokens, adapter, served_choice(choice, adapter, modes, len(tokens)), sampling, envelope)

    def sampling(self, choice: SamplingChoice, num_prompt_tokens: int, drawn_seed: int) -> SamplingParams:
        """The client's choice with the server's defaults filled in; raises InvalidArgument when it does not fit the model."""
        max_tokens = self.max_tokens(choice.max_tokens, num_prompt_tokens, self._defaults.max_tokens)
        params = replace(choice.params, seed=choice.seed if choice.seed is not None else drawn_seed, max_tokens=max_tokens)
        params.validate(self.model.vocab_size)
        return params

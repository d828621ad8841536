"""From frozen requests to decode state: checks that name the field, adapters claimed, context needs stated."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import DeadlineExceeded, InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.request import AdapterRef, ContextRequest, GenerateRequest, ModelInfo, Sharing
from forkkv_cluster.engine.adapter_registry import AdapterRegistry
from forkkv_cluster.engine.adapter_tiers import LoadedAdapter
from forkkv_cluster.engine.sequence import BACKGROUND, ContextNeeds, Demand, ResidualTarget, Turn, token_buffer

_SHARED = (Sharing.RESIDUAL, Sharing.EAGER, Sharing.BASE)


class Admission:
    """Builds ``Turn`` and ``Demand``; on an error nothing is held."""

    def __init__(self, model: ModelInfo, geometry: KVGeometry, kv_bytes: int, adapters: AdapterRegistry, clock: Clock) -> None:
        self._model = model
        self._geometry = geometry
        self._kv_bytes = kv_bytes
        self._adapters = adapters
        self._clock = clock
        self._arrivals = count()

    def turn(self, request: GenerateRequest) -> Turn:
        """Raises InvalidArgument, Unsupported, NotFound (adapter) or DeadlineExceeded."""
        self._check_common(request)
        request = replace(request, prefix=replace(request.prefix, owner=request.tenant))
        request.sampling.validate(self._model.vocab_size)
        _check_turn(request)
        total = request.num_prompt_tokens + request.sampling.max_tokens
        self._check_length(request, total)
        held = _Held(self._adapters)
        try:
            adapter = held.acquire(request.adapter)
            _check_invocation(request, adapter)
            is_shared = adapter is not None and request.sharing in _SHARED and request.context_len > 0
            needs = self._turn_needs(request, adapter, held) if is_shared and adapter is not None else None
            self._check_memory(total, needs)
        except BaseException:
            held.release()
            raise
        residual = next((t.key for t in needs.required if t.adapter is adapter), None) if needs is not None else None
        order = (BACKGROUND if request.is_background else int(request.priority), next(self._arrivals))
        turn = Turn(request, order, adapter, residual, held.all(), needs, token_buffer(request), request.num_tokens)
        # A resumed turn's prompt was scored before its first token came.
        first_scored = max((needs.context_len if needs is not None else 0) + 1, request.scored_from)
        if request.sampling.prompt_logprobs is not None and not request.num_resumed and first_scored < request.num_tokens:
            turn.next_scored = first_scored
        return turn

    def demand(self, request: ContextRequest) -> Demand:
        """Raises InvalidArgument, Unsupported, NotFound (adapter) or DeadlineExceeded."""
        self._check_common(request)
        if request.sharing not in _SHARED:
            raise InvalidArgument("sharing", str(request.sharing), "shares no context", "Use eager, residual or base.")
        self._check_length(request, request.num_tokens)
        held = _Held(self._adapters)
        try:
            required: tuple[ResidualTarget, ...] = ()
            if request.sharing is Sharing.EAGER:
                required = self._targets(request.declared, held)
            key = replace(request.prefix, owner=request.tenant)
            needs = ContextNeeds(key, request.tokens, request.num_tokens, required)
            self._check_memory(request.num_tokens, needs)
        except BaseException:
            held.release()
            raise
        return Demand(request, (int(request.priority), next(self._arrivals)), held.all(), needs)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_common(self, request: GenerateRequest | ContextRequest) -> None:
        if request.deadline_s is not None and request.deadline_s <= self._clock.wall():
            raise DeadlineExceeded(f"request {request.request_id} arrived after its deadline. Allow more time.")
        if request.num_tokens == 0:
            raise InvalidArgument("tokens", [], "is empty", "Send at least one token.")
        if request.prefix.block_size != self._geometry.page_size:
            raise InvalidArgument(
                "block_size",
                request.prefix.block_size,
                f"is not the worker's page size {self._geometry.page_size}",
                "Use one page_size in the whole cluster.",
            )
        low, high = int(request.tokens.min()), int(request.tokens.max())
        if low < 0 or high >= self._model.vocab_size:
            raise InvalidArgument(
                "tokens",
                low if low < 0 else high,
                f"is outside the vocabulary of {self._model.vocab_size} tokens",
                "Tokenise with this model's tokenizer.",
            )

    def _check_length(self, request: GenerateRequest | ContextRequest, total: int) -> None:
        if total > self._model.max_model_len:
            raise InvalidArgument(
                "tokens",
                total,
                f"prompt and max_tokens exceed the model's {self._model.max_model_len} tokens",
                "Shorten the prompt or lower max_tokens.",
            )

    def _check_memory(self, num_tokens: int, needs: ContextNeeds | None) -> None:
        """Even an empty pool must hold the whole sequence, else it would wait for ever; and before it, where a first writer
        writes the context, that with the writer's residual."""
        wanted = self._kv_needed(num_tokens, needs.context_len, needs.required) if needs else self._kv_needed(num_tokens, 0, ())
        if needs is not None and needs.writer is not None:
            wanted = max(wanted, self._kv_needed(needs.context_len, needs.context_len, (needs.writer,)))
        total = self._geometry.num_slabs(self._kv_bytes) * self._geometry.slab_bytes
        if wanted > total:
            raise InvalidArgument(
                "tokens",
                num_tokens,
                f"needs {wanted} bytes of KV, the worker has {total}",
                "Shorten the prompt, lower max_tokens, or give the worker more kv_bytes.",
            )

    def _kv_needed(self, num_tokens: int, context_len: int, residuals: tuple[ResidualTarget, ...]) -> int:
        """Bytes of base KV of ``num_tokens`` and of the residuals of the context."""
        size = self._geometry.page_size
        context_pages = -(-context_len // size)
        base = (-(-num_tokens // size) + 1) * self._geometry.page_bytes(None)
        # Slabs of each rank class are filled separately: one may be left open per class.
        open_slabs = len({t.key.rank_class for t in residuals}) * self._geometry.slab_bytes
        return base + open_slabs + sum(context_pages * self._geometry.page_bytes(t.key.rank_class) for t in residuals)

    # --- context ----------------------------------------------------------------------------------------------------

    def _turn_needs(self, request: GenerateRequest, adapter: LoadedAdapter, held: _Held) -> ContextNeeds:
        own = self._target(adapter, request.sharing) if request.sharing is not Sharing.BASE else None
        required = (own,) if own is not None else ()
        optional: tuple[ResidualTarget, ...] = ()
        if request.sharing is Sharing.EAGER:
            optional = self._targets(request.declared, held, is_optional=True)
        writer = held.acquire(request.writer)
        is_own_pass = request.sharing is Sharing.RESIDUAL and own is not None
        return ContextNeeds(
            request.prefix,
            request.tokens,
            request.context_len,
            required,
            optional,
            own=adapter if is_own_pass else None,
            writer=self._target(writer, Sharing.RESIDUAL) if writer is not None else None,
            writer_adapter=writer,
        )

    def _targets(self, refs: tuple[AdapterRef, ...], held: _Held, *, is_optional: bool = False) -> tuple[ResidualTarget, ...]:
        """Residuals of the declared adapters; one that has been unloaded since concerns nobody but its own branches.

        Nor does one that can have no residual, where they are optional; else raises Unsupported.
        """
        adapters = [adapter for ref in refs if (adapter := held.acquire_if_loaded(ref)) is not None]
        if is_optional:
            adapters = [adapter for adapter in adapters if self._has_rank_class(adapter)]
        targets = (self._target(adapter, Sharing.EAGER) for adapter in adapters)
        return tuple(t for t in targets if t is not None)

    def _has_rank_class(self, adapter: LoadedAdapter) -> bool:
        """Whether some residual page is wide enough; without one nothing but own tokens can be served."""
        return adapter.residual_rank <= self._geometry.rank_classes[-1]

    def _check_residual(self, adapter: LoadedAdapter, sharing: Sharing) -> None:
        if not self._has_rank_class(adapter):
            raise Unsupported(
                "sharing",
                str(sharing),
                f"with adapter {adapter.info.name} needs {adapter.residual_rank} columns of residual (rank on k and v, and one "
                f"for each kv head on a model with QK-norm), and the widest page has {self._geometry.rank_classes[-1]}",
                "Use isolated or base, or an adapter of a smaller rank.",
            )

    def _target(self, adapter: LoadedAdapter, sharing: Sharing) -> ResidualTarget | None:
        """How the adapter's residual is keyed; None without LoRA on k and v: its residual match is the base's."""
        if adapter.residual_rank == 0:
            return None
        self._check_residual(adapter, sharing)
        rank_class = self._geometry.rank_class(adapter.residual_rank)
        return ResidualTarget(ResidualKey(adapter.info.digest, str(sharing), rank_class), adapter)


class _Held:
    """Adapters that one request uses, each acquired once and released together."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._adapters: dict[str, LoadedAdapter] = {}

    def acquire(self, ref: AdapterRef | None) -> LoadedAdapter | None:
        if ref is None:
            return None
        if ref.digest not in self._adapters:
            self._adapters[ref.digest] = self._registry.acquire(ref)
        return self._adapters[ref.digest]

    def acquire_if_loaded(self, ref: AdapterRef) -> LoadedAdapter | None:
        try:
            return self.acquire(ref)
        except NotFound:
            return None

    def all(self) -> tuple[LoadedAdapter, ...]:
        return tuple(self._adapters.values())

    def release(self) -> None:
        for adapter in self._adapters.values():
            self._registry.release(adapter)


def _check_invocation(request: GenerateRequest, adapter: LoadedAdapter | None) -> None:
    """The worker knows by the weights what the request says by its spans: an aLoRA never runs before its invocation."""
    start = request.invocation_start
    is_alora = adapter is not None and bool(adapter.info.invocation_tokens)
    if is_alora == (start is None) or (start is not None and not request.context_len <= start < request.num_prompt_tokens):
        raise InvalidArgument(
            "invocation_start",
            start,
            f"does not fit adapter {request.adapter.name if request.adapter is not None else None!r} and its prompt",
            "An aLoRA, and nothing else, starts at its invocation, which is after the shared context.",
        )


def _check_turn(request: GenerateRequest) -> None:
    if request.sharing is Sharing.AUTO:
        raise Unsupported(
            "sharing", "auto", "is to be resolved before a request is made", "Use isolated, residual, eager or base."
        )
    if not 0 <= request.context_len <= request.num_prompt_tokens:
        raise InvalidArgument(
            "context_len",
            request.context_len,
            f"is not from 0 to the prompt's {request.num_prompt_tokens} tokens",
            "Fork inside the prompt.",
        )
    shares = request.adapter is not None and request.sharing in _SHARED
    if shares and request.context_len == request.num_tokens:
        raise InvalidArgument("append", [], "is empty on a branch without tokens of its own", "Append at least one token.")
    if request.writer is not None and request.sharing is not Sharing.RESIDUAL:
        raise InvalidArgument(
            "writer", "first", f"goes with sharing residual, not {request.sharing}", "Use the canonical writer."
        )
    if request.num_resumed >= request.sampling.max_tokens:
        raise InvalidArgument(
            "num_resumed",
            request.num_resumed,
            f"leaves nothing of max_tokens {request.sampling.max_tokens}",
            "The request has ended already.",
        )

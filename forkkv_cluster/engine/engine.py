"""One accelerator, one process: requests in, ``StepOutput``s out.

A step: expire and cancel, schedule, build the batch, run it, sample, commit. Everything happens on the caller's thread.
Requests of its own (``own_work``: calibrations, shadow probes) run beside its clients', behind them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.cache.swaps import NO_SWAPS, SwapPlan
from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.config import AdapterMemoryConfig, ClusterConfig, SchedulerConfig
from forkkv_cluster.core.errors import AlreadyExists, Cancelled, DeadlineExceeded, ForkKVError, Internal, ResourceExhausted
from forkkv_cluster.core.events import AdapterLoaded, CacheEvent
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.core.request import (
    AdapterInfo,
    AdapterRef,
    ContextRequest,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    PromptLogprobs,
    Sharing,
    TokenChunk,
)
from forkkv_cluster.core.status import EngineStatus, Holding
from forkkv_cluster.engine.adapter_loader import AdapterLoader, ThreadLoader
from forkkv_cluster.engine.adapter_registry import AdapterRegistry
from forkkv_cluster.engine.adapter_tiers import AdapterTiers
from forkkv_cluster.engine.admission import Admission
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.batch_builder import build_batch, in_row_order
from forkkv_cluster.engine.counts import EngineCounts
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.outputs import Failure, StepOutput
from forkkv_cluster.engine.own_work import Fidelity, OwnWork
from forkkv_cluster.engine.prompt_scores import prompt_logprobs
from forkkv_cluster.engine.runner import Runner, SampledToken, StepResult
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.engine.scheduler import Scheduler
from forkkv_cluster.engine.sequence import ContextPass, Demand, Scheduled, Turn, Waiting, is_background

MIN_MERGED_STEPS = 4
"""Steps that a turn must have ahead of it to make whole K for: building it has to pay off. An estimate, not swept."""

LOAD_WAIT_S = 0.005
"""The longest that a step without work waits for weights from disk, before whoever drives the engine may speak again."""


class Engine:
    """Continuous batching over one model and many adapters, with shared and residual KV.

    Not thread-safe: all methods belong to one thread. Every request that ``add_request`` accepts ends in exactly one
    terminal result: a chunk with a finish_reason, or a Failure.
    """

    def __init__(
        self,
        runner: Runner,
        kv_bytes: int,
        scheduler: SchedulerConfig,
        clock: Clock | None = None,
        *,
        host_bytes: int = 0,
        merged_share: float = 0.5,
        adapter_memory: AdapterMemoryConfig | None = None,
        adapter_loader: AdapterLoader | None = None,
        fidelity: Fidelity | None = None,
    ) -> None:
        """``host_bytes``: budget of the KV's host tier, 0 for none. ``merged_share``: of kv_bytes, at most, that whole K of
        adapters may borrow while it is free. ``adapter_loader`` None: a thread that reads what ``runner`` can read.
        ``fidelity``: how ``auto`` is measured and watched; None: as configured by default, on generated contexts."""
        self._runner = runner
        self._clock = clock or SystemClock()
        runner.allocate(kv_bytes, host_bytes)
        self._kv = KVCacheManager(runner.geometry, kv_bytes, host_bytes, merged_share)
        loader = adapter_loader or ThreadLoader(runner.read_adapter)
        self._tiers = AdapterTiers(runner, adapter_memory or AdapterMemoryConfig(), loader)
        self._adapters = AdapterRegistry(self._tiers)
        self._scheduler = Scheduler(scheduler, self._kv, self._tiers, self._clock)
        self._admission = Admission(runner.info, runner.geometry, kv_bytes, self._adapters, self._clock)
        self._live: dict[RequestId, Waiting] = {}
        self._aborted: list[RequestId] = []
        self._counts = EngineCounts()
        self._guard = OwnWork(fidelity or Fidelity(), runner, self._clock, self.add_request, self.abort)

    @classmethod
    def from_config(cls, config: ClusterConfig, clock: Clock | None = None) -> Self:
        """Load the configured model and adapters. Raises InvalidArgument or Unsupported that names the bad field."""
        import torch  # Here: an engine over a fake runner needs no torch.

        from forkkv_cluster.engine.make_runner import make_runner

        torch.set_num_threads(config.worker.num_threads)
        runner = make_runner(config)
        engine = cls(
            runner,
            config.cache.kv_bytes,
            config.scheduler,
            clock,
            host_bytes=config.cache.host_bytes,
            merged_share=config.cache.merged_share if runner.uses_whole_keys else 0.0,
            adapter_memory=config.adapter_memory,
            fidelity=Fidelity.from_config(config, runner.info),
        )
        for adapter in config.adapters:
            engine.load_adapter(adapter.name, adapter.path, adapter.sharing)
        return engine

    # --- requests ---------------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        return self._runner.info

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        return self._scheduler.has_work or bool(self._aborted) or self._tiers.has_events or self._guard.has_work

    def add_request(self, request: GenerateRequest | ContextRequest) -> None:
        """Queue a request. Raises InvalidArgument, Unsupported, NotFound, AlreadyExists, ResourceExhausted or
        DeadlineExceeded; then nothing is held."""
        if request.request_id in self._live:
            raise AlreadyExists("request", request.request_id, "Choose a fresh request id.")
        if isinstance(request, GenerateRequest) and request.sampling.guide is not None:
            self._runner.check_guide(request.sampling.guide)
        entry: Waiting
        entry = self._admission.turn(request) if isinstance(request, GenerateRequest) else self._admission.demand(request)
        try:
            self._scheduler.add(entry)
        except ForkKVError:
            self._release_adapters(entry)
            raise
        self._live[request.request_id] = entry

    def abort(self, request_id: RequestId) -> None:
        """Cancel a request; its Failure comes with the next step. Unknown or ended ones are ignored."""
        if request_id in self._live:
            self._aborted.append(request_id)

    def step(self) -> StepOutput:
        """One step of everything that can run. With nothing to run but weights on their way, waits ``LOAD_WAIT_S`` at most."""
        self._guard.submit(is_idle=not self._scheduler.has_waiting_clients)
        failures = [*self._cancel(), *self._expire(), *self._settle_loads()]
        self._kv.expire_hints(self._clock.monotonic())
        plan = self._scheduler.schedule()
        chunks = [self._end_demand(demand) for demand in plan.completed]
        for entry in plan.starved:
            error = ResourceExhausted(
                f"the shared context of request {entry.request_id} is evicted faster than it can be written. "
                "Give the worker more kv_bytes, or run fewer sessions.",
                retry_after_s=1.0,
            )
            failures.append(self._fail(entry, error))
        if plan.work:
            chunks += self._run(in_row_order(plan.work), failures)
        elif self._tiers.is_loading and not (chunks or failures):
            self._tiers.wait(LOAD_WAIT_S)
        chunks, failures = self._guard.take(chunks, failures, is_crowded=self._scheduler.has_waiting_clients)
        return StepOutput(tuple(chunks), tuple(failures), self._take_events())

    def _run(self, work: list[Scheduled], failures: list[Failure]) -> list[TokenChunk]:
        self._use_merged_keys(work)
        swaps = self._kv.take_swaps()
        batch = build_batch(work, self._runner.geometry.page_size, swaps)
        ready = [s.item for s in work if isinstance(s.item, Turn) and s.end == s.item.num_tokens]
        sampling = [
            SamplingRow(t.request.sampling, t.num_tokens, t.tokens, t.request.num_prompt_tokens, t.request_id) for t in ready
        ]
        if swaps is not NO_SWAPS:
            self._swap(batch, swaps)
        result = self._run_batch(batch, work, sampling)
        sampled, prompts = iter(result.tokens), prompt_logprobs(work, result.scores)
        if ready:  # Without a logit row, the last layer stops short of its attention.
            self._kv.note_merged_keys_written()
        self._counts.num_steps += 1
        self._counts.cow_copies += len(batch.tail_copies)
        chunks = []
        for scheduled in work:
            if isinstance(scheduled.item, ContextPass):
                self._commit_pass(scheduled.item, scheduled)
                continue
            part = prompts.get(scheduled.item.request_id)
            outcome = self._commit_turn(scheduled.item, scheduled, sampled, part)
            if part is not None and not isinstance(outcome, Failure):
                chunks.append(TokenChunk(scheduled.item.request_id, prompt_logprobs=part))
            if isinstance(outcome, Failure):
                failures.append(outcome)
            elif outcome is not None:
                chunks.append(outcome)
        return chunks

    def _use_merged_keys(self, work: list[Scheduled]) -> None:
        """Whole K for the turns whose adapter changes K of shared context, as far as memory is to spare."""
        self._kv.start_merged_step()
        for scheduled in work:
            turn = scheduled.item
            if not isinstance(turn, Turn) or turn.lease is None or turn.adapter is None:
                continue
            if "k_proj" in turn.adapter.info.target_modules:
                self._kv.use_merged_keys(turn.lease, turn.num_left >= MIN_MERGED_STEPS)

    def _swap(self, batch: Batch, swaps: SwapPlan) -> None:
        started_s = self._clock.monotonic()
        self._runner.swap(batch)
        estimate = self._kv.swap_estimate
        if estimate is not None:
            elapsed_s = self._clock.monotonic() - started_s
            estimate.copied_bytes.note(swaps.num_bytes(self._runner.geometry), elapsed_s)

    def _run_batch(self, batch: Batch, work: Sequence[Scheduled], sampling: Sequence[SamplingRow]) -> StepResult:
        """The forward pass; the time of one that is mostly prefill is what swapping is weighed against."""
        started_s = self._clock.monotonic()
        result = self._runner.run(batch, sampling)
        estimate = self._kv.swap_estimate
        num_prefill = sum(s.num_rows for s in work if s.num_rows > 1)
        if estimate is not None and 2 * num_prefill >= batch.num_rows:
            estimate.prefilled_tokens.note(batch.num_rows, self._clock.monotonic() - started_s)
        return result

    # --- commit -----------------------------------------------------------------------------------------------------

    def _commit_pass(self, item: ContextPass, scheduled: Scheduled) -> None:
        item.num_computed = scheduled.end
        if item.is_charged:
            item.owner.usage = item.owner.usage.plus_run(scheduled.num_rows)
        self._counts.prefill_tokens_run += scheduled.num_rows
        self._kv.commit_context(item.lease, scheduled.end)
        if scheduled.end == item.num_tokens:
            self._scheduler.finish(item)

    def _commit_turn(
        self, turn: Turn, scheduled: Scheduled, sampled: Iterator[SampledToken | None], prompt: PromptLogprobs | None
    ) -> TokenChunk | Failure | None:
        num_prompt = max(0, min(scheduled.end, turn.request.num_prompt_tokens) - scheduled.start)
        turn.usage = turn.usage.plus_run(num_prompt)
        self._counts.prefill_tokens_run += num_prompt
        is_prefilled = scheduled.end == turn.num_tokens
        token = next(sampled) if is_prefilled else None
        if (is_prefilled and token is None) or (prompt is not None and not prompt.is_finite):
            return self._fail_overflow(turn)
        turn.num_computed = scheduled.end
        if prompt is not None:
            turn.next_scored = prompt.end if prompt.end < turn.request.num_prompt_tokens else None
        if turn.lease is not None:
            self._kv.commit(turn.lease, scheduled.end)
        return self._append(turn, token) if token is not None else None

    def _fail_overflow(self, turn: Turn) -> Failure:
        """No token, as logits are no numbers or a guide gave up, ends its own request alone; its new pages are not filed."""
        name = turn.request.adapter.name if turn.request.adapter is not None else self._runner.info.name
        self._scheduler.finish(turn)
        error = Internal(
            f"no token could be sampled: the logits of {name!r} are not finite numbers, or the guide is too complex. "
            "Check the weights, run in float32, or simplify the guide."
        )
        return self._fail(turn, error)

    def _append(self, turn: Turn, sampled: SampledToken) -> TokenChunk:
        turn.append(sampled.token_id)
        self._counts.output_tokens += not is_background(turn)
        reason, matched = self._finish_reason(turn, sampled.token_id)
        usage = turn.usage if reason is not None or not turn.is_usage_sent else None
        turn.is_usage_sent = True
        if reason is not None:
            self._scheduler.finish(turn)
            self._end(turn)
            self._guard.note_served(turn)
        return TokenChunk(
            turn.request_id,
            (sampled.token_id,),
            (sampled.logprob,) if sampled.logprob is not None else (),
            reason,
            matched,
            usage,
        )

    def _finish_reason(self, turn: Turn, token_id: int) -> tuple[FinishReason | None, int | None]:
        sampling = turn.request.sampling
        is_eos = token_id in self._runner.info.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return FinishReason.STOP, token_id
        if turn.num_generated >= sampling.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    # --- ends -------------------------------------------------------------------------------------------------------

    def _end(self, entry: Waiting) -> None:
        del self._live[entry.request_id]
        self._release_adapters(entry)
        if is_background(entry):
            return
        self._counts.num_finished += 1
        self._counts.base_hit_tokens += entry.usage.base_hit_tokens
        self._counts.residual_hit_tokens += entry.usage.residual_hit_tokens
        self._counts.useful_hit_tokens += entry.usage.useful_hit_tokens

    def _end_demand(self, demand: Demand) -> TokenChunk:
        self._end(demand)
        request, needs = demand.request, demand.needs
        if request.keep_s > 0:
            name, expires_s = request.session_id or request.request_id, self._clock.monotonic() + request.keep_s
            residuals = [target.key for target in needs.required]
            self._kv.keep_context(name, needs.key, needs.tokens, needs.context_len, residuals, expires_s)
        return TokenChunk(demand.request_id, finish_reason=FinishReason.STOP, usage=demand.usage)

    def _fail(self, entry: Waiting, error: ForkKVError) -> Failure:
        del self._live[entry.request_id]
        self._release_adapters(entry)
        self._counts.num_failed += not is_background(entry)
        return Failure(entry.request_id, error)

    def _cancel(self) -> list[Failure]:
        aborted, self._aborted = self._aborted, []
        entries = [self._live[request_id] for request_id in dict.fromkeys(aborted) if request_id in self._live]
        for entry in entries:  # A stop string, of which the engine knows nothing, ends a turn like this.
            if isinstance(entry, Turn):
                self._guard.note_served(entry)
        return [self._take_out(entry, Cancelled(f"request {entry.request_id} was cancelled.")) for entry in entries]

    def _expire(self) -> list[Failure]:
        now = self._clock.wall()
        late = [e for e in self._live.values() if e.request.deadline_s is not None and e.request.deadline_s <= now]
        return [
            self._take_out(entry, DeadlineExceeded(f"request {entry.request_id} ran past its deadline. Allow more time."))
            for entry in late
        ]

    def _take_out(self, entry: Waiting, error: ForkKVError) -> Failure:
        self._scheduler.remove(entry.request_id)
        return self._fail(entry, error)

    def _settle_loads(self) -> list[Failure]:
        """Weights that have been read go to their slots; requests whose adapter could not be read end."""
        return [
            self._fail(entry, error)
            for adapter, error in self._tiers.settle()
            for entry in self._scheduler.fail_load(adapter)
        ]  # fmt: skip

    def _release_adapters(self, entry: Waiting) -> None:
        for adapter in entry.held:
            self._adapters.release(adapter)

    # --- adapters ---------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        """Load a PEFT directory under a name, on this thread. Raises InvalidArgument, Unsupported or AlreadyExists.

        While requests run: ``read_adapter`` on another thread, then ``register_adapter``.
        """
        return self.register_adapter(name, self.read_adapter(name, path, sharing), sharing)

    def read_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> Weights:
        """Read and check a PEFT directory, and the samples to measure it on where ``sharing`` asks for that; changes nothing,
        safe on any thread. Raises InvalidArgument or Unsupported."""
        weights = self._runner.read_adapter(name, path)
        self._guard.prepare(path, sharing)
        return weights

    def register_adapter(self, name: str, weights: Weights, sharing: Sharing | None = None) -> AdapterInfo:
        """Serve an adapter that has been read. ``sharing``: how requests with ``auto`` are served on it; ``auto`` measures it
        beside requests (``AdapterInfo.verdict``), None is what the name has already, else the configured default.

        Raises AlreadyExists when the name stands for other content, Unsupported for a sharing that cannot serve it and
        InvalidArgument for sample contexts that cannot be used; then nothing has changed.
        """
        samples = self._guard.check(weights, sharing)
        info = self._adapters.register(name, weights)
        self._guard.register(info, weights, sharing, samples)
        return self._guard.described(info)

    def unload_adapter(self, name: str) -> None:
        """Forget the name; requests under way finish with it, whose files must stay until then. Raises NotFound."""
        self._adapters.unload(name)
        self._guard.unregister(name)

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """By name, each with how ``auto`` is served on it."""
        return tuple(self._guard.described(info) for info in self._adapters.infos())

    def served_sharing(self, adapter: AdapterRef) -> Sharing:
        """What ``auto`` comes to on that adapter now; ``isolated`` for one that is not loaded."""
        return self._guard.served(adapter)

    # --- facts ------------------------------------------------------------------------------------------------------

    def _take_events(self) -> tuple[CacheEvent, ...]:
        return (*self._tiers.take_events(), *self._kv.take_events())

    def snapshot_events(self) -> tuple[CacheEvent, ...]:
        """The whole cache as events, for a directory that lost track."""
        return (*(AdapterLoaded(digest) for digest in self._tiers.digests_on_device()), *self._kv.snapshot_events())

    def load(self) -> WorkerLoad:
        """Load for the router, in blocks of page_size tokens. The engine's own work delays no request, and does not count."""
        size = self._runner.geometry.page_size
        waiting = sum(entry.request.num_tokens for entry in self._scheduler.waiting if not is_background(entry))
        running = [item for item in self._scheduler.running if not is_background(item)]
        queued = waiting + sum(item.num_tokens - item.num_computed for item in running)
        attended = sum(item.num_computed for item in running if isinstance(item, Turn))
        return WorkerLoad(
            queued_prefill_blocks=queued / size,
            decode_blocks=attended / size,
            num_active=sum(1 for entry in self._live.values() if not is_background(entry)),
            free_bytes=self._kv.free_bytes,
            total_bytes=self._kv.total_bytes,
        )

    def release_hint(self, session_id: str) -> None:
        """Evict the session's context like any other from now on. Unknown sessions are ignored."""
        self._kv.release_hint(session_id)

    def status(self) -> EngineStatus:
        """What is held now and what has happened so far."""
        self._kv.expire_hints(self._clock.monotonic())
        pools, host = self._kv.pools(), self._kv.host
        return EngineStatus(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_pinned_pages=sum(pool.num_pinned for pool in pools),
            kv_bytes_total=self._kv.total_bytes,
            base_bytes_held=self._kv.base_bytes_held,
            residual_bytes_held=self._kv.residual_bytes_held,
            pools=pools,
            counters=self._counts.freeze(self._kv, self._scheduler.num_preemptions, self._guard.auto, self._guard.probe),
            adapters=self.list_adapters(),
            drift=self._guard.drift(),
            adapter_memory=self._tiers.status(),
            host_bytes_total=host.total_bytes if host is not None else 0,
            host_bytes_held=host.bytes_held if host is not None else 0,
            sharing_saved_bytes=self._kv.holdings.shared_savings,
            holdings=self._holdings(),
            merged_bytes_held=self._kv.merged_bytes_held,
        )

    def _holdings(self) -> tuple[Holding, ...]:
        """Largest first of each kind. An adapter that was unloaded while its pages are still there goes by its digest."""
        names = {str(info.digest): info.name for info in self._adapters.infos()}
        by_kind = {
            "tenant": self._kv.bytes_by_owner(),
            "adapter": {names.get(digest, digest): n for digest, n in self._kv.holdings.by_adapter.items()},
            "session": self._kv.kept_bytes(),
        }
        return tuple(
            Holding(kind, name, num_bytes)
            for kind, held in by_kind.items()
            for name, num_bytes in sorted(held.items(), key=lambda item: (-item[1], item[0]))
        )

    def check_invariants(self) -> None:
        """Raise Internal if the bookkeeping of KV memory or of adapters contradicts itself."""
        self._kv.check_invariants()
        self._tiers.check_invariants(self._scheduler.claims)

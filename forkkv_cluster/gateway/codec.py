"""Protobuf on one side, ``core`` on the other: the one file of the gateway that knows both."""

from __future__ import annotations

from typing import Any, cast

from google.protobuf.message import Message

from forkkv_cluster.api.v1 import adapters_pb2, cluster_pb2, common_pb2, sessions_pb2
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument
from forkkv_cluster.core.request import (
    AdapterInfo,
    FinishReason,
    Guide,
    GuideKind,
    ModelInfo,
    PrefixUsage,
    Priority,
    SamplingParams,
    Sharing,
    TokenLogprob,
)
from forkkv_cluster.core.session import Branch, BranchSpec, JoinWhat, Session
from forkkv_cluster.core.status import (
    AdapterDrift,
    AdapterMemoryStatus,
    ClusterStatus,
    DirectoryStatus,
    EngineCounters,
    WorkerStatus,
)
from forkkv_cluster.core.verdict import SharingVerdict
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    CreateSessionCommand,
    GenerateCommand,
    SamplingChoice,
    StatelessTarget,
    TextOrTokens,
    TurnDelta,
    TurnEvent,
    TurnFinished,
    TurnPromptLogprobs,
    TurnStarted,
)

# Requests


def read_sharing(value: int, field: str = "sharing") -> Sharing | None:
    """None for SHARING_UNSPECIFIED. Raises InvalidArgument for a number that the enum does not have."""
    name = _enum_name(common_pb2.Sharing, value, field)
    return None if name == "SHARING_UNSPECIFIED" else Sharing[name.removeprefix("SHARING_")]


def read_priority(value: int) -> Priority:
    name = _enum_name(common_pb2.Priority, value, "priority")
    return Priority.NORMAL if name == "PRIORITY_UNSPECIFIED" else Priority[name.removeprefix("PRIORITY_")]


def read_join_what(value: int) -> JoinWhat:
    name = _enum_name(sessions_pb2.JoinWhat, value, "what")
    return JoinWhat.ALL if name == "JOIN_WHAT_UNSPECIFIED" else JoinWhat[name.removeprefix("JOIN_WHAT_")]


def _enum_name(enum: Any, value: int, field: str) -> str:
    try:
        return str(enum.Name(value))
    except ValueError:
        raise InvalidArgument(field, value, "is not a value of the enum", f"Send one of {', '.join(enum.keys())}.") from None


def read_create_session(message: sessions_pb2.CreateSessionRequest) -> CreateSessionCommand:
    return CreateSessionCommand(
        context=_read_input(message, "context"),
        adapters=tuple(message.adapters),
        sharing=read_sharing(message.sharing),
        sharing_group=message.sharing_group,
        tenant=message.tenant,
        keep_s=message.keep_s,
    )


def read_branch_specs(message: sessions_pb2.ForkRequest) -> tuple[BranchSpec, ...]:
    return tuple(
        BranchSpec(spec.name, spec.adapter or None, read_sharing(spec.sharing, "branches.sharing")) for spec in message.branches
    )


def read_generate(message: sessions_pb2.GenerateRequest) -> GenerateCommand:
    if message.num_received_tokens < 0:
        raise InvalidArgument("num_received_tokens", message.num_received_tokens, "must not be negative", "Send 0 or more.")
    return GenerateCommand(
        target=_read_target(message),
        input=_read_input(message, "input"),
        sampling=_read_sampling(message.sampling),
        timeout_s=message.timeout_s if message.timeout_s != 0 else None,
        turn_id=message.turn_id,
        num_received_tokens=message.num_received_tokens,
        priority=read_priority(message.priority),
    )


def _read_target(message: sessions_pb2.GenerateRequest) -> BranchTarget | StatelessTarget:
    kind = message.WhichOneof("target")
    if kind == "branch":
        return BranchTarget(message.branch.session_id, message.branch.branch)
    if kind == "stateless":
        target = message.stateless
        shared = target.shared_prefix_tokens if target.HasField("shared_prefix_tokens") else None
        sharing = read_sharing(target.sharing)
        return StatelessTarget(target.adapter or None, sharing, shared, target.sharing_group, target.tenant)
    raise InvalidArgument("target", None, "is missing", "Set branch or stateless.")


def _read_input(message: Message, oneof: str) -> TextOrTokens:
    kind = message.WhichOneof(oneof)
    if kind == "text":
        return TextOrTokens(text=message.text)  # type: ignore[attr-defined]
    if kind == "token_ids":
        return TextOrTokens(token_ids=list(message.token_ids.ids))  # type: ignore[attr-defined]
    return TextOrTokens(token_ids=[])


def _read_sampling(message: sessions_pb2.SamplingParams) -> SamplingChoice:
    params = SamplingParams(
        temperature=_plain_float(message.temperature),
        top_k=message.top_k,
        top_p=_plain_float(message.top_p) if message.HasField("top_p") else 1.0,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_p=_plain_float(message.min_p),
        presence_penalty=_plain_float(message.presence_penalty),
        frequency_penalty=_plain_float(message.frequency_penalty),
        repetition_penalty=_plain_float(message.repetition_penalty) if message.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple((token, _plain_float(bias)) for token, bias in sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        guide=_read_guide(message),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        include_stop_str_in_output=message.include_stop_str_in_output,
        skip_special_tokens=message.skip_special_tokens if message.HasField("skip_special_tokens") else True,
    )
    return SamplingChoice(
        params,
        seed=message.seed if message.HasField("seed") else None,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
    )


def _read_guide(message: sessions_pb2.SamplingParams) -> Guide | None:
    kind = message.WhichOneof("guide")
    return Guide(GuideKind(kind), getattr(message, kind)) if kind is not None else None


def _plain_float(value: float) -> float:
    """A float32 from the wire as the decimal number that was meant: 0.7, not 0.699999988."""
    return float(f"{value:.7g}")


# Responses


def write_session(session: Session, *, include_tokens: bool = False) -> sessions_pb2.Session:
    message = sessions_pb2.Session(
        session_id=session.session_id,
        tenant=session.tenant,
        sharing_group=session.sharing_group,
        sharing=_write_sharing(session.sharing),
        writer=str(session.writer),
        created_s=session.created_s,
        keep_s=session.keep_s,
        num_context_tokens=len(session.context),
        adapters=[adapter.name for adapter in session.adapters],
        branches=[write_branch(branch, include_tokens=include_tokens) for branch in session.branches.values()],
    )
    if include_tokens:
        message.context.ids.extend(session.context.tolist())
    return message


def write_branch(branch: Branch, *, include_tokens: bool = False) -> sessions_pb2.Branch:
    message = sessions_pb2.Branch(
        name=branch.name,
        adapter=branch.adapter.name if branch.adapter is not None else "",
        sharing=_write_sharing(branch.sharing),
        num_context_tokens=len(branch.context),
        num_own_tokens=len(branch.own),
        num_turns=len(branch.turns),
    )
    if include_tokens:
        message.own.ids.extend(branch.own.tolist())
    return message


def _write_sharing(sharing: Sharing) -> common_pb2.Sharing:
    # The stubs call the result an int; at run time both are.
    return cast(common_pb2.Sharing, common_pb2.Sharing.Value(f"SHARING_{sharing.name}"))


def _write_optional_sharing(sharing: Sharing | None) -> common_pb2.Sharing:
    return _write_sharing(sharing) if sharing is not None else common_pb2.SHARING_UNSPECIFIED


def write_event(event: TurnEvent) -> sessions_pb2.GenerateResponse:
    if isinstance(event, TurnStarted):
        return sessions_pb2.GenerateResponse(
            started=sessions_pb2.TurnStarted(
                request_id=event.request_id,
                num_prompt_tokens=event.num_prompt_tokens,
                seed=event.seed,
                max_tokens=event.max_tokens,
            )
        )
    if isinstance(event, TurnDelta):
        return sessions_pb2.GenerateResponse(delta=_write_delta(event))
    if isinstance(event, TurnPromptLogprobs):
        tokens = [_write_logprob(entry) for entry in event.part.entries()]
        part = sessions_pb2.PromptLogprobs(first_position=event.part.first, tokens=tokens)
        return sessions_pb2.GenerateResponse(prompt_logprobs=part)
    return sessions_pb2.GenerateResponse(finished=_write_finished(event))


def _write_delta(event: TurnDelta) -> sessions_pb2.TokenDelta:
    return sessions_pb2.TokenDelta(
        token_ids=event.token_ids,
        text=event.text,
        logprobs=[_write_logprob(logprob) for logprob in event.logprobs],
        worker_id=event.worker_id,
    )


def _write_logprob(logprob: TokenLogprob) -> sessions_pb2.TokenLogprob:
    top = [sessions_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return sessions_pb2.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top, rank=logprob.rank or 0)


_FINISH_REASONS = {
    None: sessions_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: sessions_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sessions_pb2.FINISH_REASON_LENGTH,
}


def _write_finished(event: TurnFinished) -> sessions_pb2.TurnFinished:
    return sessions_pb2.TurnFinished(
        finish_reason=_FINISH_REASONS[event.finish_reason],
        num_prompt_tokens=event.num_prompt_tokens,
        num_generated_tokens=event.num_generated_tokens,
        usage=_write_usage(event.usage),
        worker_ids=event.worker_ids,
        num_resumes=event.num_resumes,
        ttft_s=event.ttft_s,
        e2e_s=event.e2e_s,
        is_adapter_inactive=event.is_adapter_inactive,
        sharing=_write_optional_sharing(event.sharing),
        mismatched_training=_write_optional_sharing(event.mismatched_training),
    )


def _write_usage(usage: PrefixUsage) -> common_pb2.PrefixUsage:
    return common_pb2.PrefixUsage(
        base_hit_tokens=usage.base_hit_tokens,
        residual_hit_tokens=usage.residual_hit_tokens,
        useful_hit_tokens=usage.useful_hit_tokens,
        prefill_tokens_run=usage.prefill_tokens_run,
    )


def write_error(error: ForkKVError) -> common_pb2.ErrorDetail:
    attributes = {name: str(value) for name, value in error.attributes.items()}
    return common_pb2.ErrorDetail(code=error.code, message=error.message, attributes=attributes)


def write_adapter(info: AdapterInfo) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=info.name,
        digest=info.digest,
        path=info.path,
        lora_rank=info.lora_rank,
        target_modules=info.target_modules,
        residual_bytes_per_token=info.residual_bytes_per_token,
        invocation_tokens=info.invocation_tokens,
        trained_for=_write_optional_sharing(info.trained_for),
        sharing=_write_optional_sharing(info.sharing),
        verdict=_write_verdict(info.verdict) if info.verdict is not None else None,
    )


def _write_verdict(verdict: SharingVerdict) -> adapters_pb2.SharingVerdict:
    return adapters_pb2.SharingVerdict(
        sharing=_write_sharing(verdict.sharing),
        state=str(verdict.state),
        reference=_write_sharing(verdict.reference),
        reason=verdict.reason,
        max_disagreement=verdict.max_disagreement,
        measured=[
            adapters_pb2.PolicyAgreement(sharing=_write_sharing(e.sharing), agreement=_write_agreement(e.agreement))
            for e in verdict.measured
        ],
        samples=verdict.samples,
        decided_s=verdict.decided_s,
    )


def _write_agreement(agreement: Agreement) -> adapters_pb2.Agreement:
    return adapters_pb2.Agreement(
        num_positions=agreement.num_positions,
        num_disagreements=agreement.num_disagreements,
        kl_sum=agreement.kl_sum,
        lower_bound=agreement.lower_bound,
        upper_bound=agreement.upper_bound,
    )


def _write_drift(drift: AdapterDrift) -> cluster_pb2.AdapterDrift:
    return cluster_pb2.AdapterDrift(
        adapter=drift.adapter,
        digest=drift.digest,
        sharing=_write_sharing(drift.sharing),
        num_probes=drift.num_probes,
        num_diverged=drift.num_diverged,
        agreement=_write_agreement(drift.agreement),
        first_divergence=drift.first_divergence,
    )


def write_model(info: ModelInfo) -> cluster_pb2.ModelInfo:
    return cluster_pb2.ModelInfo(
        name=info.name,
        digest=info.digest,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        base_bytes_per_token=info.base_bytes_per_token,
        dtype=info.dtype,
        eos_token_ids=info.eos_token_ids,
    )


def write_status(status: ClusterStatus, model: ModelInfo) -> cluster_pb2.ClusterStatus:
    return cluster_pb2.ClusterStatus(
        version=status.version,
        model=write_model(model),
        workers=[_write_worker(worker) for worker in status.workers],
        directory=_write_directory(status.directory) if status.directory is not None else None,
        num_sessions=status.num_sessions,
        num_branches=status.num_branches,
        adapters=[write_adapter(adapter) for adapter in status.adapters],
    )


def _write_worker(worker: WorkerStatus) -> cluster_pb2.WorkerStatus:
    engine = worker.engine
    return cluster_pb2.WorkerStatus(
        worker_id=worker.worker_id,
        epoch=worker.epoch,
        pid=worker.pid,
        device=worker.device,
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        num_pinned_pages=engine.num_pinned_pages,
        kv_bytes_total=engine.kv_bytes_total,
        base_bytes_held=engine.base_bytes_held,
        residual_bytes_held=engine.residual_bytes_held,
        pools=[
            cluster_pb2.PoolStatus(
                name=pool.name,
                page_bytes=pool.page_bytes,
                num_total=pool.num_total,
                num_free=pool.num_free,
                num_cached=pool.num_cached,
                num_pinned=pool.num_pinned,
            )
            for pool in engine.pools
        ],
        counters=_write_counters(engine.counters),
        events_published=worker.events_published,
        busy_request_ids=worker.busy_request_ids,
        adapters=[write_adapter(adapter) for adapter in engine.adapters],
        host_bytes_total=engine.host_bytes_total,
        host_bytes_held=engine.host_bytes_held,
        sharing_saved_bytes=engine.sharing_saved_bytes,
        holdings=[cluster_pb2.Holding(kind=held.kind, name=held.name, num_bytes=held.num_bytes) for held in engine.holdings],
        adapter_memory=_write_adapter_memory(engine.adapter_memory),
        merged_bytes_held=engine.merged_bytes_held,
        drift=[_write_drift(drift) for drift in engine.drift],
    )


def _write_counters(counters: EngineCounters) -> cluster_pb2.EngineCounters:
    # The message has exactly the fields of the dataclass; a test holds the two together.
    return cluster_pb2.EngineCounters(**{name: getattr(counters, name) for name in EngineCounters.__slots__})


def _write_adapter_memory(memory: AdapterMemoryStatus) -> cluster_pb2.AdapterMemoryStatus:
    # Field by field the same, as with the counters.
    return cluster_pb2.AdapterMemoryStatus(**{name: getattr(memory, name) for name in AdapterMemoryStatus.__slots__})


def _write_directory(directory: DirectoryStatus) -> cluster_pb2.DirectoryStatus:
    return cluster_pb2.DirectoryStatus(
        incarnation=directory.incarnation,
        version=directory.version,
        num_workers=directory.num_workers,
        num_base_blocks=directory.num_base_blocks,
        num_residual_blocks=directory.num_residual_blocks,
    )

"""Requests to protobuf and protobuf to results, for the sync and the async client alike. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from forkkv_cluster.api.v1 import adapters_pb2, cluster_pb2, common_pb2, sessions_pb2
from forkkv_cluster.client.fields import choice, filled, seconds
from forkkv_cluster.client.results import (
    BranchInfo,
    Delta,
    Event,
    Finished,
    JoinResult,
    PromptLogprobs,
    SessionInfo,
    Started,
    Status,
)
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.errors import Internal, InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import (
    AdapterInfo,
    FinishReason,
    ModelInfo,
    PrefixUsage,
    Priority,
    Sharing,
    TokenLogprob,
    token_array,
)
from forkkv_cluster.core.session import BranchSpec, JoinWhat
from forkkv_cluster.core.status import (
    AdapterDrift,
    AdapterMemoryStatus,
    ClusterStatus,
    DirectoryStatus,
    EngineCounters,
    EngineStatus,
    Holding,
    PoolStatus,
    WorkerStatus,
)
from forkkv_cluster.core.verdict import PolicyAgreement, SharingVerdict, VerdictState


class GenerateOptions(TypedDict, total=False):
    """How to generate; every one may be left out.

    temperature      0 (the default) is greedy
    top_k, top_p     0 and 1 keep all tokens
    seed             drawn by the server when left out
    max_tokens       the server's default when left out
    stop             strings that end the output, looked for from min_tokens on
    stop_token_ids   tokens that end the output
    include_stop_str_in_output   leave what ended the output in its text
    skip_special_tokens   False shows special tokens in the text
    ignore_eos       go on past the model's end-of-sequence tokens
    logprobs         log probabilities of the chosen and of this many alternatives, 0 to 20
    prompt_logprobs  the same of the prompt's tokens; of shared context only what this request runs itself
    min_p            drop tokens less likely than this share of the most likely one
    presence_penalty, frequency_penalty   taken off logits of tokens generated so far, once or as often as they were
    repetition_penalty   divides logits of tokens in prompt or output; 1 is none
    logit_bias       token id -> number added to its logit
    min_tokens       do not end before so many tokens
    json_schema      JSON schema (as JSON text) that the output keeps to; or
    regex            a regular expression that it matches as a whole
    priority         HIGH goes first
    timeout_s        give up with DeadlineExceeded after so many seconds
    turn_id          name of a branch's turn: a call with the same one picks it up again
    num_received_tokens  with turn_id: tokens that you hold already
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    json_schema: str
    regex: str
    priority: Priority
    timeout_s: float
    turn_id: str
    num_received_tokens: int


_SAMPLING = (
    *("temperature", "top_k", "top_p", "seed", "max_tokens", "ignore_eos", "logprobs", "stop", "stop_token_ids"),
    *("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "json_schema", "regex"),
    *("prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens"),
)

# Requests


def create_session_request(
    *,
    document: str | None,
    token_ids: Sequence[int] | None,
    adapters: Sequence[str],
    sharing: Sharing | str | None,
    sharing_group: str,
    tenant: str,
    keep_s: float = 0.0,
) -> sessions_pb2.CreateSessionRequest:
    message = filled(
        sessions_pb2.CreateSessionRequest(sharing=sharing_value(sharing)),
        adapters=adapters,
        sharing_group=sharing_group,
        tenant=tenant,
        keep_s=keep_s,
    )
    _set_input(message, "document", document, token_ids)
    return message


def get_session_request(session_id: str, *, include_tokens: bool = False) -> sessions_pb2.GetSessionRequest:
    return filled(sessions_pb2.GetSessionRequest(), session_id=session_id, include_tokens=include_tokens)


def list_sessions_request(tenant: str) -> sessions_pb2.ListSessionsRequest:
    return filled(sessions_pb2.ListSessionsRequest(), tenant=tenant)


def fork_request(session_id: str, branches: Sequence[BranchSpec], parent: str | None) -> sessions_pb2.ForkRequest:
    message = filled(sessions_pb2.ForkRequest(session_id=session_id), parent=parent)
    for spec in branches:
        if not isinstance(spec, BranchSpec):
            raise InvalidArgument("branches", spec, "is not a BranchSpec", 'Send, for example, [BranchSpec("p", "planner")].')
        entry = sessions_pb2.BranchSpec(sharing=sharing_value(spec.sharing))
        message.branches.append(filled(entry, name=spec.name, adapter=spec.adapter))
    return message


def join_request(session_id: str, branch: str, what: JoinWhat | str) -> sessions_pb2.JoinRequest:
    value = f"JOIN_WHAT_{choice(JoinWhat, 'what', what).name}"
    return filled(sessions_pb2.JoinRequest(session_id=session_id, what=value), branch=branch)


def load_adapter_request(name: str, path: str, sharing: Sharing | str | None) -> adapters_pb2.LoadAdapterRequest:
    return filled(adapters_pb2.LoadAdapterRequest(sharing=sharing_value(sharing)), name=name, path=path)


def unload_adapter_request(name: str) -> adapters_pb2.UnloadAdapterRequest:
    return filled(adapters_pb2.UnloadAdapterRequest(), name=name)


def turn_request(
    session_id: str, branch: str, text: str | None, token_ids: Sequence[int] | None, options: GenerateOptions
) -> sessions_pb2.GenerateRequest:
    message = _generate_request("text", text, token_ids, options)
    message.branch.session_id = session_id
    message.branch.branch = branch
    return message


def stateless_request(
    *,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    adapter: str | None,
    sharing: Sharing | str | None,
    shared_prefix_tokens: int | None,
    sharing_group: str,
    tenant: str,
    options: GenerateOptions,
) -> sessions_pb2.GenerateRequest:
    message = _generate_request("prompt", prompt, token_ids, options)
    target = filled(
        sessions_pb2.StatelessTarget(sharing=sharing_value(sharing)),
        adapter=adapter,
        shared_prefix_tokens=shared_prefix_tokens,
        sharing_group=sharing_group,
        tenant=tenant,
    )
    message.stateless.CopyFrom(target)
    return message


def _generate_request(
    input_name: str, text: str | None, token_ids: Sequence[int] | None, options: GenerateOptions
) -> sessions_pb2.GenerateRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown generate options: {', '.join(sorted(unknown))}")
    given: dict[str, object] = dict(options)
    timeout_s = given.get("timeout_s")
    priority = choice(Priority, "priority", given.get("priority", Priority.NORMAL))
    sampling = filled(sessions_pb2.SamplingParams(), **{name: given.get(name) for name in _SAMPLING})
    try:
        sampling.logit_bias.update(options.get("logit_bias") or {})
    except (TypeError, ValueError):
        raise InvalidArgument(
            "logit_bias", given["logit_bias"], "is not what this field holds", "Map token ids to numbers."
        ) from None
    message = filled(
        sessions_pb2.GenerateRequest(sampling=sampling, priority=f"PRIORITY_{priority.name}"),
        timeout_s=None if timeout_s is None else seconds("timeout_s", timeout_s),
        turn_id=given.get("turn_id"),
        num_received_tokens=given.get("num_received_tokens"),
    )
    if text is not None or token_ids is not None:
        _set_input(message, input_name, text, token_ids)
    return message


def _set_input(
    message: sessions_pb2.CreateSessionRequest | sessions_pb2.GenerateRequest,
    name: str,
    text: str | None,
    token_ids: Sequence[int] | None,
) -> None:
    if (text is None) == (token_ids is None):
        raise InvalidArgument(name, text, "and token_ids exclude each other", "Give exactly one of both.")
    if text is not None:
        try:
            message.text = text
        except (TypeError, ValueError):
            raise InvalidArgument(name, text, "is not text", "Send text that UTF-8 can hold.") from None
    else:
        # Also checks what protobuf would refuse in words of its own.
        message.token_ids.ids.extend(token_array(token_ids).tolist())
        message.token_ids.SetInParent()


def sharing_value(sharing: Sharing | str | None) -> common_pb2.Sharing:
    name = "UNSPECIFIED" if sharing is None else choice(Sharing, "sharing", sharing).name
    value: common_pb2.Sharing = getattr(common_pb2, f"SHARING_{name}")
    return value


# Results


def read_sharing(value: int) -> Sharing:
    return Sharing[common_pb2.Sharing.Name(value).removeprefix("SHARING_")]


def read_session(message: sessions_pb2.Session) -> SessionInfo:
    return SessionInfo(
        session_id=message.session_id,
        tenant=message.tenant,
        sharing_group=message.sharing_group,
        sharing=read_sharing(message.sharing),
        writer=message.writer,
        created_s=message.created_s,
        num_context_tokens=message.num_context_tokens,
        adapters=tuple(message.adapters),
        branches=tuple(read_branch(branch) for branch in message.branches),
        context_token_ids=tuple(message.context.ids) if message.HasField("context") else None,
        keep_s=message.keep_s,
    )


def read_branch(message: sessions_pb2.Branch) -> BranchInfo:
    return BranchInfo(
        name=message.name,
        adapter=message.adapter or None,
        sharing=read_sharing(message.sharing),
        num_context_tokens=message.num_context_tokens,
        num_own_tokens=message.num_own_tokens,
        num_turns=message.num_turns,
        own_token_ids=tuple(message.own.ids) if message.HasField("own") else None,
    )


def read_join(message: sessions_pb2.JoinResponse) -> JoinResult:
    return JoinResult(message.num_joined_tokens, message.num_context_tokens)


def read_event(message: sessions_pb2.GenerateResponse) -> Event | None:
    """None for the ``error`` message: the call's status, which follows, raises it."""
    kind = message.WhichOneof("event")
    if kind == "delta":
        delta = message.delta
        logprobs = tuple(_read_logprob(entry) for entry in delta.logprobs)
        return Delta(tuple(delta.token_ids), delta.text, logprobs, delta.worker_id)
    if kind == "started":
        started = message.started
        return Started(started.request_id, started.num_prompt_tokens, started.seed, started.max_tokens)
    if kind == "finished":
        return _read_finished(message.finished)
    if kind == "prompt_logprobs":
        part = message.prompt_logprobs
        return PromptLogprobs(part.first_position, tuple(_read_logprob(entry) for entry in part.tokens))
    if kind == "error":
        return None
    raise Internal(f"the server sent an event that this client does not know: {kind}. Update the client.")


def _read_logprob(entry: sessions_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple((top.token_id, top.logprob) for top in entry.top)
    return TokenLogprob(entry.token_id, entry.logprob, top, entry.rank or None)


_FINISH_REASONS = {
    sessions_pb2.FINISH_REASON_UNSPECIFIED: None,
    sessions_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sessions_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def _read_finished(message: sessions_pb2.TurnFinished) -> Finished:
    usage = message.usage
    return Finished(
        finish_reason=_FINISH_REASONS[message.finish_reason],
        num_prompt_tokens=message.num_prompt_tokens,
        num_generated_tokens=message.num_generated_tokens,
        usage=PrefixUsage(usage.base_hit_tokens, usage.residual_hit_tokens, usage.useful_hit_tokens, usage.prefill_tokens_run),
        worker_ids=tuple(message.worker_ids),
        num_resumes=message.num_resumes,
        ttft_s=message.ttft_s,
        e2e_s=message.e2e_s,
        is_adapter_inactive=message.is_adapter_inactive,
        sharing=_read_sharing(message.sharing),
        mismatched_training=_read_sharing(message.mismatched_training),
    )


def read_adapter(message: adapters_pb2.Adapter) -> AdapterInfo:
    return AdapterInfo(
        name=message.name,
        digest=AdapterDigest(message.digest),
        path=message.path,
        lora_rank=message.lora_rank,
        target_modules=tuple(message.target_modules),
        residual_bytes_per_token=message.residual_bytes_per_token,
        invocation_tokens=tuple(message.invocation_tokens),
        trained_for=_read_sharing(message.trained_for),
        sharing=_read_sharing(message.sharing),
        verdict=_read_verdict(message.verdict) if message.HasField("verdict") else None,
    )


def _read_verdict(message: adapters_pb2.SharingVerdict) -> SharingVerdict:
    return SharingVerdict(
        sharing=_read_sharing(message.sharing) or Sharing.ISOLATED,
        state=VerdictState(message.state),
        reference=_read_sharing(message.reference) or Sharing.ISOLATED,
        reason=message.reason,
        max_disagreement=message.max_disagreement,
        measured=tuple(
            PolicyAgreement(_read_sharing(entry.sharing) or Sharing.ISOLATED, _read_agreement(entry.agreement))
            for entry in message.measured
        ),
        samples=message.samples,
        decided_s=message.decided_s,
    )


def _read_agreement(message: adapters_pb2.Agreement) -> Agreement:
    return Agreement(message.num_positions, message.num_disagreements, message.kl_sum)


def _read_drift(message: cluster_pb2.AdapterDrift) -> AdapterDrift:
    return AdapterDrift(
        adapter=message.adapter,
        digest=message.digest,
        sharing=_read_sharing(message.sharing) or Sharing.ISOLATED,
        num_probes=message.num_probes,
        num_diverged=message.num_diverged,
        agreement=_read_agreement(message.agreement),
        first_divergence=message.first_divergence if message.HasField("first_divergence") else None,
    )


def _read_sharing(value: int) -> Sharing | None:
    name = common_pb2.Sharing.Name(value)
    return None if name == "SHARING_UNSPECIFIED" else Sharing[name.removeprefix("SHARING_")]


def read_status(message: cluster_pb2.ClusterStatus) -> Status:
    model = read_model(message.model)
    directory = message.directory
    cluster = ClusterStatus(
        version=message.version,
        workers=tuple(_read_worker(worker, model) for worker in message.workers),
        directory=DirectoryStatus(
            directory.incarnation,
            directory.version,
            directory.num_workers,
            directory.num_base_blocks,
            directory.num_residual_blocks,
        )
        if message.HasField("directory")
        else None,
        num_sessions=message.num_sessions,
        num_branches=message.num_branches,
        adapters=tuple(read_adapter(adapter) for adapter in message.adapters),
    )
    return Status(cluster, model)


def read_model(message: cluster_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        digest=message.digest,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        base_bytes_per_token=message.base_bytes_per_token,
        dtype=message.dtype,
        eos_token_ids=tuple(message.eos_token_ids),
    )


def _read_worker(message: cluster_pb2.WorkerStatus, model: ModelInfo) -> WorkerStatus:
    pools = tuple(
        PoolStatus(pool.name, pool.page_bytes, pool.num_total, pool.num_free, pool.num_cached, pool.num_pinned)
        for pool in message.pools
    )
    engine = EngineStatus(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_pinned_pages=message.num_pinned_pages,
        kv_bytes_total=message.kv_bytes_total,
        base_bytes_held=message.base_bytes_held,
        residual_bytes_held=message.residual_bytes_held,
        pools=pools,
        counters=EngineCounters(**{name: getattr(message.counters, name) for name in EngineCounters.__slots__}),
        adapters=tuple(read_adapter(adapter) for adapter in message.adapters),
        host_bytes_total=message.host_bytes_total,
        host_bytes_held=message.host_bytes_held,
        sharing_saved_bytes=message.sharing_saved_bytes,
        holdings=tuple(Holding(held.kind, held.name, held.num_bytes) for held in message.holdings),
        adapter_memory=AdapterMemoryStatus(
            **{name: getattr(message.adapter_memory, name) for name in AdapterMemoryStatus.__slots__}
        ),
        merged_bytes_held=message.merged_bytes_held,
        drift=tuple(_read_drift(drift) for drift in message.drift),
    )
    return WorkerStatus(
        worker_id=message.worker_id,
        epoch=message.epoch,
        pid=message.pid,
        device=message.device,
        model=model,
        engine=engine,
        events_published=message.events_published,
        busy_request_ids=tuple(message.busy_request_ids),
    )

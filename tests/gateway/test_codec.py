"""Protobuf to commands and back, checked against the client's own reading of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.api.v1 import common_pb2, sessions_pb2
from forkkv_cluster.client import messages
from forkkv_cluster.client.results import Delta, Finished, GenerationBuilder, PromptLogprobs, Started
from forkkv_cluster.core import request as core_request
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.errors import InvalidArgument, NotFound
from forkkv_cluster.core.request import FinishReason, Guide, GuideKind, PrefixUsage, Priority, Sharing, TokenLogprob, WriterMode
from forkkv_cluster.core.session import BranchSpec, JoinWhat, Session
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
from forkkv_cluster.gateway import codec
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    StatelessTarget,
    TurnDelta,
    TurnFinished,
    TurnPromptLogprobs,
    TurnStarted,
)
from tests.gateway.fakes import MODEL, adapter_info


def test_a_turn_arrives_as_the_client_sent_it() -> None:
    message = messages.turn_request(
        "session-1",
        "p",
        None,
        [1, 2],
        {
            "temperature": 0.7,
            "top_k": 3,
            "top_p": 0.9,
            "seed": 0,
            "max_tokens": 5,
            "stop": ["x"],
            "stop_token_ids": [9],
            "ignore_eos": True,
            "logprobs": 0,
            "min_p": 0.1,
            "presence_penalty": 0.3,
            "frequency_penalty": -0.7,
            "repetition_penalty": 1.1,
            "logit_bias": {9: -0.2, 5: 1.0},
            "min_tokens": 3,
            "prompt_logprobs": 0,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "timeout_s": 2.5,
            "turn_id": "t",
            "num_received_tokens": 4,
            "priority": Priority.LOW,
        },
    )
    command = codec.read_generate(message)
    assert command.target == BranchTarget("session-1", "p")
    assert command.input.token_ids == [1, 2]
    params = command.sampling.params
    assert (params.temperature, params.top_k, params.top_p, params.logprobs) == (0.7, 3, 0.9, 0)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x",), (9,), True)
    assert (params.prompt_logprobs, params.include_stop_str_in_output, params.skip_special_tokens) == (0, True, False)
    assert (params.min_p, params.presence_penalty, params.frequency_penalty) == (0.1, 0.3, -0.7)
    assert (params.repetition_penalty, params.logit_bias, params.min_tokens) == (1.1, ((5, 1.0), (9, -0.2)), 3)
    assert (command.sampling.seed, command.sampling.max_tokens) == (0, 5)
    assert (command.timeout_s, command.turn_id, command.num_received_tokens) == (2.5, "t", 4)
    assert command.priority is Priority.LOW


def test_what_the_client_leaves_out_stays_open() -> None:
    command = codec.read_generate(messages.turn_request("s", "p", "text", None, {}))
    assert command.input.text == "text"
    assert (command.sampling.seed, command.sampling.max_tokens, command.timeout_s) == (None, None, None)
    assert (command.sampling.params.top_p, command.sampling.params.logprobs) == (1.0, None)
    assert command.sampling.params.repetition_penalty == 1.0
    assert command.priority is Priority.NORMAL


@pytest.mark.parametrize(("option", "kind"), [("json_schema", GuideKind.JSON_SCHEMA), ("regex", GuideKind.REGEX)])
def test_a_guide_arrives_as_sent(option: str, kind: GuideKind) -> None:
    command = codec.read_generate(messages.turn_request("s", "p", "text", None, {option: "{}"}))  # type: ignore[misc]
    assert command.sampling.params.guide == Guide(kind, "{}")


def test_an_empty_append_is_empty_and_not_missing_text() -> None:
    command = codec.read_generate(messages.turn_request("s", "p", None, None, {}))
    assert (command.input.text, command.input.token_ids) == (None, [])


@pytest.mark.parametrize("shared", [None, 0, 7])
def test_a_fork_point_of_zero_is_not_a_missing_one(shared: int | None) -> None:
    message = messages.stateless_request(
        prompt="x",
        token_ids=None,
        adapter=None,
        sharing="base",
        shared_prefix_tokens=shared,
        sharing_group="g",
        tenant="t",
        options={},
    )
    assert codec.read_generate(message).target == StatelessTarget(None, Sharing.BASE, shared, "g", "t")


def test_how_long_to_keep_a_session_arrives_as_sent_and_comes_back() -> None:
    message = messages.create_session_request(
        document="x", token_ids=None, adapters=(), sharing=None, sharing_group="", tenant="", keep_s=2.5
    )
    assert codec.read_create_session(message).keep_s == 2.5
    session = Session("s", "t", np.zeros(1, dtype=np.int32), (), Sharing.EAGER, WriterMode.CANONICAL, 0.0, keep_s=2.5)
    assert messages.read_session(codec.write_session(session)).keep_s == 2.5


def test_a_request_without_target_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="target"):
        codec.read_generate(sessions_pb2.GenerateRequest(text="x"))


def test_an_enum_value_of_the_future_is_refused_by_field() -> None:
    with pytest.raises(InvalidArgument, match="sharing"):
        codec.read_create_session(sessions_pb2.CreateSessionRequest(text="x", sharing=99))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="what"):
        codec.read_join_what(99)


def test_forks_and_joins_arrive_as_sent() -> None:
    specs = (BranchSpec("a", "planner", Sharing.EAGER), BranchSpec("b"))
    assert codec.read_branch_specs(messages.fork_request("s", specs, None)) == specs
    assert codec.read_join_what(messages.join_request("s", "a", "output").what) is JoinWhat.OUTPUT


def test_events_come_back_as_written() -> None:
    logprob = TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.0)))
    usage = PrefixUsage(4, 3, 2, 1)
    delta = TurnDelta((5, 6), "text", (logprob,), "worker-1")
    end = TurnFinished(FinishReason.LENGTH, 10, 2, usage, ("w1", "w2"), 1, 0.5, 1.5, True, Sharing.EAGER)
    read = [messages.read_event(codec.write_event(event)) for event in (TurnStarted("r", 10, 2**62, 8), delta, end)]
    assert read == [
        Started("r", 10, 2**62, 8),
        Delta((5, 6), "text", (logprob,), "worker-1"),
        Finished(FinishReason.LENGTH, 10, 2, usage, ("w1", "w2"), 1, 0.5, 1.5, True, Sharing.EAGER),
    ]


def test_a_replayed_turn_has_no_finish_reason() -> None:
    read = messages.read_event(codec.write_event(TurnFinished(None, 1, 1)))
    assert isinstance(read, Finished)
    assert read.finish_reason is None


def test_a_status_comes_back_as_written() -> None:
    counters = EngineCounters(*range(1, 1 + len(EngineCounters.__slots__)))
    pools = (PoolStatus("base", 1024, 10, 5, 3, 2),)
    holdings = (Holding("tenant", "acme", 2**40), Holding("session", "s", 3))
    memory = AdapterMemoryStatus(*range(2**40, 2**40 + len(AdapterMemoryStatus.__slots__)))
    infos = (adapter_info("planner"),)
    drift = (
        AdapterDrift("planner", "d" * 32, Sharing.EAGER, 4, 1, Agreement(2**40, 2, 0.5), 0),
        AdapterDrift("planner", "d" * 32, Sharing.RESIDUAL, 4, 0, Agreement(200, 0, 0.5), None),
    )
    engine = EngineStatus(1, 2, 3, 4, 5, 6, pools, counters, infos, 2**40, 7, -8, holdings, memory, 2**41, drift)
    worker = WorkerStatus("worker-1", 2**60, 42, "cpu", MODEL, engine, 7, ("request-1",))
    directory = DirectoryStatus("incarnation", 1, 2, 3, 4)
    status = ClusterStatus("1.0", (worker,), directory, 5, 6, (adapter_info("planner"),))
    read = messages.read_status(codec.write_status(status, MODEL))
    assert (read.cluster, read.model) == (status, MODEL)


def test_an_adapter_comes_back_as_written() -> None:
    alora = replace(adapter_info("checker"), invocation_tokens=(5, 6, 5))
    trained = replace(adapter_info("planner"), trained_for=Sharing.RESIDUAL)
    for info in (alora, trained):
        assert messages.read_adapter(codec.write_adapter(info)) == info


@pytest.mark.parametrize("state", list(VerdictState))
def test_how_auto_is_served_on_an_adapter_comes_back_as_written(state: VerdictState) -> None:
    measured = (PolicyAgreement(Sharing.EAGER, Agreement(2000, 4, 0.25)), PolicyAgreement(Sharing.RESIDUAL, Agreement(2000)))
    verdict = SharingVerdict(Sharing.EAGER, state, Sharing.ISOLATED, "because", 0.02, measured, "some file", 12.5)
    info = replace(adapter_info("p"), trained_for=Sharing.RESIDUAL, sharing=Sharing.AUTO, verdict=verdict)
    message = codec.write_adapter(info)
    assert messages.read_adapter(message) == info
    assert message.verdict.measured[0].agreement.upper_bound == measured[0].agreement.upper_bound


def test_a_request_to_load_says_how_auto_is_to_be_served() -> None:
    message = messages.load_adapter_request("p", "/p", "auto")
    assert (message.name, message.path, codec.read_sharing(message.sharing)) == ("p", "/p", Sharing.AUTO)
    assert codec.read_sharing(messages.load_adapter_request("p", "/p", None).sharing) is None


def test_an_absent_directory_stays_absent() -> None:
    status = ClusterStatus("1.0", (), None, 0, 0)
    assert messages.read_status(codec.write_status(status, MODEL)).cluster.directory is None


def test_an_error_carries_its_attributes() -> None:
    detail = common_pb2.ErrorDetail.FromString(codec.write_error(NotFound("session", "s", "Create one.")).SerializeToString())
    assert (detail.code, dict(detail.attributes)) == (
        "NOT_FOUND",
        {"kind": "session", "name": "s", "remedy": "Create one."},
    )


def test_prompt_logprobs_arrive_as_they_were_sent_and_fill_the_prompt() -> None:
    part = core_request.PromptLogprobs(
        2,
        np.array([7, 8], np.int32),
        np.array([-0.5, -1.5], np.float32),
        np.array([1, 3], np.int32),
        np.array([[7], [9]], np.int32),
        np.array([[-0.5], [-0.25]], np.float32),
    )
    event = messages.read_event(codec.write_event(TurnPromptLogprobs(part)))
    assert event == PromptLogprobs(2, (TokenLogprob(7, -0.5, ((7, -0.5),), 1), TokenLogprob(8, -1.5, ((9, -0.25),), 3)))
    builder = GenerationBuilder()
    for one in (Started("r", 4, 0, 1), event, Delta((1,), "x"), Finished(None, 4, 1, PrefixUsage(), (), 0, 0.0, 0.0)):
        builder.add(one)
    assert builder.build().prompt_logprobs == (None, None, *event.tokens)

"""Spans, sharing and page identity of requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, GenerateRequest, ModelInfo, SamplingParams, Sharing, WriterMode
from forkkv_cluster.core.request_builder import (
    Envelope,
    Modes,
    PromptSharing,
    RequestBuilder,
    context_plan,
    served_choice,
)
from forkkv_cluster.core.session import BranchSpec, Session

PLANNER = AdapterRef("planner", AdapterDigest("a" * 32))
CRITIC = AdapterRef("critic", AdapterDigest("b" * 32))
CHECKER = AdapterRef("checker", AdapterDigest("c" * 32), (31, 32))
SAMPLING = SamplingParams(max_tokens=8)
MODEL = ModelInfo("tiny", "m" * 32, 300, 512, 64, "float32")
ENVELOPE = Envelope("request-1", "tenant")
BUILDER = RequestBuilder(MODEL, block_size=4, namespace_of="{}/{}".format)


def tokens(*values: int) -> TokenArray:
    return np.asarray(values, dtype=np.int32)


def session(sharing: Sharing = Sharing.EAGER, writer: WriterMode = WriterMode.CANONICAL) -> Session:
    context = np.arange(10, dtype=np.int32)
    empty = Session("s", "tenant", context, (PLANNER, CRITIC, CHECKER), sharing, writer, 0.0)
    return empty.fork((BranchSpec("p", "planner"), BranchSpec("c", "critic"), BranchSpec("base")))


def turn(name: str = "p", sharing: Sharing = Sharing.EAGER, own: TokenArray | None = None) -> GenerateRequest:
    state = session(sharing)
    if own is not None:
        state = state.finish_turn(name, own, tokens(50))
    return BUILDER.turn(state, state.branch(name), tokens(21, 22), SamplingParams(max_tokens=8), ENVELOPE)


def test_a_turn_holds_context_own_tokens_and_what_it_appends() -> None:
    request = turn(own=tokens(11, 12))
    assert request.tokens.tolist() == [*range(10), 11, 12, 50, 21, 22]
    assert request.tokens.dtype == np.int32
    assert (request.context_len, request.num_resumed, request.declared) == (10, 0, (PLANNER, CRITIC, CHECKER))


def test_branches_of_different_adapters_share_the_context_chain_and_nothing_else() -> None:
    planner, critic = turn("p").prefix, turn("c").prefix
    assert planner.context == critic.context
    assert len(planner.context) == 2
    assert not set(planner.own) & set(critic.own)


def test_isolated_branches_share_nothing() -> None:
    planner, critic = turn("p", Sharing.ISOLATED), turn("c", Sharing.ISOLATED)
    assert planner.context_len == 0
    assert not set(planner.prefix.all_hashes) & set(critic.prefix.all_hashes)


def test_an_isolated_base_branch_still_reads_the_canonical_pages() -> None:
    assert turn("base", Sharing.ISOLATED).prefix.context[:2] == turn("p").prefix.context


@pytest.mark.parametrize("sharing", [Sharing.ISOLATED, Sharing.EAGER, Sharing.RESIDUAL, Sharing.BASE])
def test_an_alora_forks_where_it_is_invoked_under_every_sharing(sharing: Sharing) -> None:
    state = session(sharing).fork((BranchSpec("v", "checker"),))
    request = BUILDER.turn(state, state.branch("v"), tokens(21, 22, 31, 32, 23), SAMPLING, ENVELOPE)
    assert (request.adapter, request.invocation_start, request.is_adapter_inactive) == (CHECKER, 12, False)
    assert request.context_len == (0 if sharing is Sharing.ISOLATED else 10)
    base = BUILDER.turn(state, state.branch("base"), tokens(21, 22), SAMPLING, ENVELOPE)
    assert request.prefix.context == base.prefix.context
    other = session(Sharing.BASE).fork((BranchSpec("v", "checker"),))
    same = BUILDER.turn(other, other.branch("v"), tokens(21, 22, 31, 32, 23), SAMPLING, ENVELOPE)
    assert request.prefix == same.prefix


def test_an_alora_that_is_invoked_in_the_context_forks_there() -> None:
    state = replace(session(), context=tokens(*range(5), 31, 32, *range(5))).fork((BranchSpec("v", "checker"),))
    request = BUILDER.turn(state, state.branch("v"), tokens(21), SAMPLING, ENVELOPE)
    assert (request.context_len, request.invocation_start, len(request.prefix.context)) == (5, 5, 1)


def test_an_alora_without_invocation_is_the_base_model() -> None:
    state = session().fork((BranchSpec("v", "checker"),))
    request, base = (BUILDER.turn(state, state.branch(name), tokens(21), SAMPLING, ENVELOPE) for name in ("v", "base"))
    assert (request.adapter, request.invocation_start, request.is_adapter_inactive) == (None, None, True)
    assert request.prefix == base.prefix
    assert not base.is_adapter_inactive


def test_an_alora_ignores_who_writes_for_others() -> None:
    state = session(Sharing.RESIDUAL, WriterMode.FIRST).fork((BranchSpec("v", "checker"),))
    assert state.first_writer == PLANNER
    request = BUILDER.turn(state, state.branch("v"), tokens(21, 22, 31, 32), SAMPLING, ENVELOPE)
    base = BUILDER.turn(state, state.branch("base"), tokens(21, 22), SAMPLING, ENVELOPE)
    assert request.writer is None
    assert request.prefix.context == base.prefix.context


def test_generated_tokens_are_not_searched_for_an_invocation() -> None:
    state = session().fork((BranchSpec("v", "checker"),))
    first = BUILDER.turn(state, state.branch("v"), tokens(31, 32, 21), SAMPLING, ENVELOPE)
    second = BUILDER.resumed(first, [31, 32, 33, 34], 1)
    assert second.invocation_start == first.invocation_start == 10
    assert second.prefix.context == first.prefix.context
    assert second.prefix.own[: len(first.prefix.own)] == first.prefix.own
    assert len(second.prefix.own) > len(first.prefix.own)


def test_a_resumed_request_gains_a_third_span_and_keeps_the_rest() -> None:
    first = turn()
    second = BUILDER.resumed(first, [31, 32, 33], 1, ["worker-1"])
    assert second.tokens.tolist() == [*first.tokens.tolist(), 31, 32, 33]
    assert second.num_resumed == 3
    assert second.num_prompt_tokens == first.num_prompt_tokens
    assert second.sampling == first.sampling
    assert second.prefix.context == first.prefix.context
    assert second.prefix.own[: len(first.prefix.own)] == first.prefix.own
    assert second.excluded_workers == ("worker-1",)
    assert second.request_id != first.request_id


def test_a_request_resumed_twice_is_as_one_resumed_once_with_all_tokens() -> None:
    first = turn()
    once = BUILDER.resumed(first, [31, 32, 33], 1)
    twice = BUILDER.resumed(BUILDER.resumed(first, [31], 1), [31, 32, 33], 2)
    assert once.tokens.tolist() == twice.tokens.tolist()
    assert once.prefix == twice.prefix
    assert twice.num_resumed == 3


def test_a_context_pass_has_the_chain_that_branches_will_ask_for() -> None:
    state = session()
    request = BUILDER.context_pass(state.context, state.adapters, Sharing.EAGER, "", "s", ENVELOPE)
    assert request.prefix.context == turn().prefix.context


def test_another_group_has_other_pages() -> None:
    state = session()
    request = BUILDER.context_pass(state.context, state.adapters, Sharing.EAGER, "team", "s", ENVELOPE)
    assert request.prefix.context != turn().prefix.context


def test_the_first_writer_is_part_of_what_the_pages_are() -> None:
    state = session(sharing=Sharing.RESIDUAL, writer=WriterMode.FIRST)
    request = BUILDER.turn(state, state.branch("c"), tokens(21), SamplingParams(), ENVELOPE)
    assert request.writer == PLANNER
    assert request.prefix.context != turn("c").prefix.context


def test_branches_of_other_modes_read_what_the_base_model_wrote() -> None:
    state = session(sharing=Sharing.EAGER, writer=WriterMode.FIRST)
    request = BUILDER.turn(state, state.branch("c"), tokens(21), SamplingParams(), ENVELOPE)
    assert request.writer is None
    assert request.prefix.context == turn("c").prefix.context


def test_a_stateless_request_is_isolated() -> None:
    request = BUILDER.prompt(tokens(*range(9)), PLANNER, PromptSharing(), SamplingParams(), ENVELOPE)
    assert (request.sharing, request.context_len, request.declared) == (Sharing.ISOLATED, 0, (PLANNER,))


def test_a_stateless_request_shares_up_to_its_fork_point() -> None:
    choice = PromptSharing(Sharing.EAGER, 8)
    request = BUILDER.prompt(tokens(*range(9)), PLANNER, choice, SamplingParams(), ENVELOPE)
    assert request.context_len == 8
    assert request.prefix.context == turn().prefix.context


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        (PromptSharing(sharing=Sharing.EAGER), "sharing"),
        (PromptSharing(shared_prefix_tokens=3), "shared_prefix_tokens"),
        (PromptSharing(sharing=Sharing.EAGER, shared_prefix_tokens=9), "shared_prefix_tokens"),
        (PromptSharing(sharing=Sharing.EAGER, shared_prefix_tokens=-1), "shared_prefix_tokens"),
    ],
)
def test_a_fork_point_that_makes_no_sense_is_refused(choice: PromptSharing, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        BUILDER.prompt(tokens(*range(9)), PLANNER, choice, SamplingParams(), ENVELOPE)
    assert caught.value.field == field


def test_auto_is_refused_by_name_where_nobody_has_resolved_it() -> None:
    choice = PromptSharing(sharing=Sharing.AUTO, shared_prefix_tokens=1)
    with pytest.raises(Unsupported, match="auto"):
        BUILDER.prompt(tokens(1, 2), None, choice, SamplingParams(), ENVELOPE)


@pytest.mark.parametrize("mode", [Sharing.ISOLATED, Sharing.RESIDUAL, Sharing.EAGER, Sharing.BASE])
def test_a_turn_under_auto_is_the_turn_under_what_it_comes_to(mode: Sharing) -> None:
    auto = session(Sharing.AUTO)
    request = BUILDER.turn(auto, auto.branch("p"), tokens(21, 22), SAMPLING, ENVELOPE, {"planner": mode})
    wanted = turn(sharing=mode)
    assert (request.sharing, request.context_len, request.prefix) == (mode, wanted.context_len, wanted.prefix)


def test_under_auto_only_what_is_served_eager_is_declared() -> None:
    auto = session(Sharing.AUTO)
    modes = {"planner": Sharing.EAGER, "critic": Sharing.RESIDUAL}
    assert BUILDER.turn(auto, auto.branch("p"), tokens(21), SAMPLING, ENVELOPE, modes).declared == (PLANNER,)


def test_an_adapter_of_which_nothing_is_known_is_isolated_under_auto() -> None:
    auto = session(Sharing.AUTO)
    request = BUILDER.turn(auto, auto.branch("c"), tokens(21), SAMPLING, ENVELOPE, {"planner": Sharing.EAGER})
    assert (request.sharing, request.context_len) == (Sharing.ISOLATED, 0)


def test_the_base_model_reads_the_shared_context_under_auto() -> None:
    auto = session(Sharing.AUTO)
    request = BUILDER.turn(auto, auto.branch("base"), tokens(21), SAMPLING, ENVELOPE)
    eager = session(Sharing.EAGER)
    assert request.prefix == BUILDER.turn(eager, eager.branch("base"), tokens(21), SAMPLING, ENVELOPE).prefix


def test_what_an_alora_comes_to_under_auto_finds_the_pages_of_every_other_sharing() -> None:
    own = np.concatenate([tokens(11), np.asarray(CHECKER.invocation_tokens, dtype=np.int32), tokens(12)])
    modes = {"checker": Sharing.BASE}
    requests = []
    for sharing in (Sharing.AUTO, Sharing.EAGER):
        state = session(sharing).fork((BranchSpec("a", "checker"),))
        requests.append(BUILDER.turn(state, state.branch("a"), own, SAMPLING, ENVELOPE, modes))
    assert requests[0].prefix == requests[1].prefix


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [
        ({}, None),
        ({"planner": Sharing.ISOLATED, "critic": Sharing.ISOLATED, "checker": Sharing.ISOLATED}, None),
        ({"planner": Sharing.EAGER, "critic": Sharing.RESIDUAL}, (Sharing.EAGER, (PLANNER,))),
        ({"critic": Sharing.RESIDUAL}, (Sharing.BASE, ())),
        ({"checker": Sharing.BASE}, (Sharing.BASE, ())),
    ],
)
def test_the_pass_over_an_auto_sessions_context_writes_what_its_adapters_will_read(
    modes: Modes, wanted: tuple[Sharing, tuple[AdapterRef, ...]] | None
) -> None:
    assert context_plan(session(Sharing.AUTO), modes) == wanted


def test_the_pass_of_another_session_is_as_it_says() -> None:
    assert context_plan(session(Sharing.EAGER), {}) == (Sharing.EAGER, (PLANNER, CRITIC, CHECKER))


@pytest.mark.parametrize(
    ("mode", "shared", "wanted"),
    [
        (Sharing.EAGER, 1, (Sharing.EAGER, 1)),
        (Sharing.ISOLATED, 1, (Sharing.ISOLATED, None)),
        (Sharing.EAGER, None, (Sharing.ISOLATED, None)),  # there is nothing to share
    ],
)
def test_a_prompt_under_auto_shares_up_to_its_fork_point_if_anything(
    mode: Sharing, shared: int | None, wanted: tuple[Sharing, int | None]
) -> None:
    choice = served_choice(PromptSharing(Sharing.AUTO, shared, "group"), PLANNER, {"planner": mode}, 4)
    assert (choice.sharing, choice.shared_prefix_tokens, choice.sharing_group) == (*wanted, "group")
    BUILDER.prompt(tokens(1, 2, 3, 4), PLANNER, choice, SAMPLING, ENVELOPE)


def test_a_bad_fork_point_under_auto_is_refused_whatever_auto_comes_to() -> None:
    with pytest.raises(InvalidArgument, match="shared_prefix_tokens=4"):
        served_choice(PromptSharing(Sharing.AUTO, 4), PLANNER, {}, 4)


@pytest.mark.parametrize("sharing", [Sharing.ISOLATED, Sharing.EAGER])
def test_a_replay_is_the_request_that_would_go_on_from_what_was_served(sharing: Sharing) -> None:
    served = turn(own=tokens(11, 12))
    longer = np.concatenate([served.tokens, tokens(60, 61)]).astype(np.int32)
    replay = BUILDER.replayed(served, longer, sharing, SAMPLING, Envelope("probe-1", "probes"))
    state = session(sharing).finish_turn("p", tokens(11, 12), tokens(50))
    wanted = BUILDER.turn(state, state.branch("p"), tokens(21, 22, 60, 61), SAMPLING, ENVELOPE)
    assert replay.tokens.tolist() == wanted.tokens.tolist()
    assert (replay.prefix, replay.context_len, replay.namespace) == (wanted.prefix, wanted.context_len, wanted.namespace)
    assert (replay.request_id, replay.tenant, replay.is_background) == ("probe-1", "probes", True)


def test_the_limit_is_what_was_asked_or_the_default_cut_to_what_fits() -> None:
    assert BUILDER.max_tokens(500, 12, default=16) == 500
    assert BUILDER.max_tokens(None, 12, default=16) == 16
    assert BUILDER.max_tokens(None, MODEL.max_model_len - 3, default=16) == 3


@pytest.mark.parametrize(("asked", "num_prompt", "field"), [(500, 13, "max_tokens"), (None, MODEL.max_model_len, "prompt")])
def test_what_does_not_fit_the_model_is_refused(asked: int | None, num_prompt: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        BUILDER.max_tokens(asked, num_prompt, default=16)
    assert caught.value.field == field


@pytest.mark.parametrize("length", [0, MODEL.max_model_len - 1])
def test_a_context_without_room_for_a_branch_is_refused(length: int) -> None:
    with pytest.raises(InvalidArgument, match="context"):
        BUILDER.check_context(np.zeros(length, dtype=np.int32))

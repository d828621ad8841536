"""What Fork, a turn and Join do to tokens, sentence by sentence."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.core.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, Sharing, WriterMode
from forkkv_cluster.core.session import MAX_KEEP_S, Branch, BranchSpec, BusyBranches, JoinWhat, Session, Turn

PLANNER, CRITIC = AdapterRef("planner", AdapterDigest("p")), AdapterRef("critic", AdapterDigest("c"))


def array(tokens: Sequence[int]) -> TokenArray:
    return np.array(tokens, dtype=np.int32)


def session(sharing: Sharing = Sharing.EAGER, writer: WriterMode = WriterMode.CANONICAL) -> Session:
    return Session("s", "tenant", array([1, 2, 3]), (PLANNER, CRITIC), sharing, writer, created_s=0.0)


def spec(name: str, adapter: str | None = "planner", sharing: Sharing | None = None) -> BranchSpec:
    return BranchSpec(name, adapter, sharing)


@pytest.fixture
def forked() -> Session:
    """Branch ``b`` of the planner, after a turn that appended 10, 11 and generated 20, 21."""
    return session().fork((spec("b"),)).finish_turn("b", array([10, 11]), array([20, 21]), "t1")


def joined(state: Session, branch: str, what: JoinWhat = JoinWhat.ALL) -> Session:
    return state.join(branch, what)[0]


# --- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_s", [0.0, 0.5, MAX_KEEP_S])
def test_a_shared_context_may_be_kept_for_a_day_at_most(keep_s: float) -> None:
    replace(session(), keep_s=keep_s).check_keep()


@pytest.mark.parametrize("keep_s", [-1.0, MAX_KEEP_S + 1, float("nan"), float("inf")])
def test_another_time_is_refused_by_name(keep_s: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        replace(session(), keep_s=keep_s).check_keep()
    assert caught.value.field == "keep_s"


@pytest.mark.parametrize("state", [session(Sharing.ISOLATED), session(Sharing.RESIDUAL, WriterMode.FIRST)])
def test_a_session_that_runs_no_context_pass_keeps_nothing(state: Session) -> None:
    state.check_keep()
    with pytest.raises(InvalidArgument, match="no shared context"):
        replace(state, keep_s=1.0).check_keep()


# --- fork -------------------------------------------------------------------------------------------------------------


def test_a_fork_makes_all_branches_at_once() -> None:
    state = session().fork((spec("a"), spec("b", "critic"), spec("c", None)))
    assert [state.branch(n).adapter for n in "abc"] == [PLANNER, CRITIC, None]
    assert all(state.branch(n).tokens.tolist() == [1, 2, 3] for n in "abc")


def test_branches_take_the_sessions_sharing_unless_they_name_one() -> None:
    state = session(Sharing.RESIDUAL).fork((spec("a"), spec("b", sharing=Sharing.BASE)))
    assert (state.branch("a").sharing, state.branch("b").sharing) == (Sharing.RESIDUAL, Sharing.BASE)


@pytest.mark.parametrize(
    ("specs", "error"),
    [
        ((), InvalidArgument),
        ((spec("a"), spec("")), InvalidArgument),
        ((spec("a"), spec("a")), AlreadyExists),
        ((spec("a"), spec("old")), AlreadyExists),
        ((spec("a"), spec("b", "stranger")), NotFound),
    ],
)
def test_a_fork_is_all_or_nothing(specs: tuple[BranchSpec, ...], error: type[Exception]) -> None:
    state = session().fork((spec("old"),))
    with pytest.raises(error):
        state.fork(specs)
    assert list(state.branches) == ["old"]


def test_a_bad_fork_names_the_field_and_what_there_is() -> None:
    with pytest.raises(InvalidArgument, match="branches"):
        session().fork(())
    with pytest.raises(NotFound, match=r"adapter 'stranger' does not exist.* planner, critic"):
        session().fork((spec("a", "stranger"),))
    with pytest.raises(NotFound, match=r"branch 'nobody' does not exist.* none"):
        session().fork((spec("a"),), parent="nobody")


def test_a_fork_leaves_the_state_before_it_alone() -> None:
    before = session()
    before.fork((spec("a"),))
    assert before.branches == {}


def test_a_branch_forked_with_the_same_adapter_shares_context_and_own_tokens(forked: Session) -> None:
    child = forked.fork((spec("child"),), parent="b").branch("child")
    parent = forked.branch("b")
    assert child.context.tolist() == parent.context.tolist() == [1, 2, 3]
    assert child.own.tolist() == parent.own.tolist() == [10, 11, 20, 21]
    assert (child.adapter, child.sharing) == (parent.adapter, parent.sharing)


def test_a_branch_forked_with_another_adapter_takes_the_parents_tokens_as_context(forked: Session) -> None:
    child = forked.fork((spec("child", "critic"),), parent="b").branch("child")
    assert child.context.tolist() == [1, 2, 3, 10, 11, 20, 21]
    assert child.own.tolist() == []


def test_a_branch_forked_with_another_sharing_shares_no_own_pages(forked: Session) -> None:
    child = forked.fork((spec("child", sharing=Sharing.RESIDUAL),), parent="b").branch("child")
    assert (child.sharing, len(child.context), len(child.own)) == (Sharing.RESIDUAL, 7, 0)


def test_a_child_keeps_its_parents_sharing_unless_it_names_one() -> None:
    state = session(Sharing.EAGER).fork((spec("b", sharing=Sharing.BASE),))
    assert state.fork((spec("child"),), parent="b").branch("child").sharing is Sharing.BASE


def test_a_childs_turns_do_not_answer_for_the_parents_turn_ids(forked: Session) -> None:
    child = forked.fork((spec("child"),), parent="b").branch("child")
    assert [turn.turn_id for turn in child.turns] == [""]
    assert [turn.turn_id for turn in forked.branch("b").turns] == ["t1"]


def test_parent_and_child_go_on_apart(forked: Session) -> None:
    state = forked.fork((spec("child"),), parent="b").finish_turn("child", array([12]), array([22]))
    assert state.branch("b").own.tolist() == [10, 11, 20, 21]
    assert state.branch("child").own.tolist() == [10, 11, 20, 21, 12, 22]


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_turn_appends_what_was_sent_and_what_was_generated(forked: Session) -> None:
    branch = forked.finish_turn("b", array([12]), array([22, 23])).branch("b")
    assert branch.tokens.tolist() == [1, 2, 3, 10, 11, 20, 21, 12, 22, 23]
    assert branch.turns == (Turn(0, 2, 4, "t1"), Turn(4, 5, 7))


def test_tokens_stay_int32(forked: Session) -> None:
    branch = forked.finish_turn("b", np.array([12]), np.array([22])).branch("b")
    assert branch.own.dtype == branch.tokens.dtype == joined(forked, "b").context.dtype == np.int32


def test_an_empty_first_turn_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="append"):
        session().fork((spec("b"),)).branch("b").check_turn(array([]))


def test_an_empty_later_turn_runs_the_last_generated_token(forked: Session) -> None:
    forked.branch("b").check_turn(array([]))


def test_a_fork_of_a_branch_may_begin_with_an_empty_turn_if_it_has_own_tokens(forked: Session) -> None:
    state = forked.fork((spec("same"), spec("other", "critic")), parent="b")
    state.branch("same").check_turn(array([]))
    with pytest.raises(InvalidArgument):
        state.branch("other").check_turn(array([]))


# --- join -------------------------------------------------------------------------------------------------------------


def test_a_join_appends_all_own_tokens_to_the_shared_context(forked: Session) -> None:
    state, count = forked.join("b", JoinWhat.ALL)
    assert count == 4
    assert state.context.tolist() == [1, 2, 3, 10, 11, 20, 21]


def test_a_join_of_the_output_leaves_out_what_was_appended(forked: Session) -> None:
    state = forked.finish_turn("b", array([12]), array([22]))
    state, count = state.join("b", JoinWhat.OUTPUT)
    assert count == 3
    assert state.context.tolist() == [1, 2, 3, 20, 21, 22]


@pytest.mark.parametrize("what", list(JoinWhat))
def test_a_second_join_appends_only_what_is_new(forked: Session, what: JoinWhat) -> None:
    state = joined(forked, "b", what)
    again, count = state.join("b", what)
    assert count == 0
    assert again.context.tolist() == state.context.tolist()
    later, count = state.finish_turn("b", array([12]), array([22])).join("b", JoinWhat.ALL)
    assert count == 2
    assert later.context.tolist() == [*state.context.tolist(), 12, 22]


def test_joins_append_in_order_of_arrival(forked: Session) -> None:
    state = forked.fork((spec("c", "critic"),)).finish_turn("c", array([30]), array([40]))
    assert joined(joined(state, "c"), "b").context.tolist() == [1, 2, 3, 30, 40, 10, 11, 20, 21]
    assert joined(joined(state, "b"), "c").context.tolist() == [1, 2, 3, 10, 11, 20, 21, 30, 40]


def test_existing_branches_keep_their_context_and_new_ones_read_the_join(forked: Session) -> None:
    state = joined(forked, "b").fork((spec("new", "critic"),))
    assert state.branch("b").context.tolist() == [1, 2, 3]
    assert state.branch("b").tokens.tolist() == [1, 2, 3, 10, 11, 20, 21]
    assert state.branch("new").context.tolist() == [1, 2, 3, 10, 11, 20, 21]


def test_a_branch_without_own_tokens_joins_nothing() -> None:
    state, count = session().fork((spec("b"),)).join("b", JoinWhat.OUTPUT)
    assert count == 0
    assert state.context.tolist() == [1, 2, 3]


def test_a_child_joins_what_it_added_since_its_own_fork(forked: Session) -> None:
    """Its parent's tokens are its parent's to join: a join of both must not append them twice."""
    state = forked.fork((spec("child"),), parent="b").finish_turn("child", array([12]), array([22]))
    assert state.join("child", JoinWhat.ALL)[1] == 2
    assert state.join("child", JoinWhat.OUTPUT)[1] == 1
    both = joined(joined(state, "b"), "child")
    assert both.context.tolist() == [1, 2, 3, 10, 11, 20, 21, 12, 22]


def test_a_join_of_an_unknown_branch_is_refused() -> None:
    with pytest.raises(NotFound, match="branch 'b'"):
        session().join("b", JoinWhat.ALL)


# --- first writer -----------------------------------------------------------------------------------------------------


def test_the_first_adapter_to_fork_writes() -> None:
    state = session(Sharing.RESIDUAL, WriterMode.FIRST).fork((spec("base", None), spec("a", "critic"), spec("b")))
    assert state.first_writer == CRITIC
    assert state.fork((spec("c"),)).first_writer == CRITIC


def test_the_base_model_is_never_the_first_writer() -> None:
    assert session(Sharing.RESIDUAL, WriterMode.FIRST).fork((spec("base", None),)).first_writer is None


def test_an_alora_is_never_the_first_writer() -> None:
    alora = AdapterRef("checker", AdapterDigest("x"), (5, 6))
    state = replace(session(Sharing.RESIDUAL, WriterMode.FIRST), adapters=(alora, CRITIC))
    state = state.fork((spec("a", "checker"),))
    assert state.first_writer is None
    assert state.fork((spec("b", "critic"),)).first_writer == CRITIC


def test_under_the_canonical_writer_nobody_is_first() -> None:
    assert session(Sharing.RESIDUAL).fork((spec("a"),)).first_writer is None


@pytest.mark.parametrize(
    ("sharing", "writer", "expected"),
    [
        (Sharing.EAGER, WriterMode.CANONICAL, True),
        (Sharing.BASE, WriterMode.FIRST, True),
        (Sharing.RESIDUAL, WriterMode.CANONICAL, True),
        (Sharing.RESIDUAL, WriterMode.FIRST, False),
        (Sharing.ISOLATED, WriterMode.CANONICAL, False),
    ],
)
def test_the_base_model_runs_the_context_by_itself_where_it_is_shared_and_canonical(
    sharing: Sharing, writer: WriterMode, expected: bool
) -> None:
    assert session(sharing, writer).needs_context_pass is expected


# --- busy branches ----------------------------------------------------------------------------------------------------


def test_a_second_turn_on_a_busy_branch_is_aborted() -> None:
    busy = BusyBranches()
    busy.start_turn("s", "b")
    with pytest.raises(Aborted, match="'b'"):
        busy.start_turn("s", "b")


def test_a_branch_is_free_again_when_its_turn_ends() -> None:
    busy = BusyBranches()
    busy.start_turn("s", "b")
    busy.end_turn("s", "b")
    busy.check_idle("s", "b")
    busy.start_turn("s", "b")


def test_branches_of_one_name_in_two_sessions_do_not_meet() -> None:
    busy = BusyBranches()
    busy.start_turn("s", "b")
    busy.start_turn("other", "b")
    busy.start_turn("s", "c")
    busy.end_turn("other", "b")
    with pytest.raises(FailedPrecondition, match="Join it when"):
        busy.check_idle("s", "b")


def test_a_session_is_idle_when_no_branch_runs() -> None:
    busy = BusyBranches()
    busy.start_turn("s", "c")
    busy.start_turn("s", "b")
    busy.check_session_idle("other")
    with pytest.raises(FailedPrecondition, match="b, c"):
        busy.check_session_idle("s")


def test_ending_a_turn_twice_does_no_harm() -> None:
    busy = BusyBranches()
    busy.end_turn("s", "b")
    busy.check_idle("s", "b")


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_session_crosses_processes(forked: Session) -> None:
    copy = pickle.loads(pickle.dumps(forked))
    assert copy.branch("b").tokens.tolist() == forked.branch("b").tokens.tolist()
    assert copy.adapters == forked.adapters


def test_a_branch_cannot_be_changed_in_place() -> None:
    branch = Branch("b", None, Sharing.EAGER, array([1]))
    with pytest.raises(AttributeError):
        branch.name = "c"  # type: ignore[misc]
    assert replace(branch, name="c").name == "c"

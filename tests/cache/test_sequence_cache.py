"""Pages of sequences. ``World.run`` checks every read and write; these tests state how much is found and kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.cache.kv_world import Branch, World

CONTEXT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # two and a half pages of four
OWN = (11, 12, 13, 14, 15)


@pytest.fixture
def world() -> World:
    return World(page_size=4, num_slabs=32)


def agent(adapter: str | None = "a", sharing: str = "eager", own: tuple[int, ...] = OWN) -> Branch:
    return Branch(CONTEXT, own, adapter, sharing)


def pinned(world: World) -> int:
    return sum(pool.num_pinned for pool in world.manager.pools())


def base_pages(world: World) -> int:
    return world.kv.pool.num_allocated(None)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
def test_a_repeated_prompt_runs_its_last_token_alone(world: World, num_tokens: int) -> None:
    branch = Branch((), tuple(range(num_tokens)), "a", "isolated")
    assert world.run(branch) == 0
    assert world.run(branch) == num_tokens - 1


def test_the_next_turn_starts_where_the_last_one_ended(world: World) -> None:
    branch = agent()
    world.run(branch, generated=(20, 21, 22))
    history = (*OWN, 20, 21, 22)
    assert world.run(replace(branch, own=(*history, 30, 31))) == len(CONTEXT) + len(history)


def test_the_last_generated_token_runs_with_the_next_turn(world: World) -> None:
    branch = agent()
    assert world.prepare(branch)
    turn = world.open_turn(branch, room=1)
    assert turn is not None
    world.step_turn(turn)
    assert world.generate(turn, 20)  # sampled, but never run
    world.drop_turn(turn)
    assert world.run(replace(branch, own=(*OWN, 20, 30))) == len(CONTEXT) + len(OWN)


@pytest.mark.parametrize("adapter", ["a", "c", "n"])
@pytest.mark.parametrize("sharing", ["eager", "residual", "base"])
def test_a_fork_starts_at_its_own_tokens(world: World, adapter: str, sharing: str) -> None:
    assert world.run(agent(adapter, sharing)) == len(CONTEXT)


def test_two_branches_of_one_adapter_share_their_common_own_tokens(world: World) -> None:
    world.run(agent(own=(11, 12, 13, 14, 15)))
    assert world.run(agent(own=(11, 12, 13, 99, 98))) == len(CONTEXT) + 3


@pytest.mark.parametrize(
    "other",
    [
        agent("b"),
        agent("a", "residual"),
        agent("a", "base"),
        replace(agent(), namespace="rival"),
        replace(agent("a", "residual"), writer="a"),
    ],
)
def test_own_pages_serve_nobody_else(world: World, other: Branch) -> None:
    world.run(agent())
    assert world.run(other) == len(CONTEXT)  # what its own context passes wrote, and no more


def test_own_tokens_in_the_page_of_the_fork_point_are_found_too(world: World) -> None:
    world.run(agent(own=(11, 12, 13)))
    assert world.run(agent(own=(11, 99, 98))) == len(CONTEXT) + 1


def test_the_page_of_a_fork_point_serves_no_other_context_of_that_length(world: World) -> None:
    """Same whole blocks, same length, another tail: less than the context's own tail is no help."""
    world.run(agent())
    assert world.run(replace(agent(), context=(*CONTEXT[:-1], 99))) == len(CONTEXT)


def test_another_fork_point_finds_no_own_pages_of_the_first(world: World) -> None:
    world.run(Branch((1, 2, 3, 4), (5, 6, 7, 8, 9), "a", "eager"))
    assert world.run(Branch((1, 2, 3, 4, 5), (6, 7, 8, 9), "a", "eager")) == 5


@pytest.mark.parametrize("adapter", ["b", None])
def test_isolated_pages_serve_no_other_adapter(world: World, adapter: str | None) -> None:
    world.run(agent("a", "isolated"))
    assert world.run(agent(adapter, "isolated")) == 0


def test_the_base_model_reads_the_shared_context_and_what_it_wrote_itself(world: World) -> None:
    assert world.prepare(agent())
    assert world.run(agent(adapter=None)) == len(CONTEXT)
    assert world.context_is_here(replace(agent(sharing="base"), context=CONTEXT + OWN))


def test_a_tail_is_copied_up_to_the_first_token_that_differs(world: World) -> None:
    world.run(Branch((), (1, 2, 3, 4, 5, 6, 7), "a", "isolated"))
    turn = world.open_turn(Branch((), (1, 2, 3, 4, 5, 6, 9, 9), "a", "isolated"))
    assert turn is not None
    assert turn.lease.tail is not None
    assert (turn.computed, turn.lease.tail.num_tokens, turn.lease.tail.is_context) == (6, 2, False)


def test_a_context_tail_comes_with_the_residual_to_merge(world: World) -> None:
    assert world.prepare(agent("c"))
    turn = world.open_turn(agent("c"))
    assert turn is not None
    assert turn.lease.tail is not None
    assert turn.lease.tail.is_context
    assert turn.lease.tail.residual is not None
    assert turn.lease.tail.residual.key.rank_class == 16


def test_a_context_that_ends_on_a_page_border_has_no_tail_to_copy(world: World) -> None:
    branch = Branch(CONTEXT[:8], OWN, "a", "eager")
    assert world.prepare(branch)
    turn = world.open_turn(branch)
    assert turn is not None
    assert turn.lease.tail is None


def test_a_hash_collision_serves_nothing_and_files_nothing(world: World) -> None:
    world.run(Branch((), (1, 2, 3, 4, 5), "a", "isolated"))
    held = base_pages(world)
    forged = Branch((), (1, 2, 3, 4, 5), "a", "isolated").key(4)
    tokens = np.array((9, 9, 9, 9, 9), dtype=np.int32)
    lease = world.manager.open_sequence(forged, tokens, 5, 0, None)
    assert lease is not None
    assert lease.num_computed == 0
    world.manager.commit(lease, 5)
    assert lease.is_detached
    world.manager.release(lease)
    assert base_pages(world) == held
    world.check()
    assert world.run(Branch((), (1, 2, 3, 4, 5), "a", "isolated")) == 4


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_turn_released_before_its_first_step_leaves_no_uncopied_tail(world: World) -> None:
    """The tail's tokens count as computed from the start, but their page is written by the first step alone."""
    world.run(Branch((), (1, 2, 3, 4), "a", "isolated"))
    held = base_pages(world)
    turn = world.open_turn(Branch((), (1, 2, 9, 9), "a", "isolated"))
    assert turn is not None
    assert turn.computed == 2
    world.drop_turn(turn)
    assert base_pages(world) == held
    world.run(Branch((), (1, 2, 8, 8), "a", "isolated"))


def test_a_fork_released_before_its_first_step_leaves_no_unmerged_context_tail(world: World) -> None:
    assert world.prepare(agent())
    turn = world.open_turn(agent())
    assert turn is not None
    world.drop_turn(turn)
    world.run(agent())


def test_a_preempted_turn_goes_on_where_it_stopped(world: World) -> None:
    """Generated blocks are beyond the request's own hashes; they are found all the same."""
    branch = Branch((), (1, 2, 3), "a", "isolated")
    turn = world.open_turn(branch, room=8)
    assert turn is not None
    world.step_turn(turn)
    for token in range(20, 28):
        assert world.generate(turn, token)
        world.step_turn(turn)
    world.drop_turn(turn)
    found = world.manager.open_sequence(branch.key(4), turn.tokens, turn.num_tokens, 0, None)
    assert found is not None
    assert found.num_computed == turn.num_tokens - 1
    assert found.num_blocks_in_tree == 2  # shared with what it left behind, not copied


def test_two_sequences_that_compute_the_same_block_keep_one_page(world: World) -> None:
    branch = Branch((), (1, 2, 3, 4, 5, 6, 7, 8, 9), "a", "isolated")
    turns = [world.open_turn(branch) for _ in range(2)]
    for turn in turns:
        assert turn is not None
        world.step_turn(turn)
    world.check()
    pages = [turn.lease.pages.tolist() for turn in turns if turn is not None]
    assert pages[0][:2] == pages[1][:2]
    assert pages[0][2] != pages[1][2]


def test_a_cancelled_turn_keeps_what_it_has_computed(world: World) -> None:
    branch = Branch((), tuple(range(11)), "a", "isolated")
    turn = world.open_turn(branch)
    assert turn is not None
    world.step_turn(turn, 6)
    world.drop_turn(turn)
    assert pinned(world) == 0
    assert world.run(branch) == 6


def test_the_same_tail_is_cached_once(world: World) -> None:
    branch = Branch((), (1, 2, 3), "a", "isolated")
    world.run(branch)
    held = base_pages(world)
    world.run(branch)
    assert base_pages(world) == held


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_sequence_claims_pages_for_its_whole_prompt(world: World) -> None:
    turn = world.open_turn(Branch((), tuple(range(9)), "a", "isolated"))
    assert turn is not None
    assert len(turn.lease.pages) == 3
    assert pinned(world) == 3


def test_a_refused_sequence_claims_nothing_and_evicts_nothing() -> None:
    world = World(page_size=4, num_slabs=4)  # eight base pages
    world.run(Branch((), (1, 2, 3, 4, 5), "b", "isolated"))
    running = world.open_turn(Branch((), tuple(range(20)), "a", "isolated"))
    assert running is not None
    assert world.open_turn(Branch((), tuple(range(30, 50)), "a", "isolated")) is None
    assert world.manager.num_leases == 1
    assert world.manager.num_evictions == 0
    assert pinned(world) == 5


def test_growth_that_finds_no_page_changes_nothing() -> None:
    world = World(page_size=4, num_slabs=1)
    turn = world.open_turn(Branch((), tuple(range(8)), "a", "isolated"), room=4)
    assert turn is not None
    assert not world.manager.grow(turn.lease, 9)
    assert len(turn.lease.pages) == 2
    world.check()


def test_growth_within_the_last_page_needs_no_room() -> None:
    world = World(page_size=4, num_slabs=1)
    turn = world.open_turn(Branch((), tuple(range(6)), "a", "isolated"), room=2)
    assert turn is not None
    assert world.manager.grow(turn.lease, 8)
    assert len(turn.lease.pages) == 2


def test_growth_beyond_the_token_buffer_is_an_error_that_leaks_no_page(world: World) -> None:
    turn = world.open_turn(Branch((), (1, 2, 3), "a", "isolated"))
    assert turn is not None
    with pytest.raises(ValueError, match="room for 3"):
        world.manager.grow(turn.lease, 5)
    world.check()


def test_a_lease_is_released_once(world: World) -> None:
    turn = world.open_turn(agent("a", "isolated"))
    assert turn is not None
    world.drop_turn(turn)
    with pytest.raises(ValueError, match="twice"):
        world.manager.release(turn.lease)


def test_what_a_running_turn_reads_is_not_evicted() -> None:
    world = World(page_size=4, num_slabs=8)
    assert world.prepare(agent())
    turn = world.open_turn(agent())
    assert turn is not None
    for first in range(100, 200, 10):
        world.open_turn(Branch((), tuple(range(first, first + 9)), "b", "isolated"))
        world.check()
    world.step_turn(turn)
    world.check()

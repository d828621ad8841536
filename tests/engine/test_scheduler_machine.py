"""A stateful test of engine, scheduler and cache together: whatever happens, tokens follow the semantics.

Random sessions of two tenants over a tiny pool and a small vocabulary (prefixes collide all the time), with context
passes, forks, turns, joins, cancels, deadlines and adapter reloads; fewer device slots than adapters, a host tier that
holds some or none of them, reads that take steps, and files that change on disk. Every finished turn must equal the
page-free recurrence, every request must end, and nothing may be held then. In half of the runs slabs are wide, so that whole
K finds room and is given back all the time: what the fake reads of it must be what pages say (``fake_kv_memory``).
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forkkv_cluster.core.errors import Cancelled, DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted
from forkkv_cluster.core.request import Priority
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

SHARINGS = ("isolated", "residual", "eager", "base")
ADAPTERS = ("a8", "b8", "c16", "n0", "v8", None)
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5)


def path_of(name: str) -> str:
    return f"fake:{name}:{name[1:]}"


class EngineMachine(RuleBasedStateMachine):
    """``expected``: request id -> what it must answer; ``histories``: (context, own so far, adapter, sharing) of branches."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_slabs=st.integers(40, 60),
        is_slab_wide=st.booleans(),
        num_host_slabs=st.sampled_from([0, 4, 100]),
        batch=st.sampled_from([3, 8, 64]),
        slots=st.sampled_from([1, 2, 4]),
        host_bytes=st.sampled_from([0, 200, 400]),
        load_delay=st.sampled_from([0, 3]),
        overtakes=st.sampled_from([0, 1, 8]),
    )
    def start(
        self,
        page_size: int,
        num_slabs: int,
        is_slab_wide: bool,
        num_host_slabs: int,
        batch: int,
        slots: int,
        host_bytes: int,
        load_delay: int,
        overtakes: int,
    ) -> None:
        self.fake = FakeEngine(
            page_size=page_size,
            num_slabs=num_slabs // 3 if is_slab_wide else num_slabs,
            rank_classes=(8, 16, 128) if is_slab_wide else (8, 16),
            merged_share=1.0,
            num_host_slabs=num_host_slabs,
            max_device_adapters=slots,
            host_bytes=host_bytes,
            load_delay=load_delay,
            max_num_batched_tokens=batch,
            max_prefill_tokens_beside_decodes=max(1, batch // 2),
            max_num_seqs=4,
            max_overtakes=overtakes,
        )
        self.was_changed: set[str] = set()
        self.contexts: list[list[int]] = [[0, 1, 2, 0, 1, 2, 0]]
        self.expected: dict[str, list[int]] = {}
        self.excused: set[str] = set()
        self.histories: list[tuple[list[int], list[int], str | None, str]] = []

    @rule(tail=tokens)
    def extend_a_context(self, tail: list[int]) -> None:
        self.contexts.append([*self.contexts[-1], *tail][:40])

    @rule(data=st.data(), declared=st.sets(st.sampled_from(["a8", "b8", "c16", "n0", "v8"])))
    def run_a_context_pass(self, data: st.DataObject, declared: set[str]) -> None:
        context = data.draw(st.sampled_from(self.contexts))
        sharing = data.draw(st.sampled_from(["eager", "base", "residual"]))
        self._add(self.fake.context_request(context, sorted(declared), sharing), [])

    @rule(data=st.data(), own=tokens, adapter=st.sampled_from(ADAPTERS), sharing=st.sampled_from(SHARINGS))
    def fork_and_run_a_turn(self, data: st.DataObject, own: list[int], adapter: str | None, sharing: str) -> None:
        context = data.draw(st.sampled_from(self.contexts))
        self._turn(context, own, adapter, sharing, data)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), appended=tokens)
    def run_another_turn(self, data: st.DataObject, appended: list[int]) -> None:
        context, own, adapter, sharing = data.draw(st.sampled_from(self.histories))
        self._turn(context, [*own, *appended][:30], adapter, sharing, data)

    def _turn(self, context: list[int], own: list[int], adapter: str | None, sharing: str, data: st.DataObject) -> None:
        max_tokens = data.draw(st.integers(1, 6))
        declared = data.draw(st.sets(st.sampled_from(["a8", "b8", "c16", "v8"])))
        writer = None
        if sharing == "residual" and adapter is not None:
            writer = data.draw(st.sampled_from([None, "a8", "b8"]))
        expected = expected_tokens(
            context,
            own,
            adapter,
            sharing,
            max_tokens,
            vocab_size=97,
            has_residual=adapter != "n0",
            writer=writer,
            invocation=[1, 2] if adapter == "v8" else None,
        )
        num_resumed = data.draw(st.integers(0, max_tokens - 1))
        request = self.fake.request(
            context,
            own,
            adapter,
            sharing,
            max_tokens=max_tokens,
            declared=sorted(declared),
            writer=writer,
            resumed=expected[:num_resumed],
            deadline_s=data.draw(st.sampled_from([None, self.fake.clock.wall() + 50])),
            tenant=data.draw(st.sampled_from(["one", "two"])),
            priority=data.draw(st.sampled_from(Priority)),
        )
        self._add(request, expected[num_resumed:])
        if writer is None:
            self.histories.append((context, [*own, *(t % 3 for t in expected)], adapter, sharing))

    def _add(self, request: object, expected: list[int]) -> None:
        try:
            request_id = self.fake.add(request)  # type: ignore[arg-type]
        except InvalidArgument as refused:
            if refused.field != "tokens":
                raise
            return  # more than an empty pool holds
        self.expected[request_id] = expected

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.fake.step()

    @rule(
        data=st.data(),
        adapters=st.lists(st.sampled_from(["a8", "b8", "c16"]), min_size=1, max_size=3),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    )
    def ask_for_long_answers(self, data: st.DataObject, adapters: list[str], own: list[int]) -> None:
        """Over one context, whose whole K is worth making then; where ``own`` takes several steps, those before the last have
        no logits and leave it half made."""
        context = data.draw(st.sampled_from(self.contexts))
        for adapter in adapters:
            expected = expected_tokens(context, own, adapter, "eager", 12, vocab_size=97)
            self._add(self.fake.request(context, own, adapter, "eager", max_tokens=12, declared=adapters), expected)

    @rule(count=st.integers(1, 60))
    def evict_what_nobody_uses(self, count: int) -> None:
        """Free slabs, which whole K may borrow: a pool full of cached pages has none."""
        for _ in range(count):
            self.fake.engine._kv._memory.tree.evict_oldest()
        self.fake.engine.check_invariants()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        self.fake.engine.abort(request_id)  # type: ignore[arg-type]
        self.excused.add(request_id)

    @rule(copied=st.sampled_from([1, 10**12]))
    def measure_copies_that_are_much_slower_or_faster_than_prefill(self, copied: int) -> None:
        estimate = self.fake.engine._kv.swap_estimate
        if estimate is not None:
            estimate.copied_bytes.note(copied, 1.0)
            estimate.prefilled_tokens.note(1000, 1.0)

    @rule(seconds=st.sampled_from([1, 60]))
    def let_time_pass(self, seconds: int) -> None:
        self.fake.clock.advance(seconds)
        self.excused |= set(self.expected) - set(self.fake.last)

    @rule(name=st.sampled_from(["a8", "c16"]))
    def reload_an_adapter(self, name: str) -> None:
        self.fake.runner.changed_files.pop(path_of(name), None)
        self.fake.engine.unload_adapter(name)
        self.fake.engine.load_adapter(name, path_of(name))

    @rule(name=st.sampled_from(["a8", "b8"]))
    def change_the_files_of_an_adapter(self, name: str) -> None:
        self.fake.runner.changed_files[path_of(name)] = f"fake:{name}-retrained:8"
        self.was_changed.add(name)

    @rule()
    def restore_all_files(self) -> None:
        self.fake.runner.changed_files.clear()

    @rule()
    def drain(self) -> None:
        self.fake.drain()
        status = self.fake.engine.status()
        assert (status.num_running, status.num_waiting, status.num_pinned_pages) == (0, 0, 0)
        assert all(pool.num_free + pool.num_cached == pool.num_total for pool in status.pools)
        assert set(self.expected) == set(self.fake.last) | set(self.fake.errors)
        memory = status.adapter_memory
        assert (memory.num_pinned, memory.num_registered) == (0, len(self.fake.adapters))
        assert memory.num_on_device == self.fake.runner.num_adapters <= memory.max_on_device
        assert memory.host_bytes == 100 * memory.num_on_host <= memory.max_host_bytes

    @invariant()
    def finished_turns_follow_the_semantics(self) -> None:
        if not hasattr(self, "fake"):
            return
        for request_id in self.fake.last:
            assert self.fake.outputs[request_id] == self.expected[request_id]
        for request_id, error in self.fake.errors.items():
            if isinstance(error, FailedPrecondition):
                assert any(f"the files of adapter '{name}'" in error.message for name in self.was_changed)
                continue
            assert request_id in self.excused, error
            assert isinstance(error, Cancelled | DeadlineExceeded | ResourceExhausted)

    def teardown(self) -> None:
        if hasattr(self, "fake"):
            self.drain()
            self.finished_turns_follow_the_semantics()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

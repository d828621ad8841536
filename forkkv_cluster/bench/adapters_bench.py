"""Many adapters over few device slots: waiting times by the number of active adapters, and what is left after it.

Clients in a closed loop: each sends a request, waits for its end, sends the next. Requests go round the active adapters,
whose prompts share nothing, so that what differs between two rows is the adapters alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from forkkv_cluster.bench.measurement import Measurement
from forkkv_cluster.bench.trace import generate_tokens
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.request import AdapterRef, SamplingParams
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.engine.engine import Engine

FAIR_ROUNDS = 2.0
"""A request that waits longer than this many fair rounds counts as starved. A fair round is the wall time over the number
of requests of one client: what each waits for its next one at most when all take turns."""


@dataclass(frozen=True, slots=True)
class Load:
    """``num_clients`` send ``num_rounds`` requests each."""

    num_clients: int = 64
    num_rounds: int = 4
    prompt_len: int = 32
    max_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Times in seconds; TTFT counts from when the client sends.

    most_overtaken   of all requests, the most that were sent later and had their first token earlier
    """

    num_active: int
    num_slots: int
    num_requests: int
    wall_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float
    output_tokens_per_s: float
    disk_loads: int
    device_evictions: int
    most_overtaken: int
    fair_round_s: float


@dataclass(slots=True)
class _Sent:
    number: int
    sent_s: float
    first_s: float | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class _Run:
    """The requests of one row, live and ended."""

    live: dict[str, _Sent] = field(default_factory=dict)
    ended: list[_Sent] = field(default_factory=list)


class AdaptersBench:
    """One engine with many registered adapters. ``block_size`` is its page size."""

    def __init__(self, engine: Engine, adapters: Sequence[AdapterRef], block_size: int, load: Load) -> None:
        self.engine = engine
        self._adapters = adapters
        self._load = load
        self._builder = RequestBuilder(engine.model_info, block_size=block_size, namespace_of=lambda tenant, group: tenant)
        self._num_sent = 0

    def row(self, num_active: int) -> Row:
        """Run the load over ``num_active`` adapters, spread over all that are registered. Raises Internal for a request
        that does not end as it should."""
        before = self.engine.status().adapter_memory
        stride = len(self._adapters) // num_active
        active = [self._adapters[index * stride] for index in range(num_active)]
        run, started_s = _Run(), time.perf_counter()
        for _ in range(self._load.num_clients):
            self._send(run, active)
        num_requests = self._load.num_clients * self._load.num_rounds
        while run.live:
            for _ in range(self._step(run)):
                if len(run.live) + len(run.ended) < num_requests:
                    self._send(run, active)
        wall_s = time.perf_counter() - started_s
        after = self.engine.status().adapter_memory
        ttft_s = [sent.first_s - sent.sent_s for sent in run.ended if sent.first_s is not None]
        p50_s, p99_s = np.percentile(ttft_s, [50, 99])
        return Row(
            num_active,
            after.max_on_device,
            len(run.ended),
            wall_s,
            float(p50_s),
            float(p99_s),
            max(ttft_s),
            sum(sent.num_tokens for sent in run.ended) / wall_s,
            after.disk_loads - before.disk_loads,
            after.device_evictions - before.device_evictions,
            most_overtaken([(sent.number, sent.first_s) for sent in run.ended if sent.first_s is not None]),
            wall_s / self._load.num_rounds,
        )

    def _send(self, run: _Run, active: Sequence[AdapterRef]) -> None:
        adapter = active[(len(run.live) + len(run.ended)) % len(active)]
        self._num_sent += 1
        tokens = generate_tokens(self._num_sent, self._load.prompt_len, self.engine.model_info.vocab_size)
        sampling = SamplingParams(max_tokens=self._load.max_tokens, temperature=0.0, ignore_eos=True)
        request = self._builder.prompt(tokens, adapter, PromptSharing(), sampling, Envelope(new_id("bench"), "bench"))
        run.live[request.request_id] = _Sent(self._num_sent, time.perf_counter())
        self.engine.add_request(request)

    def _step(self, run: _Run) -> int:
        """One step; how many requests ended in it."""
        output, num_ended = self.engine.step(), 0
        now_s = time.perf_counter()
        for failure in output.failures:
            raise Internal(f"request {failure.request_id} failed: {failure.error.message}")
        for chunk in output.chunks:
            sent = run.live[chunk.request_id]
            sent.first_s = now_s if sent.first_s is None else sent.first_s
            sent.num_tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                num_ended += 1
                run.ended.append(run.live.pop(chunk.request_id))
                if sent.num_tokens != self._load.max_tokens:
                    raise Internal(f"request {chunk.request_id} ended after {sent.num_tokens} tokens.")
        return num_ended

    def leaks(self, names: Sequence[str]) -> list[Measurement]:
        """What the idle engine holds; then every adapter is unloaded, after which nothing may be left of any."""
        self.engine.check_invariants()
        status = self.engine.status()
        unaccounted = sum(pool.num_total - pool.num_free - pool.num_cached for pool in status.pools)
        for name in names:
            self.engine.unload_adapter(name)
        left = self.engine.status().adapter_memory
        return [
            Measurement("requests left over", status.num_running + status.num_waiting, "", at_most=0),
            Measurement("pages neither free nor cached", unaccounted, "", at_most=0),
            Measurement("slots held by nobody", status.adapter_memory.num_pinned, "", at_most=0),
            Measurement("adapters left after unloading all", left.num_registered + left.num_on_device, "", at_most=0),
            Measurement("adapter bytes left, device and host", left.device_bytes + left.host_bytes, "B", at_most=0),
        ]


def most_overtaken(firsts: Sequence[tuple[int, float]]) -> int:
    """(number in order of sending, time of the first token) -> the most later ones that were served before any one."""
    numbers = np.array([number for number, _ in sorted(firsts, key=lambda first: (first[1], first[0]))])
    return max((int((numbers[:place] > number).sum()) for place, number in enumerate(numbers)), default=0)


def verdicts(rows: Sequence[Row]) -> list[Measurement]:
    """No starvation, and no cliff: twice the adapters cost at most half of the throughput, beyond the slots as before."""
    waits = max(row.ttft_max_s / row.fair_round_s for row in rows)
    measurements = [Measurement("longest wait over a fair round", waits, "x", at_most=FAIR_ROUNDS)]
    for one, two in itertools.pairwise(rows):
        if one.num_slots == two.num_slots and two.num_active == 2 * one.num_active:
            kept = two.output_tokens_per_s / one.output_tokens_per_s
            name = f"throughput, {two.num_active} active over {one.num_active}"
            measurements.append(Measurement(name, kept, "x", at_least=0.5))
    return measurements


def rows_table(rows: Sequence[Row], num_registered: int) -> Table:
    """``read``: adapters that came from disk; ``overtaken``: by how many later requests, at most."""
    title = f"{num_registered:,} adapters registered; TTFT in milliseconds"
    table = Table("active", "slots", "p50", "p99", "max", "tokens/s", "read", "evicted", "overtaken", title=title)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        times = (f"{1000 * s:,.0f}" for s in (row.ttft_p50_s, row.ttft_p99_s, row.ttft_max_s))
        counts = (f"{n:,}" for n in (row.disk_loads, row.device_evictions, row.most_overtaken))
        table.add_row(str(row.num_active), str(row.num_slots), *times, f"{row.output_tokens_per_s:,.0f}", *counts)
    return table


def run_rows(
    make_bench: Callable[[int], AdaptersBench], active: Sequence[int], num_slots: int, names: Sequence[str],
    on_row: Callable[[str], None] = lambda name: None,
) -> tuple[list[Row], list[Measurement]]:  # fmt: skip
    """A row for each number of active adapters with few slots, then the largest with a slot for each; and the verdicts."""
    rows: list[Row] = []
    leaks: list[Measurement] = []
    for slots, counts in ((num_slots, active), (max(active), active[-1:])):
        bench = make_bench(slots)
        for count in counts:
            on_row(f"{count} active adapters, {slots} slots")
            rows.append(bench.row(count))
        leaks = leaks or bench.leaks(names)
    return rows, [*verdicts(rows), *leaks]


def rows_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]

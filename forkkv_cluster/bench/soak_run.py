"""``forkkv bench soak``: the driver on a small random model for some minutes, with readings of the process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forkkv_cluster.bench.environment import commit, host_info
from forkkv_cluster.bench.soak import SoakDriver
from forkkv_cluster.bench.soak_ledger import SoakFailure
from forkkv_cluster.bench.soak_plan import SoakPlan
from forkkv_cluster.bench.soak_process import ProcessWatch, read_process
from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.config import ClusterConfig, SchedulerConfig, parse_config
from forkkv_cluster.core.request import Guide, GuideKind
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, TinyKit, TinyModelSpec, build_tiny_kit, save_alora_adapter

WARM_UP = 0.2
"""Share of the run that memory is not judged by."""
MIN_ROUNDS_FOR_COVERAGE = 3000
GUIDES = (Guide(GuideKind.REGEX, "[a-z]{1,12}"), Guide(GuideKind.JSON_SCHEMA, '{"type": "integer"}'))

INVOCATION = (41, 42, 41)
"""Of the aLoRA: it overlaps with itself."""

SPEC = TinyModelSpec(
    hidden_size=64, intermediate_size=128, num_layers=2, head_dim=16, vocab_size=2048, max_position=4096, adapter_strength=0.5
)
"""Small, as steps count, not tokens; 512 bytes of base KV a token, so that the default pool holds 896 tokens."""

OnSettled = Callable[["SoakRun"], None]


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """``max_growth_bytes``: what the process may grow by after warm-up."""

    seed: int = 0
    minutes: float = 30.0
    kv_bytes: int = 448 * 2**10
    page_size: int = 8
    max_growth_bytes: int = 48 * 2**20


class SoakRun:
    """Rounds until the time is up; then, or at the first broken promise, a report."""

    def __init__(self, driver: SoakDriver, options: SoakOptions, clock: Clock | None = None) -> None:
        self.driver = driver
        self.options = options
        self.watch = ProcessWatch(options.max_growth_bytes)
        self.failure: SoakFailure | None = None
        self._clock = clock or SystemClock()
        self._started_s = self._clock.monotonic()
        self._is_warm = False

    @property
    def elapsed_s(self) -> float:
        return self._clock.monotonic() - self._started_s

    def run(self, on_settled: OnSettled = lambda run: None) -> dict[str, Any]:
        """The report; ``failure`` is set when something is wrong."""
        try:
            self._run_until_time_is_up(on_settled)
            self.watch.check_growth()
            self.check_coverage()
        except SoakFailure as failure:
            self.failure = failure
        except Exception as error:  # a crash is a finding like any other, and of no use without its seed
            self.failure = SoakFailure("no crash", "".join(traceback.format_exception(error)))
        return self.report()

    def _run_until_time_is_up(self, on_settled: OnSettled) -> None:
        while True:
            for _ in range(self.driver.plan.check_every):
                self.driver.round()
            self._settle()
            on_settled(self)
            if self.elapsed_s >= self.options.minutes * 60:
                return

    def _settle(self) -> None:
        self.driver.settle()
        self.watch.take(read_process(self.elapsed_s))
        if not self._is_warm and self.elapsed_s >= self.options.minutes * 60 * WARM_UP:
            self._is_warm = True
            self.watch.end_warm_up()

    def check_coverage(self) -> None:
        """A long run in which something never happened has shown nothing about it. Raises SoakFailure."""
        if self.driver.num_rounds < MIN_ROUNDS_FOR_COVERAGE:
            return
        counters = self.driver.engine.status().counters
        happened = {
            "evictions": counters.evictions,
            "preemptions": counters.preemptions,
            "copies on write": counters.cow_copies,
            "requests cancelled": self.driver.ledger.ends["cancelled"],
            "requests expired": self.driver.ledger.ends["expired"],
            "refusals for overload": self.driver.actions["refused: overload"],
            "refusals for an adapter that is gone": self.driver.actions["refused: adapter is gone"],
            "requests by an invoked aLoRA": self.driver.ledger.num_invoked,
            "prompts scored": self.driver.ledger.num_scored,
            "outputs compared": self.driver.replay.num_tokens,
        }
        if missing := [name for name, count in happened.items() if not count]:
            raise SoakFailure("coverage", f"never happened in {self.driver.num_rounds} rounds: {', '.join(missing)}")

    def report(self) -> dict[str, Any]:
        driver, replay = self.driver, self.driver.replay
        return {
            "host": host_info(),
            "commit": commit(),
            "options": asdict(self.options),
            "passed": self.failure is None,
            "failed_check": None if self.failure is None else self.failure.check,
            "failure": None if self.failure is None else self.failure.message,
            "elapsed_s": self.elapsed_s,
            "num_rounds": driver.num_rounds,
            "num_accepted": driver.ledger.num_accepted,
            "num_invoked": driver.ledger.num_invoked,
            "num_scored": driver.ledger.num_scored,
            "ends": dict(sorted(driver.ledger.ends.items())),
            "actions": dict(sorted(driver.actions.items())),
            "checks": dict(sorted(driver.checks.items())),
            "outputs": {
                "requests": replay.num_requests,
                "tokens": replay.num_tokens,
                "ties": replay.num_ties,
                "prompt_tokens": replay.num_scored,
            },
            "counters": asdict(driver.engine.status().counters),
            "process": self.watch.to_json(),
        }


def make_run(options: SoakOptions, directory: Path) -> SoakRun:
    """The driver over a small random model, built into ``directory``. Each adapter's name has two contents, one an aLoRA."""
    kit = build_tiny_kit(directory / "kit", num_adapters=2 * len(ADAPTER_NAMES), spec=SPEC)
    config = _config(kit, options.kv_bytes, options.page_size, SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=96, max_num_waiting=24))  # fmt: skip
    # Another chunk size and no shortage: neither may change a token.
    alone = _config(kit, 8 * 2**20, options.page_size, SchedulerConfig())
    clock = ManualClock()
    contents = {name: (str(kit.adapter_dirs[name]), str(kit.adapter_dirs[f"{name}-2"])) for name in ADAPTER_NAMES}
    contents["twin"] = contents[ADAPTER_NAMES[0]]
    alora = save_alora_adapter(kit.model_dir, directory / "alora", INVOCATION)
    contents["checker"] = (str(alora), contents[ADAPTER_NAMES[1]][0])
    plan = SoakPlan(contents, options.page_size, GUIDES)
    driver = SoakDriver(
        Engine.from_config(config, clock), config.scheduler, lambda: Engine.from_config(alone), plan, clock, options.seed
    )
    return SoakRun(driver, options)


def _config(kit: TinyKit, kv_bytes: int, page_size: int, scheduler: SchedulerConfig) -> ClusterConfig:
    return parse_config(
        {
            "model": {"path": str(kit.model_dir), "dtype": "float32"},
            "cache": {"kv_bytes": kv_bytes, "page_size": page_size},
            "scheduler": scheduler.model_dump(),
            "defaults": {"adapter_sharing": "isolated"},
        }
    )

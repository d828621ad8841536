"""The whole engine over the tiny model, fp32: scheduler, cache, batches and model together answer as the oracle does.

A generated token must be the oracle's greedy one wherever the oracle's two best logits differ by more than 1e-3; the
others are ties, counted so that a test cannot pass on ties alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest

from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.torch_runner import TorchRunner
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, TinyKit
from tests.engine.harness import FakeEngine
from tests.oracle.oracle import Oracle, OracleAdapter

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(75)]  # ends inside a page of any size but 1
NUM_NEW = 10

_seeds = count(1)


class TinyEngine(FakeEngine):
    """The harness over the tiny random Llama instead of the fake model; memory starts as NaN."""

    def __init__(
        self,
        kit: TinyKit,
        page_size: int,
        *,
        num_slabs: int = 400,
        num_host_slabs: int = 0,
        runner_type: type[TorchRunner] = TorchRunner,
        **scheduler: int,
    ) -> None:
        self.page_size = page_size
        self.runner = runner_type.from_directory(kit.model_dir, dtype="float32", device="cpu", page_size=page_size)  # type: ignore[assignment]
        self.clock = ManualClock()
        config = SchedulerConfig(**{"max_num_batched_tokens": 64, "max_num_seqs": 16, **scheduler})
        slab_bytes = self.runner.geometry.slab_bytes
        self.engine = Engine(self.runner, num_slabs * slab_bytes, config, self.clock, host_bytes=num_host_slabs * slab_bytes)
        self.runner.kv.arena.fill_(float("nan"))  # type: ignore[attr-defined]
        loaded = {name: self.engine.load_adapter(name, str(path)) for name, path in kit.adapter_dirs.items()}
        self.adapters = {name: info.ref for name, info in loaded.items()}
        self.outputs, self.last, self.first, self.errors = {}, {}, {}, {}


class Judge:
    """The oracle's greedy tokens."""

    def __init__(self, kit: TinyKit) -> None:
        self._oracle = Oracle(kit.model_dir)
        self._adapters: Mapping[str, OracleAdapter] = {n: self._oracle.adapter(p) for n, p in kit.adapter_dirs.items()}

    def check(
        self,
        context: Sequence[int],
        own: Sequence[int],
        output: Sequence[int],
        adapter: str | None,
        sharing: str,
        writer: str | None = None,
    ) -> None:
        agent = self._adapters[adapter] if adapter is not None else None
        first = self._adapters[writer] if writer is not None else None
        logits = self._oracle.logits(context, [*own, *output[:-1]], agent, sharing, first)[len(own) - 1 :]
        top = logits.topk(2, dim=-1)
        is_clear = (top.values[:, 0] - top.values[:, 1] > 1e-3).tolist()
        assert sum(is_clear) >= len(output) // 2, "too many ties to say anything"
        wanted = top.indices[:, 0].tolist()
        assert [t for t, clear in zip(output, is_clear, strict=True) if clear] == [
            t for t, clear in zip(wanted, is_clear, strict=True) if clear
        ]


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit) -> Judge:
    return Judge(tiny_kit)


@pytest.fixture(params=[(4, 64), (16, 64), (16, 7), (64, 512)], ids=lambda p: f"page{p[0]}-chunk{p[1]}")
def engine(request: pytest.FixtureRequest, tiny_kit: TinyKit) -> TinyEngine:
    page_size, chunk = request.param
    return TinyEngine(tiny_kit, page_size, max_num_batched_tokens=chunk)


def own_tokens(num_tokens: int = 9) -> list[int]:
    """Fresh tokens on each call."""
    seed = next(_seeds)
    return [(31 * i + 17 * seed) % 2000 + 10 for i in range(num_tokens)]


@pytest.mark.parametrize("sharing", ["isolated", "eager", "residual", "base"])
def test_all_adapters_at_once_answer_as_the_oracle(engine: TinyEngine, judge: Judge, sharing: str) -> None:
    turns = [(name, own_tokens()) for name in (*ADAPTER_NAMES, None)]
    requests = [
        engine.add(engine.request(CONTEXT, own, name, sharing, max_tokens=NUM_NEW, declared=ADAPTER_NAMES))
        for name, own in turns
    ]
    engine.drain()
    assert engine.errors == {}
    for request, (name, own) in zip(requests, turns, strict=True):
        judge.check(CONTEXT, own, engine.outputs[request], name, sharing)


@pytest.mark.parametrize("sharing", ["eager", "residual"])
def test_a_second_turn_reads_what_the_first_wrote(engine: TinyEngine, judge: Judge, sharing: str) -> None:
    own = own_tokens()
    for _ in range(2):
        request = engine.add(engine.request(CONTEXT, own, "critic", sharing, max_tokens=NUM_NEW, declared=["critic"]))
        engine.drain()
        judge.check(CONTEXT, own, engine.outputs[request], "critic", sharing)
        own = [*own, *engine.outputs[request], *own_tokens(5)]


def test_an_adapter_declared_late_is_served_by_the_base_model(engine: TinyEngine, judge: Judge) -> None:
    engine.add(engine.context_request(CONTEXT, ["planner"]))
    engine.drain()
    own = own_tokens()
    request = engine.add(engine.request(CONTEXT, own, "judge", "eager", max_tokens=NUM_NEW, declared=["planner", "judge"]))
    engine.drain()
    judge.check(CONTEXT, own, engine.outputs[request], "judge", "eager")


def test_the_first_writer_is_read_by_the_second_agent(engine: TinyEngine, judge: Judge) -> None:
    for name in ("coder", "judge"):
        own = own_tokens()
        request = engine.add(
            engine.request(CONTEXT, own, name, "residual", max_tokens=NUM_NEW, declared=["coder", "judge"], writer="coder")
        )
        engine.drain()
        judge.check(CONTEXT, own, engine.outputs[request], name, "residual", writer="coder")


def test_a_grown_context_is_what_a_join_makes_of_it(engine: TinyEngine, judge: Judge) -> None:
    longer = [*CONTEXT, *own_tokens(21)]
    for context in (CONTEXT, longer):
        turns = [(name, own_tokens()) for name in ("planner", "tester", "reader")]
        requests = [
            engine.add(engine.request(context, own, name, "eager", max_tokens=NUM_NEW, declared=ADAPTER_NAMES))
            for name, own in turns
        ]
        engine.drain()
        for request, (name, own) in zip(requests, turns, strict=True):
            judge.check(context, own, engine.outputs[request], name, "eager")


def test_the_sharing_modes_write_different_texts(tiny_kit: TinyKit) -> None:
    engine, own = TinyEngine(tiny_kit, 16), own_tokens()
    outputs = {}
    for sharing in ("isolated", "eager", "residual", "base"):
        request = engine.add(engine.request(CONTEXT, own, "critic", sharing, max_tokens=40, declared=["critic"]))
        engine.drain()
        outputs[sharing] = tuple(engine.outputs[request])
    assert len(set(outputs.values())) == 4


def test_a_stream_resumed_elsewhere_goes_on_as_it_would_have(tiny_kit: TinyKit, tiny_adapter_dirs: Mapping[str, Path]) -> None:
    own = own_tokens()
    for sharing in ("eager", "residual", "isolated"):
        options = {"declared": list(tiny_adapter_dirs), "temperature": 0.8, "seed": 11, "max_tokens": 16}
        whole = TinyEngine(tiny_kit, 16)
        request = whole.add(whole.request(CONTEXT, own, "critic", sharing, **options))
        whole.drain()
        tokens = whole.outputs[request]
        other = TinyEngine(tiny_kit, 16, max_num_batched_tokens=40)
        resumed = other.add(other.request(CONTEXT, own, "critic", sharing, resumed=tokens[:7], **options))
        other.drain()
        assert other.outputs[resumed] == tokens[7:]

"""``auto`` from the gateway's service to a real engine and back, in one process: loaded, measured, served, demoted, listed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forkkv_cluster.client import messages
from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.request import AdapterInfo, ContextRequest, GenerateRequest, ModelInfo, Sharing, TokenChunk
from forkkv_cluster.core.session import BranchSpec, Session
from forkkv_cluster.core.verdict import VerdictState
from forkkv_cluster.gateway import codec
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    CreateSessionCommand,
    GenerateCommand,
    SamplingChoice,
    TextOrTokens,
    TurnDelta,
    TurnFinished,
)
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.session_store import MemorySessionStore
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.observability.metrics import render
from forkkv_cluster.testing.in_memory_directory import InMemoryDirectory
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.worker.deployment import ForkKVWorker
from tests.fidelity_kit import FidelityKit
from tests.gateway.fakes import ByteTokenizer, no_directory

CONTEXT = [(7 * i * i + 3) % 400 + 20 for i in range(120)]


class OneWorker:
    """A ``WorkerPool`` over a worker of this process."""

    def __init__(self, worker: ForkKVWorker) -> None:
        self._worker = worker

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        return self._worker.generate(request)

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        return await self._worker.run_context(request)

    async def model_info(self) -> ModelInfo:
        return await self._worker.model_info()

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        try:
            return [await getattr(self._worker, method)(*arguments)]
        except Exception as error:
            return [error]


async def serving(config: ClusterConfig) -> AsyncIterator[GatewayService]:
    worker = ForkKVWorker(config, sink=InMemoryDirectory())
    clock = ManualClock()
    service = GatewayService(
        config,
        OneWorker(worker),
        MemorySessionStore(),
        Tokenization(ByteTokenizer()),
        clock,
        version="1",
        directory_status=no_directory,
    )
    yield service
    worker.close()


@pytest.fixture
async def service(fidelity_kit: FidelityKit, tmp_path: Path) -> AsyncIterator[GatewayService]:
    """Calibrates on contexts of one token, within 6 %, and probes everything that auto chose to share."""
    path = tmp_path / "short.jsonl"
    rng = np.random.default_rng(5)
    lines = [{"context": [20 + i], "prompts": [rng.integers(20, 400, size=12).tolist()]} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = fidelity_kit.config(
        calibration={"samples": str(path), "max_disagreement": 0.06},
        guardrail={"share": 1.0, "min_positions": 150, "max_pending": 100},
    )
    async for service in serving(config):
        yield service


async def until(service: GatewayService, name: str, state: VerdictState) -> AdapterInfo:
    async with asyncio.timeout(120):
        while True:
            service._sharing.forget()  # the clock stands still
            info = next(info for info in await service.list_adapters() if info.name == name)
            if info.verdict is not None and info.verdict.state is state:
                return info
            await asyncio.sleep(0.02)


async def turn(service: GatewayService, session: Session, branch: str) -> tuple[tuple[int, ...], Sharing | None]:
    sampling = SamplingChoice(max_tokens=24)
    command = GenerateCommand(BranchTarget(session.session_id, branch), TextOrTokens(token_ids=[5, 6, 7]), sampling)
    events = [event async for event in service.generate(None, command)]
    assert isinstance(events[-1], TurnFinished)
    tokens = tuple(token for event in events if isinstance(event, TurnDelta) for token in event.token_ids)
    return tokens, events[-1].sharing


async def answered(service: GatewayService, context: list[int], sharing: Sharing) -> tuple[tuple[int, ...], Sharing | None]:
    command = CreateSessionCommand(TextOrTokens(token_ids=context), ("middle",), sharing)
    session = await service.create_session(None, command)
    await service.fork(None, session.session_id, (BranchSpec("a", "middle"),), None)
    return await turn(service, session, "a")


async def test_an_adapter_is_measured_shared_found_to_drift_and_served_isolated_from_then_on(
    service: GatewayService, fidelity_kit: FidelityKit
) -> None:
    loaded = await service.load_adapter("middle", str(fidelity_kit.adapters["middle"]), Sharing.AUTO)
    assert loaded.verdict is not None
    assert loaded.verdict.state is VerdictState.CALIBRATING
    measured = await until(service, "middle", VerdictState.MEASURED)
    assert measured.verdict is not None
    assert measured.verdict.sharing is Sharing.EAGER
    for number in range(12):
        await answered(service, [*CONTEXT[number:], *CONTEXT[:number]], Sharing.AUTO)
        if number == 0:
            assert (await answered(service, CONTEXT, Sharing.AUTO))[1] is Sharing.EAGER
    demoted = await until(service, "middle", VerdictState.DEMOTED)
    assert demoted.verdict is not None
    assert demoted.verdict.sharing is Sharing.ISOLATED
    auto = await answered(service, CONTEXT, Sharing.AUTO)
    assert auto == await answered(service, CONTEXT, Sharing.ISOLATED)
    assert auto[1] is Sharing.ISOLATED

    status = await service.status()
    read = messages.read_status(codec.write_status(status, service.model)).cluster
    assert read == status
    (drift,) = read.workers[0].engine.drift
    assert drift.agreement.lower_bound > 0.06
    (listed,) = read.adapters
    assert listed.verdict == demoted.verdict
    text = render(status, service.metrics)
    assert 'forkkv_adapter_sharing_info{adapter="middle",sharing="isolated",state="demoted"' in text
    assert "forkkv_adapter_demotions_total{" in text

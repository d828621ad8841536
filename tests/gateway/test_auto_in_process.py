"""``auto`` from the gateway's service to a real engine and back, in one process: loaded, measured, served, demoted, listed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from forkkv_cluster.api.v1 import adapters_pb2_grpc, cluster_pb2_grpc, sessions_pb2_grpc
from forkkv_cluster.client import AsyncForkKVClient, messages
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
from forkkv_cluster.gateway.servicer import GrpcServicer
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


@pytest.fixture
async def client(fidelity_kit: FidelityKit) -> AsyncIterator[AsyncForkKVClient]:
    """Of a gRPC server over the same service, without Ray."""
    async for service in serving(fidelity_kit.config(calibration={"min_positions": 200, "max_disagreement": 0.02})):
        servicer = GrpcServicer()
        servicer.service = service
        server = grpc.aio.server()
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(servicer, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with AsyncForkKVClient(f"127.0.0.1:{port}") as client:
            yield client
        await server.stop(None)


async def test_over_grpc_an_adapter_is_loaded_measured_and_shared_and_another_is_refused(
    client: AsyncForkKVClient, fidelity_kit: FidelityKit
) -> None:
    for name in ("weak", "strong"):
        loaded = await client.load_adapter(name, str(fidelity_kit.adapters[name]), sharing="auto")
        assert loaded.sharing is Sharing.AUTO
    async with asyncio.timeout(300):
        while True:
            (worker,) = (await client.status()).cluster.workers
            verdicts = {info.name: info.verdict for info in worker.engine.adapters if info.verdict is not None}
            if all(verdict.state is VerdictState.MEASURED for verdict in verdicts.values()):
                break
            await asyncio.sleep(0.05)
    assert [verdicts[name].sharing for name in ("weak", "strong")] == [Sharing.EAGER, Sharing.ISOLATED]
    assert all(entry.agreement.num_positions >= 200 for verdict in verdicts.values() for entry in verdict.measured)
    # A gateway may know less for a moment: unloading and loading makes it ask anew, and nothing is measured again.
    await client.unload_adapter("weak")
    await client.load_adapter("weak", str(fidelity_kit.adapters["weak"]), sharing="auto")
    assert {info.name: info.verdict for info in await client.list_adapters()} == verdicts
    session = await client.create_session(token_ids=CONTEXT, adapters=["weak", "strong"], sharing="auto")
    weak, strong = await session.fork([BranchSpec("w", "weak"), BranchSpec("s", "strong")])
    ends = [(await branch.generate(token_ids=[5, 6, 7], max_tokens=4)).finished.sharing for branch in (weak, strong)]
    assert ends == [Sharing.EAGER, Sharing.ISOLATED]
    (counters,) = [worker.engine.counters for worker in (await client.status()).cluster.workers]
    assert counters.calibrations == 2

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forkkv_cluster.bench.cli import make_offline
from forkkv_cluster.bench.grpc_target import GrpcTarget
from forkkv_cluster.bench.runner import RunResult, run_trace
from forkkv_cluster.bench.target import Target
from forkkv_cluster.bench.trace import Trace
from forkkv_cluster.bench.trace_file import parse_trace
from forkkv_cluster.client import ForkKVClient
from forkkv_cluster.core.errors import ForkKVError, NotFound
from forkkv_cluster.core.request import Sharing

if TYPE_CHECKING:
    from forkkv_cluster.app import RunningCluster

pytestmark = pytest.mark.cluster

HEADER = {"format": "forkkv-trace/1", "vocab_size": 8192, "adapters": ["planner", "critic"]}
CONTEXT = {"type": "context", "id": "c0", "adapters": ["planner", "critic"], "num_tokens": 100, "seed": 1}


def turn(id: str, branch: str, adapter: str | None, **more: Any) -> dict[str, Any]:
    values = {"type": "turn", "id": id, "context": "c0", "branch": branch, "adapter": adapter, "max_tokens": 6}
    return {**values, "append": {"num_tokens": 6, "seed": 2}, **more}


def trace_of(*events: dict[str, Any]) -> Trace:
    return parse_trace([json.dumps(line) for line in (HEADER, CONTEXT, *events)])


WITH_JOIN = trace_of(
    turn("t0", "b0", "planner"),
    turn("t1", "b1", "critic", after=["t0"]),
    turn("t2", "b1", "critic", append={"tokens": []}),
    {"type": "join", "id": "j0", "context": "c0", "from": "b0", "what": "output", "after": ["t2"]},
    turn("t3", "b3", None, after=["j0"], think_s=0.05),
    {"type": "close", "context": "c0", "after": ["t3"]},
)


def run(trace: Trace, target: Target, sharing: Sharing) -> RunResult:
    return run_trace(trace, target, sharing=sharing, seed=0, on_progress=lambda num_ended: None)


@pytest.mark.parametrize("sharing", [Sharing.ISOLATED, Sharing.RESIDUAL, Sharing.EAGER, Sharing.BASE])
def test_a_cluster_writes_the_tokens_that_the_engine_alone_writes(
    serve_cluster: RunningCluster,
    tiny_model_dir: Path,
    tiny_adapter_dirs: Mapping[str, Path],
    tmp_path: Path,
    sharing: Sharing,
):
    over_grpc = run(WITH_JOIN, GrpcTarget(serve_cluster.grpc_address, sharing=sharing), sharing)
    options = {"model": str(tiny_model_dir), "dtype": "float32", "kv_bytes": None, "writer": None}
    adapters = {name: str(tiny_adapter_dirs[name]) for name in WITH_JOIN.adapters}
    alone = run(WITH_JOIN, make_offline(options, adapters, sharing, 0, tmp_path), sharing)
    assert over_grpc.outputs() == alone.outputs()


def test_a_run_reports_the_clusters_facts_and_what_it_cost(serve_cluster: RunningCluster):
    report = run(WITH_JOIN, GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.EAGER), Sharing.EAGER).report
    assert (report["model"], report["dtype"], report["writer"]) == ("tiny-random-llama", "float32", "canonical")
    assert report["kv_bytes"] > 0
    # At least the context once, what was appended, the token without KV of the second turn, and the joined output.
    assert report["prefill_tokens_run"] >= 100 + 3 * 6 + 1 + 6
    assert all(row["worker"].startswith("worker-") for row in report["turns"])
    assert all(0 < row["ttft_s"] <= row["e2e_s"] for row in report["turns"])


def test_a_second_run_of_a_trace_finds_no_pages_of_the_first(serve_cluster: RunningCluster):
    trace = trace_of(turn("t0", "b0", "planner"))
    target = GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.ISOLATED)
    first = run(trace, target, Sharing.ISOLATED)
    second = run(trace, GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.ISOLATED), Sharing.ISOLATED)
    assert [r.report["base_hit_tokens"] for r in (first, second)] == [0, 0]


def test_a_run_leaves_no_session_behind(serve_cluster: RunningCluster):
    with ForkKVClient(serve_cluster.grpc_address) as client:
        before = client.status().cluster.num_sessions
        run(trace_of(turn("t0", "b0", "planner")), GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.BASE), Sharing.BASE)
        assert client.status().cluster.num_sessions == before


def test_a_turn_that_the_cluster_refuses_ends_the_run_with_its_error(serve_cluster: RunningCluster):
    target = GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.EAGER)
    with pytest.raises(ForkKVError, match="max_tokens"):
        run(trace_of(turn("t0", "b0", "planner", max_tokens=10**6)), target, Sharing.EAGER)


def test_an_adapter_that_the_cluster_lacks_is_loaded_on_request(
    serve_cluster: RunningCluster, tiny_adapter_dirs: Mapping[str, Path]
):
    trace = parse_trace([json.dumps({**HEADER, "adapters": ["late"]})])
    target = GrpcTarget(serve_cluster.grpc_address, sharing=Sharing.EAGER)
    with pytest.raises(NotFound, match=r"'late'.*--adapter late=DIR"):
        run(trace, target, Sharing.EAGER)
    target.load_adapters({"late": str(tiny_adapter_dirs["writer"])})
    try:
        assert "late" in target.facts().adapters
    finally:
        with ForkKVClient(serve_cluster.grpc_address) as client:
            client.unload_adapter("late")

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, ModelInfo, Sharing
from forkkv_cluster.core.status import (
    AdapterDrift,
    AdapterMemoryStatus,
    ClusterStatus,
    DirectoryStatus,
    EngineCounters,
    EngineStatus,
    Holding,
    PoolStatus,
    WorkerStatus,
)
from forkkv_cluster.core.verdict import PolicyAgreement, decide, unmeasured
from forkkv_cluster.observability.metrics import CLUSTER_METRICS, GatewayMetrics, render

UNITS = (
    "_bytes",
    "_tokens",
    "_seconds",
    "_pages",
    "_blocks",
    "_requests",
    "_steps",
    "_copies",
    "_evictions",
    "_preemptions",
    "_published",
    "_workers",
    "_sessions",
    "_branches",
    "_adapters",
    "_slots",
    "_loads",
    "_up",
    "_info",
    "_ratio",
    "_nats",
    "_calibrations",
    "_probes",
    "_demotions",
)


MEASURED = AdapterInfo(
    "planner",
    AdapterDigest("d" * 32),
    "/planner",
    8,
    ("k_proj",),
    16,
    verdict=decide(
        Sharing.ISOLATED,
        [PolicyAgreement(Sharing.EAGER, Agreement(2000, 4, 1.0))],
        max_disagreement=0.02,
        min_positions=2000,
        samples="some",
        decided_s=1.0,
    ),
)


def cluster(directory: DirectoryStatus | None = None) -> ClusterStatus:
    engine = EngineStatus(
        num_running=3,
        num_waiting=2,
        num_pinned_pages=7,
        kv_bytes_total=1000,
        base_bytes_held=640,
        residual_bytes_held=10,
        pools=(PoolStatus("base", 64, 10, 1, 2, 7),),
        counters=EngineCounters(
            prefill_tokens_run=4096, base_hit_tokens=100, residual_hit_tokens=90, useful_hit_tokens=80, swapped_in_pages=6
        ),
        host_bytes_total=512,
        host_bytes_held=128,
        sharing_saved_bytes=-3,
        holdings=(Holding("tenant", "acme", 600), Holding("adapter", "planner", 10)),
        adapter_memory=AdapterMemoryStatus(
            num_registered=100,
            max_on_device=8,
            num_on_device=5,
            num_pinned=3,
            num_loading=1,
            device_bytes=500,
            num_on_host=20,
            host_bytes=2000,
            max_host_bytes=4000,
            disk_loads=31,
            device_evictions=17,
        ),
        merged_bytes_held=192,
        adapters=(MEASURED, replace(MEASURED, name="unheard of", verdict=unmeasured(Sharing.ISOLATED))),
        drift=(AdapterDrift("planner", "d" * 32, Sharing.EAGER, 4, 1, Agreement(200, 10, 3.0), 7),),
    )
    worker = WorkerStatus("worker-1", 1, 42, "cpu", ModelInfo("m", "d", 8, 8, 8, "float32"), engine, events_published=5)
    return ClusterStatus("0.1.0", (worker,), directory, num_sessions=4, num_branches=9)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_status_becomes_samples_with_labels() -> None:
    found = samples(render(cluster(), GatewayMetrics()))
    worker = ("worker", "worker-1")
    assert found["forkkv_running_requests", (worker,)] == 3
    assert found["forkkv_prefill_tokens_total", (worker,)] == 4096
    assert found["forkkv_hit_tokens_total", (("kv", "useful"), worker)] == 80
    assert found["forkkv_kv_held_bytes", (("kv", "base"), worker)] == 640
    assert found["forkkv_pool_pages", (("pool", "base"), ("state", "pinned"), worker)] == 7
    assert found["forkkv_branches", ()] == 9


def test_a_status_says_whose_memory_it_is_and_what_sharing_and_the_host_tier_do() -> None:
    found = samples(render(cluster(), GatewayMetrics()))
    worker = ("worker", "worker-1")
    assert found["forkkv_kv_owned_bytes", (("kind", "tenant"), ("name", "acme"), worker)] == 600
    assert found["forkkv_kv_owned_bytes", (("kind", "adapter"), ("name", "planner"), worker)] == 10
    assert found["forkkv_sharing_saved_bytes", (worker,)] == -3
    assert found["forkkv_host_bytes", (("state", "held"), worker)] == 128
    assert found["forkkv_swapped_pages_total", (("direction", "in"), worker)] == 6


def test_a_status_says_where_adapters_are_and_what_their_whole_keys_borrow() -> None:
    found = samples(render(cluster(), GatewayMetrics()))
    worker = ("worker", "worker-1")

    def by(name: str, label: str) -> dict[str, float]:
        return {dict(labels)[label]: value for (sample, labels), value in found.items() if sample == name}

    assert by("forkkv_adapters", "tier") == {"registered": 100, "host": 20, "device": 5}
    assert by("forkkv_adapter_slots", "state") == {"pinned": 3, "idle": 2, "loading": 1, "free": 2}
    assert by("forkkv_adapter_bytes", "tier") == {"device": 500, "host": 2000}
    assert found["forkkv_adapter_host_capacity_bytes", (worker,)] == 4000
    assert found["forkkv_adapter_disk_loads_total", (worker,)] == 31
    assert found["forkkv_adapter_evictions_total", (worker,)] == 17
    assert found["forkkv_kv_held_bytes", (("kv", "merged"), worker)] == 192


def test_a_directory_that_is_away_reads_as_down() -> None:
    assert samples(render(cluster(), GatewayMetrics()))["forkkv_directory_up", ()] == 0
    up = samples(render(cluster(DirectoryStatus("i", 1, 1, 12, 3)), GatewayMetrics()))
    assert (up["forkkv_directory_up", ()], up["forkkv_directory_blocks", (("kv", "residual"),)]) == (1, 3)


def test_a_gateway_counts_requests_tokens_and_latencies() -> None:
    gateway = GatewayMetrics()
    gateway.request_started("Generate")
    gateway.first_token(0.2)
    gateway.later_tokens(4, 0.4)
    gateway.tokens(num_prompt=100, num_output=5)
    gateway.stream_resumed()
    gateway.request_ended("Generate", "OK", 0.6)
    found = samples(render(None, gateway))
    assert found["forkkv_gateway_requests_total", (("code", "OK"), ("method", "Generate"))] == 1
    assert found["forkkv_gateway_in_flight_requests", (("method", "Generate"),)] == 0
    assert found["forkkv_gateway_tokens_total", (("direction", "prompt"),)] == 100
    assert found["forkkv_gateway_stream_resumes_total", ()] == 1
    assert found["forkkv_gateway_itl_seconds_count", ()] == 4
    assert found["forkkv_gateway_itl_seconds_sum", ()] == pytest.approx(0.4)
    assert found["forkkv_gateway_ttft_seconds_sum", ()] == pytest.approx(0.2)


def test_two_gateways_in_one_process_count_apart() -> None:
    first, second = GatewayMetrics(), GatewayMetrics()
    first.stream_resumed()
    assert samples(render(None, second))["forkkv_gateway_stream_resumes_total", ()] == 0


@pytest.mark.parametrize("metric", CLUSTER_METRICS, ids=lambda metric: metric.name)
def test_every_row_has_a_unit_a_help_text_and_as_many_label_values_as_labels(metric) -> None:
    assert metric.name.startswith("forkkv_")
    assert metric.name.endswith(UNITS)
    assert metric.help.endswith(".")
    found = list(metric.samples(cluster(DirectoryStatus("i", 1, 1, 12, 3))))
    assert found
    assert {len(labels) for labels, _ in found} == {len(metric.labels)}


def test_names_in_the_table_are_unique() -> None:
    names = [metric.name for metric in CLUSTER_METRICS]
    assert len(set(names)) == len(names)


def test_an_adapters_sharing_and_its_figures_are_told_and_unmeasured_adapters_are_left_out() -> None:
    text = render(cluster(), GatewayMetrics())
    wanted = 'forkkv_adapter_sharing_info{adapter="planner",sharing="eager",state="measured",worker="worker-1"} 1.0'
    assert wanted in text
    assert (
        'forkkv_adapter_disagreement_ratio{adapter="planner",bound="measured",sharing="eager",worker="worker-1"} 0.002' in text
    )
    assert 'forkkv_adapter_drift_ratio{adapter="planner",bound="measured",sharing="eager",worker="worker-1"} 0.05' in text
    assert 'forkkv_adapter_drift_kl_nats{adapter="planner",sharing="eager",worker="worker-1"} 0.015' in text
    assert "unheard of" not in text

"""The command line as far as it goes without a cluster."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from forkkv_cluster.__main__ import banner, cli, merged_config, parse_adapter
from forkkv_cluster.cli.adapters import described
from forkkv_cluster.cli.generate import _print as print_events
from forkkv_cluster.cli.status import adapter_table, adapters_line, memory_table, sharing_table, worker_table
from forkkv_cluster.client import Finished, ForkKVClient, Status
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, ModelInfo, PrefixUsage, Sharing
from forkkv_cluster.core.status import (
    AdapterDrift,
    AdapterMemoryStatus,
    ClusterStatus,
    EngineCounters,
    EngineStatus,
    Holding,
    WorkerStatus,
)
from forkkv_cluster.core.verdict import PolicyAgreement, decide, unmeasured

runner = CliRunner()

MEMORY = AdapterMemoryStatus(
    num_registered=10_000,
    max_on_device=1024,
    num_on_device=999,
    num_pinned=512,
    device_bytes=1000 * 2**20,
    num_on_host=1200,
    host_bytes=1023 * 2**20,
    max_host_bytes=2**30,
    disk_loads=54_321,
)
"""As wide as it gets."""


def status_of(engine: EngineStatus) -> Status:
    model = ModelInfo("m", "d", 8, 8, 8, "float32")
    return Status(ClusterStatus("1", (WorkerStatus("worker-0123abcd", 1, 42, "cpu", model, engine),), None, 0, 0), model)


def measured(name: str, wrong: int) -> AdapterInfo:
    verdict = decide(
        Sharing.ISOLATED,
        [PolicyAgreement(Sharing.EAGER, Agreement(2000, wrong))],
        max_disagreement=0.02,
        min_positions=2000,
        samples="some",
        decided_s=1.0,
    )
    return AdapterInfo(name, AdapterDigest(name), "/a", 8, ("k_proj",), 16, verdict=verdict)


def test_status_tells_of_each_measured_adapter_how_auto_is_served_and_what_drifts() -> None:
    infos = (measured("good", 4), measured("bad", 400), replace(measured("new", 0), verdict=unmeasured(Sharing.ISOLATED)))
    drift = (AdapterDrift("good", "good", Sharing.EAGER, 4, 1, Agreement(200, 1)),)
    engine = EngineStatus(0, 0, 0, 2**30, 0, 0, (), EngineCounters(), infos, drift=drift)
    found = status_of(engine)
    console = Console(file=io.StringIO(), width=200)
    console.print(sharing_table(replace(found, cluster=replace(found.cluster, adapters=infos))))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (good,) = [line for line in lines if line.lstrip().startswith("good")]
    (bad,) = [line for line in lines if line.lstrip().startswith("bad")]
    assert "eager (measured)" in good
    assert "eager 0.20% (≤0.44%)" in good
    assert "eager 0.50% of 200" in good
    assert "isolated (measured)" in bad
    assert "none probed" in bad
    assert not any("new" in line for line in lines)


def test_status_breaks_no_name_and_no_figure_of_a_measured_adapter_in_80_characters() -> None:
    info = measured("formatter-alora-of-ours", 4)
    assert info.verdict is not None
    figures = (*info.verdict.measured, PolicyAgreement(Sharing.RESIDUAL, Agreement(2000, 26)))
    info = replace(info, verdict=replace(info.verdict, measured=figures))
    found = status_of(EngineStatus(0, 0, 0, 2**30, 0, 0, (), EngineCounters(), (info,)))
    console = Console(file=io.StringIO(), width=80)
    console.print(sharing_table(replace(found, cluster=replace(found.cluster, adapters=(info,)))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "eager 0.20% (≤0.44%)" in text
    assert "residual 1.30% (≤1.79%)" in text
    assert info.name in text


def test_an_adapter_is_described_with_its_figures() -> None:
    lines = described(measured("good", 4))
    assert lines[0].startswith("good: auto is served eager (measured): eager disagrees with isolated on at most 0.44%")
    assert lines[1:] == ["  eager: 0.20% of 2000 positions disagree with isolated, at most 0.44%"]


def test_the_sharing_of_adapters_may_be_set_for_all_at_start() -> None:
    config = merged_config(ClusterConfig(), {"defaults": {"adapter_sharing": Sharing.ISOLATED, "session_sharing": None}}, [])
    assert (config.defaults.adapter_sharing, config.defaults.session_sharing) == (Sharing.ISOLATED, Sharing.AUTO)


def test_the_printed_configuration_is_the_default_one() -> None:
    text = runner.invoke(cli, ["config"]).output
    assert parse_config(yaml.safe_load(text)) == ClusterConfig()


def test_every_key_is_explained() -> None:
    lines = runner.invoke(cli, ["config"]).output.splitlines()
    keys = [index for index, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) > 30
    assert all(lines[index - 1].lstrip().startswith("# ") and "None" not in lines[index - 1] for index in keys)


def test_a_file_is_checked_and_its_mistake_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cache:\n  page_sise: 16\n")
    result = runner.invoke(cli, ["config", "--check", str(path)])
    assert result.exit_code == 2
    assert "page_sise" in result.stderr
    path.write_text("cache:\n  page_size: 16\n")
    assert json.loads(runner.invoke(cli, ["config", "--check", str(path)]).output)["cache"]["page_size"] == 16


def test_options_win_over_the_file() -> None:
    base = parse_config({"server": {"http_port": 1}, "adapters": [{"name": "a", "path": "/old"}]})
    overrides = {"server": {"http_port": 2, "host": None}, "cache": {"kv_bytes": "1MiB"}}
    config = merged_config(base, overrides, ["a=/new", "b=/b"])
    assert (config.server.http_port, config.server.host, config.cache.kv_bytes) == (2, "127.0.0.1", 2**20)
    assert [(adapter.name, adapter.path) for adapter in config.adapters] == [("a", "/new"), ("b", "/b")]


def test_a_bad_option_is_named_as_in_a_file() -> None:
    result = runner.invoke(cli, ["serve", "--kv-bytes", "lots"])
    assert result.exit_code == 2
    assert "kv_bytes" in result.stderr


def test_status_shows_whose_memory_it_is_the_largest_first() -> None:
    holdings = tuple(Holding("tenant", name, 1024 * count) for name, count in [("a", 9), ("b", 8), ("", 7), ("d", 1), ("e", 1)])
    counters = EngineCounters(useful_hit_tokens=77, swapped_out_bytes=2048, swapped_in_bytes=1024)
    engine = EngineStatus(0, 0, 0, 1, 1, 1, (), counters, (), 4096, 2048, -512, holdings)
    table = memory_table(status_of(engine))
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == [
        "worker-0123abcd",
        "-512 B, 77 tokens",
        "2.0 KiB of 4.0 KiB",
        "2.0 KiB/1.0 KiB",
        "a 9.0 KiB, b 8.0 KiB, (none) 7.0 KiB, 2 more",
        "none",
        "none",
    ]


def test_status_shows_where_adapters_are_and_what_whole_keys_borrow_in_eighty_columns() -> None:
    engine = EngineStatus(0, 0, 0, 1, 1, 1, (), EngineCounters(), adapter_memory=MEMORY, merged_bytes_held=1022 * 2**20)
    console = Console(file=io.StringIO(), width=80)
    console.print(adapter_table(status_of(engine)))
    row = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    cells = "0123abcd 10000 999/1024 512 1000.0 MiB 1200 1023.0 MiB 54321 1022.0 MiB"
    assert row.split() == cells.split()


def test_status_as_json_has_every_field_of_adapter_memory_and_merged_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineStatus(0, 0, 0, 1, 1, 1, (), EngineCounters(), adapter_memory=MEMORY, merged_bytes_held=4096)
    monkeypatch.setattr(ForkKVClient, "status", lambda client: status_of(engine))
    result = runner.invoke(cli, ["status", "--json"])
    found = json.loads(result.stdout)["cluster"]["workers"][0]["engine"]
    assert found["adapter_memory"] == {name: getattr(MEMORY, name) for name in AdapterMemoryStatus.__slots__}
    assert found["merged_bytes_held"] == 4096


def test_status_names_what_an_adapter_was_trained_for(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = tuple(
        AdapterInfo(name, AdapterDigest(name), "", 8, (), 0, trained_for=trained_for)
        for name, trained_for in (("ordinary", None), ("shared", Sharing.EAGER))
    )
    found = status_of(EngineStatus(0, 0, 0, 1, 1, 1, (), EngineCounters()))
    found = replace(found, cluster=replace(found.cluster, adapters=infos))
    monkeypatch.setattr(ForkKVClient, "status", lambda client: found)
    shown = " ".join(runner.invoke(cli, ["status"]).stdout.split())
    assert "adapters: ordinary (rank 8), shared (rank 8, trained for eager)" in shown


def test_an_answer_served_unlike_its_adapters_training_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    end = Finished(None, 1, 1, PrefixUsage(), (), 0, 0.0, 0.0)
    for mismatch in (None, Sharing.EAGER):
        print_events(iter([replace(end, mismatched_training=mismatch)]))
        shown = " ".join(capsys.readouterr().err.split())
        assert ("trained for eager" in shown) is (mismatch is not None)


def many_adapters(num_adapters: int, resident: set[int], held: dict[int, int]) -> ClusterStatus:
    """Adapters a0000, a0001, ... on one worker."""
    infos = tuple(
        AdapterInfo(f"a{i:04}", AdapterDigest(f"d{i}"), "dir", 8, ("k_proj",), 64, is_resident=i in resident)
        for i in range(num_adapters)
    )
    holdings = tuple(Holding("adapter", f"a{i:04}", num_bytes) for i, num_bytes in held.items())
    engine = EngineStatus(0, 0, 0, 1, 1, 1, (), EngineCounters(), adapters=infos, holdings=holdings)
    return replace(status_of(engine).cluster, adapters=infos)


def test_status_names_resident_and_busy_adapters_of_a_thousand_and_counts_the_rest() -> None:
    cluster = many_adapters(1000, resident={3, 700}, held={700: 2048, 12: 4096})
    assert adapters_line(cluster, 16) == (
        "adapters: a0012 (rank 8, 4.0 KiB), a0700 (rank 8, resident, 2.0 KiB), a0003 (rank 8, resident), "
        "997 more, 0 of them resident (--all names them)"
    )


def test_status_says_how_many_resident_adapters_it_leaves_out() -> None:
    line = adapters_line(many_adapters(1000, resident=set(range(64)), held={}), 16)
    assert line.count("(rank 8, resident)") == 16
    assert line.endswith("984 more, 48 of them resident (--all names them)")


@pytest.mark.parametrize(("num_adapters", "limit"), [(1000, None), (16, 16)])
def test_status_names_all_adapters_when_asked_or_when_they_are_few(num_adapters: int, limit: int | None) -> None:
    line = adapters_line(many_adapters(num_adapters, resident={1}, held={}), limit)
    assert line.startswith("adapters: a0001 (rank 8, resident), a0000 (rank 8), ")
    assert (line.count("(rank 8"), "more" in line) == (num_adapters, False)


@pytest.mark.parametrize("options", [[], ["--all"], ["--json"]])
def test_all_and_json_leave_no_adapter_out(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    cluster = many_adapters(100, resident={1}, held={})
    found = Status(cluster, cluster.workers[0].model)
    monkeypatch.setattr(ForkKVClient, "status", lambda client: found)
    output = runner.invoke(cli, ["status", *options], env={"COLUMNS": "200"}).stdout
    assert all(f"a{i:04}" in output for i in range(100)) == bool(options)


@pytest.mark.parametrize("text", ["planner", "=dir", "planner=", ""])
def test_an_adapter_is_name_and_directory(text: str) -> None:
    with pytest.raises(InvalidArgument, match="NAME=DIR"):
        parse_adapter(text)


def test_a_cluster_that_is_not_there_is_one_line_and_exit_1() -> None:
    for command in (["status"], ["generate", "Hello"]):
        result = runner.invoke(cli, [*command, "--address", "127.0.0.1:1"])
        assert result.exit_code == 1
        assert "UNAVAILABLE" in result.stderr
        assert "gRPC port" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


def test_a_document_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(b"\x90\xff")
    result = runner.invoke(cli, ["generate", "Hello", "--document", str(path)])
    assert result.exit_code == 2
    assert "--document" in result.stderr


def test_sharing_without_a_document_is_refused_not_ignored() -> None:
    result = runner.invoke(cli, ["generate", "Hello", "--sharing", "eager"])
    assert result.exit_code == 2
    assert "--sharing" in result.stderr


def test_the_status_of_a_busy_cluster_fits_eighty_columns() -> None:
    counters = EngineCounters(prefill_tokens_run=987_654_321, useful_hit_tokens=123_456_789, output_tokens=98_765_432)
    engine = EngineStatus(64, 1024, 9, 2**30, 1023 * 2**20, 1023 * 2**20, (), counters, ())
    model = ModelInfo("tiny", "m" * 32, 8192, 16384, 2048, "float32", (0,))
    worker = WorkerStatus("worker-0123abcd", 1, 4_194_303, "cpu", model, engine)
    found = Status(ClusterStatus("0.1.0", (worker,), None, 0, 0, ()), model)
    console = Console(file=io.StringIO(), width=80)
    console.print(worker_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for part in ("0123abcd", "4194303", "64/1024", "1023.0 MiB", "987654321", "123456789", "98765432"):
        assert part in text


def test_help_shows_the_defaults_that_the_options_leave_to_the_configuration() -> None:
    text = " ".join(runner.invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output.split())
    for default in ("127.0.0.1", "8000", "9000", "2", "auto"):
        assert f"[default: {default}]" in text
    assert "[default: 256MiB]" in runner.invoke(cli, ["bench", "trace", "--help"], env={"COLUMNS": "200"}).output


def test_the_banner_names_both_endpoints() -> None:
    text = str(banner(ClusterConfig(), "http://127.0.0.1:8000", "127.0.0.1:9000").renderable)
    assert "http://127.0.0.1:8000/v1" in text
    assert "127.0.0.1:9000" in text


def test_every_command_explains_itself() -> None:
    for command in ("serve", "status", "generate", "config", "bench", "demo"):
        result = runner.invoke(cli, [command, "--help"])
        assert result.exit_code == 0
        assert len(result.output) > 200

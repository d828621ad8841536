import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from forkkv_cluster.bench.cli import app, parse_adapters
from forkkv_cluster.core.errors import InvalidArgument

TRACE = """\
{"format": "forkkv-trace/1", "vocab_size": 8192, "adapters": ["planner", "critic"]}
{"type": "context", "id": "c0", "adapters": ["planner", "critic"], "num_tokens": 80, "seed": 1}
{"type": "turn", "id": "t0", "context": "c0", "branch": "b0", "adapter": "planner", \
"append": {"num_tokens": 5, "seed": 5}, "max_tokens": 4}
{"type": "turn", "id": "t1", "context": "c0", "branch": "b1", "adapter": "critic", "after": ["t0"], \
"append": {"tokens": [11, 12]}, "max_tokens": 3}
{"type": "join", "id": "j0", "context": "c0", "from": "b0", "after": ["t1"]}
{"type": "close", "context": "c0", "after": ["j0"]}
"""


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


@pytest.fixture
def kit_options(tiny_model_dir: Path, tiny_adapter_dirs: Mapping[str, Path]) -> list[str]:
    adapters = [f"--adapter={name}={tiny_adapter_dirs[name]}" for name in ("planner", "critic")]
    return ["--model", str(tiny_model_dir), "--kv-bytes", "8MiB", *adapters]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
def test_a_trace_runs_in_this_process_under_every_sharing_mode(
    trace_path: Path, tmp_path: Path, kit_options: list[str], sharing: str
):
    out, tokens = tmp_path / "out.json", tmp_path / "out.jsonl"
    result = invoke(trace_path, "--sharing", sharing, *kit_options, "--json", out, "--outputs", tokens)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert (report["trace"], report["sharing"], report["target"], report["dtype"]) == (
        "trace.jsonl",
        sharing,
        "offline",
        "float32",
    )
    lines = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert [(line["id"], len(line["token_ids"])) for line in lines] == [("t0", 4), ("t1", 3)]
    assert "prefill_tokens_run" in result.output


def test_the_first_agent_may_be_the_writer(trace_path: Path, tmp_path: Path, kit_options: list[str]):
    out = tmp_path / "out.json"
    assert invoke(trace_path, "--sharing", "residual", "--writer", "first", *kit_options, "--json", out).exit_code == 0
    assert json.loads(out.read_text())["writer"] == "first"


def test_an_adapter_that_the_trace_needs_and_nobody_loads_is_named(trace_path: Path, tiny_model_dir: Path):
    result = invoke(trace_path, "--model", tiny_model_dir)
    assert result.exit_code == 1
    assert "adapter 'planner' does not exist" in result.output
    assert "--adapter planner=DIR" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "http://127.0.0.1:1"], "--target='http://127.0.0.1:1': is not offline or grpc://HOST:PORT"),
        (["--target", "grpc://127.0.0.1:1", "--model", "m"], "--model='m': is the cluster's own"),
        (["--target", "grpc://127.0.0.1:1", "--dtype", "float32"], "--dtype='float32': is the cluster's own"),
        (["--target", "grpc://127.0.0.1:1", "--kv-bytes", "1GiB"], "--kv-bytes='1GiB': is the cluster's own"),
        (["--target", "grpc://127.0.0.1:1", "--writer", "first"], "--writer='first': is the cluster's own"),
        (["--adapter", "planner"], "--adapter='planner': is not NAME=DIR"),
        (["--model", "m", "--kv-bytes", "much"], "cache.kv_bytes='much'"),
        (["--model", "m", "--dtype", "int8"], "model.dtype='int8'"),
    ],
)
def test_a_bad_option_is_refused_by_name(trace_path: Path, arguments: list[str], message: str):
    result = invoke(trace_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("option", ["--json", "--outputs"])
def test_a_report_that_could_not_be_written_is_refused_before_the_run(trace_path: Path, tmp_path: Path, option: str):
    path = tmp_path / "missing" / "out"
    result = invoke(trace_path, "--model", "m", option, path)
    assert result.exit_code == 2
    assert f"{option}='{path}" in "".join(result.output.split())


def test_the_other_benchmarks_refuse_such_a_report_too(tmp_path: Path):
    for command in ("cache", "offline"):
        result = CliRunner().invoke(app, [command, "--json", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 2
        assert "--json=" in result.output


def test_auto_is_refused_by_name(trace_path: Path, kit_options: list[str]):
    result = invoke(trace_path, "--sharing", "auto", *kit_options)
    assert result.exit_code == 2
    assert "is no policy to measure" in " ".join(result.output.split())


def test_a_bad_line_of_the_trace_is_named(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text(TRACE.replace('"max_tokens": 3', '"max_tokens": -3'))
    result = invoke(path)
    assert result.exit_code == 2
    assert "trace line 4, max_tokens=-3" in result.output


def test_a_cluster_that_is_not_there_is_an_error_not_a_traceback(trace_path: Path):
    result = invoke(trace_path, "--target", "grpc://127.0.0.1:1")
    assert result.exit_code == 1
    assert "error" in result.output


def test_an_adapter_named_twice_is_refused():
    with pytest.raises(InvalidArgument, match="names an adapter twice"):
        parse_adapters(["a=x", "a=y"])

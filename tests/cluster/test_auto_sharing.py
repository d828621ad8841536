"""``auto`` over gRPC, HTTP and the command line, on a real cluster: two workers measure two adapters."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forkkv_cluster.__main__ import cli
from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import BranchSpec, ForkKVClient
from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.core.verdict import VerdictState
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.cluster.helpers import DOCUMENT, eventually
from tests.fidelity_kit import save_adapter

pytestmark = pytest.mark.cluster


@pytest.fixture
def adapters(client: ForkKVClient, tiny_kit: TinyKit, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """One that changes next to nothing, and one that re-encodes; unloaded afterwards."""
    yield {
        "meek": save_adapter(tiny_kit.model_dir, tmp_path / "meek", 0.0005),
        "bold": save_adapter(tiny_kit.model_dir, tmp_path / "bold", 1.0),
    }
    for name in {info.name for info in client.list_adapters()} & {"meek", "bold"}:
        client.unload_adapter(name)


def listed(client: ForkKVClient, name: str) -> AdapterInfo:
    return next(info for info in client.list_adapters() if info.name == name)


def is_measured_everywhere(client: ForkKVClient, name: str) -> bool:
    infos = [info for worker in client.status().cluster.workers for info in worker.engine.adapters if info.name == name]
    return all(info.verdict is not None and info.verdict.state is VerdictState.MEASURED for info in infos)


def test_an_adapter_is_refused_and_another_kept_by_every_worker_and_answers_say_so(
    client: ForkKVClient, serve_cluster: RunningCluster, adapters: dict[str, Path]
) -> None:
    loaded = client.load_adapter("bold", str(adapters["bold"]), sharing="auto")
    assert loaded.sharing is Sharing.AUTO
    command = ["load-adapter", "meek", str(adapters["meek"]), "--sharing", "auto", "--address", serve_cluster.grpc_address]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0, said.output
    assert "meek: auto is served eager (measured)" in said.output
    for name in adapters:
        eventually(lambda name=name: is_measured_everywhere(client, name), what=f"verdicts on {name}")  # type: ignore[misc]
    verdicts = {name: listed(client, name).verdict for name in adapters}
    assert [verdict.sharing for verdict in verdicts.values() if verdict] == [Sharing.EAGER, Sharing.ISOLATED]

    with client.create_session(DOCUMENT, adapters=["meek", "bold"], sharing="auto") as session:
        meek, bold = session.fork([BranchSpec("m", "meek"), BranchSpec("b", "bold")])
        assert meek.generate("And then?", max_tokens=8).finished.sharing is Sharing.EAGER
        answer = bold.generate("And then?", max_tokens=8)
        assert answer.finished.sharing is Sharing.ISOLATED
        (exact,) = session.fork([BranchSpec("e", "bold", Sharing.ISOLATED)])
        assert exact.generate("And then?", max_tokens=8).token_ids == answer.token_ids

    with urllib.request.urlopen(f"{serve_cluster.http_url}/v1/models") as response:
        models = {entry["id"]: entry for entry in json.load(response)["data"]}
    assert models["meek"]["forkkv"]["verdict"]["sharing"] == "eager"
    assert models["meek"]["forkkv"]["verdict"]["measured"]["eager"]["num_positions"] >= 400
    with urllib.request.urlopen(f"{serve_cluster.http_url}/metrics") as response:
        text = response.read().decode()
    assert text.count('forkkv_adapter_sharing_info{adapter="bold",sharing="isolated",state="measured"') == 2
    assert "bold" in CliRunner().invoke(cli, ["status", "--address", serve_cluster.grpc_address]).output

"""The README's examples run as they are pasted, one after the other; only the ports and the kit's folder are the test's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import ForkKVClient
from tests.cluster.helpers import wait_until_idle

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(
    serve_cluster: RunningCluster,
    client: ForkKVClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)
    before = client.list_sessions()
    sources = snippets()
    assert sum("127.0.0.1" in source for source in sources) >= 2
    replaced = {
        "http://127.0.0.1:8000": serve_cluster.http_url,
        "127.0.0.1:9000": serve_cluster.grpc_address,
        ".forkkv/kit": str(tmp_path / "kit"),
    }
    namespace: dict[str, Any] = {}
    for source in sources:
        for ours, theirs in replaced.items():
            source = source.replace(ours, theirs)
        exec(compile(source, "README.md", "exec"), namespace)
        assert capsys.readouterr().out.strip(), source
    wait_until_idle(client)
    assert client.list_sessions() == before

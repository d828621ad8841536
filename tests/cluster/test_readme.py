"""The README's examples run as they are pasted, one after the other, against what `make serve` starts, and print what they say.

Only the ports are the test's, and that adapters are not measured, which takes minutes of a processor. The server is a process
of its own: the embedded model is not the one that other tests share.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkkv_cluster.app import free_port
from forkkv_cluster.client import ForkKVClient

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FORKKV = [sys.executable, "-m", "forkkv_cluster"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def promised(source: str) -> list[str]:
    return re.findall(r"# prints: (.+)$", source, re.MULTILINE)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The README's addresses, and where ``forkkv serve`` listens instead."""
    http_port, grpc_port = free_port(), free_port()
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    server = subprocess.Popen(
        [*FORKKV, "serve", *ports], cwd=tmp_path_factory.mktemp("serve"), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        lines = iter(server.stdout.readline, "")
        assert any("Ctrl-C stops it" in line for line in lines), "forkkv serve ended before it was ready"
        yield {"127.0.0.1:8000": f"127.0.0.1:{http_port}", "127.0.0.1:9000": f"127.0.0.1:{grpc_port}"}
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=120)


def test_the_readmes_python_prints_what_it_says(
    addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sources = blocks("python")
    assert sum("127.0.0.1" in source for source in sources) >= 2
    namespace: dict[str, Any] = {}
    for source in sources:
        assert promised(source), source
        for ours, theirs in addresses.items():
            source = source.replace(ours, theirs)
        exec(compile(source, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out
        assert [text for text in promised(source) if text not in printed] == [], printed
    with ForkKVClient(addresses["127.0.0.1:9000"]) as client:
        assert client.list_sessions() == []


def test_the_quick_starts_commands_print_what_they_say(addresses: dict[str, str]) -> None:
    (block,) = (block for block in blocks("bash") if promised(block))
    lines = [line for line in block.splitlines() if not line.startswith("source ")]
    command = "\n".join(
        f"{line} --address {addresses['127.0.0.1:9000']}" if line.startswith("forkkv ") else line for line in lines
    )
    function = f'forkkv() {{ {" ".join(FORKKV)} "$@"; }}\nset -e\n'
    found = subprocess.run(["bash", "-c", function + command], cwd=ROOT, capture_output=True, text=True, check=True)
    answers = found.stdout.splitlines()[: len(promised(block))]
    assert [answer.strip() for answer in answers] == promised(block)

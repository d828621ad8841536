"""``serve deploy`` itself, against a Ray cluster of the test's own: what Serve is given in production, except for ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from forkkv_cluster.app import free_port
from forkkv_cluster.client import ForkKVClient

pytestmark = pytest.mark.cluster

# Ray with its dashboard, which takes Serve configs, in a process that ends when its standard input does.
_RAY = """
import sys
import ray
ray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=True, dashboard_port=int(sys.argv[1]),
         num_gpus=0, log_to_driver=False, logging_level="ERROR", namespace="serve")
print("ready", flush=True)
sys.stdin.read()
from ray import serve
serve.shutdown()
ray.shutdown()
"""

# Ray asks for a token by default, which it would write to the home directory of whoever runs the tests.
_ENV = {**os.environ, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def dashboard_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = (tmp_path_factory.mktemp("ray") / "log").open("w+")
    ray = subprocess.Popen(
        [sys.executable, "-c", _RAY, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=_ENV,
    )
    assert ray.stdin is not None
    assert ray.stdout is not None
    try:
        assert ray.stdout.readline().strip() == "ready", Path(log.name).read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.stdin.close()
        try:
            ray.wait(timeout=60)
        except subprocess.TimeoutExpired:
            ray.kill()
            ray.wait()


def with_test_ports(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The committed config on free ports, with ``args`` over those of its application."""
    changed = json.loads(json.dumps(config))
    changed["http_options"]["port"], changed["grpc_options"]["port"] = free_port(), free_port()
    changed["applications"][0]["args"].update(args)
    return changed


def wait_until_running(dashboard_url: str, app_name: str, timeout_s: float = 120.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    status: dict[str, Any] = {}
    while time.monotonic() < give_up_s:
        response = httpx.get(f"{dashboard_url}/api/serve/applications/", timeout=10.0)
        status = response.json().get("applications", {}).get(app_name, {}) if response.is_success else {}
        if status.get("status") == "RUNNING":
            return
        assert status.get("status") != "DEPLOY_FAILED", status.get("message")
        time.sleep(0.25)
    pytest.fail(f"{app_name} is not running after {timeout_s} s: {status}")


def test_serve_deploy_accepts_the_config_file_and_what_it_starts_answers(
    dashboard_url: str, deploy_dir: Path, tiny_model_dir: Path, tiny_adapter_dirs: Mapping[str, Path], tmp_path: Path
):
    committed = yaml.safe_load((deploy_dir / "serve.yaml").read_text())
    args = {
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "adapters": [{"name": "planner", "path": str(tiny_adapter_dirs["planner"])}],
        "gateway": {"session_store": "memory:"},
    }
    config = with_test_ports(committed, args)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "serve"), "deploy", str(path), "--address", dashboard_url]
    deployed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=_ENV)
    assert deployed.returncode == 0, deployed.stderr
    wait_until_running(dashboard_url, "forkkv")
    models = httpx.get(f"http://127.0.0.1:{config['http_options']['port']}/v1/models", timeout=30.0).json()
    assert {model["id"] for model in models["data"]} == {"tiny-random-llama", "planner"}
    with ForkKVClient(f"127.0.0.1:{config['grpc_options']['port']}") as client:
        assert len(client.generate(token_ids=[5, 6, 7], max_tokens=3, ignore_eos=True).token_ids) == 3

"""Writes the files of deploy/ that follow from the code: ports, the configuration's schema, servicer functions, versions.

python deploy/generate.py           write
python deploy/generate.py --check   exit 1 when what is committed differs from what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any

import yaml

from forkkv_cluster import __version__
from forkkv_cluster.cli.config import config_lines
from forkkv_cluster.core.config import parse_config
from forkkv_cluster.gateway.proxy_services import servicer_functions

DEPLOY = Path(__file__).resolve().parent
IMPORT_PATH = "forkkv_cluster.app:serve_app"
IMAGE = f"forkkv-cluster:{__version__}"
REDIS_HOST, REDIS_PORT = "forkkv-redis", 6379
DRAIN_S = 20
"""Time for requests in flight before Ray stops on a worker's pod, seconds."""
GRACE_S = 60
"""The pod's own limit: the drain, then the replicas' graceful shutdown (5 s in app), then Ray's."""
# Serve's and Ray's ports, under the names by which the operator looks for them: without `serve-grpc` it drops that port.
RAY_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
KUBERAY_OVERRIDES: dict[str, Any] = {
    "server": {"host": "0.0.0.0"},
    "worker": {"num_replicas": 2, "num_cpus": 2, "num_threads": 2},
    "gateway": {"num_replicas": 2, "num_cpus": 0.5, "session_store": f"redis://{REDIS_HOST}:{REDIS_PORT}/1"},
}


def ray_version() -> str:
    """The version of ray that the constraints pin."""
    match = re.search(r"^ray==(\S+)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit("deploy/constraints.txt pins no ray: add a line ray==VERSION.")
    return match[1]


def render(name: str, **values: object) -> str:
    return Template((DEPLOY / "templates" / f"{name}.tmpl").read_text()).substitute(values)


def serve_yaml(overrides: dict[str, Any]) -> str:
    """A Serve config file whose application is built from ``overrides`` over the default configuration."""
    config = parse_config(overrides)
    args = yaml.safe_dump(overrides or {"server": {"app_name": config.server.app_name}}, sort_keys=False)
    return render(
        "serve.yaml",
        host=config.server.host,
        http_port=config.server.http_port,
        grpc_port=config.server.grpc_port,
        app_name=config.server.app_name,
        import_path=IMPORT_PATH,
        servicer_functions=indent(yaml.safe_dump(servicer_functions(config.server.host)).rstrip(), "    "),
        args=indent(args.rstrip(), "      "),
    )


def rayservice_yaml() -> str:
    """The RayService manifest; its Serve config is the one above with the overrides for Kubernetes."""
    config = parse_config(KUBERAY_OVERRIDES)
    serve_config = "".join(
        line for line in serve_yaml(KUBERAY_OVERRIDES).splitlines(keepends=True) if not line.startswith("# ")
    )
    serve_ports = {"serve": config.server.http_port, "serve-grpc": config.server.grpc_port}
    worker_ports = {**serve_ports, "metrics": RAY_PORTS["metrics"]}
    return render(
        "rayservice.yaml",
        image=IMAGE,
        version=__version__,
        ray_version=ray_version(),
        redis_host=REDIS_HOST,
        redis_port=REDIS_PORT,
        serve_config=indent(serve_config.rstrip(), "    "),
        head_ports=_container_ports(RAY_PORTS | serve_ports, 16),
        worker_ports=_container_ports(worker_ports, 18),
        num_workers=config.worker.num_replicas,
        max_workers=2 * config.worker.num_replicas,
        pod_cpus=4,
        drain_s=DRAIN_S,
        grace_s=GRACE_S,
    )


def _container_ports(ports: dict[str, int], spaces: int) -> str:
    return indent("\n".join(f"- {{name: {name}, containerPort: {port}}}" for name, port in ports.items()), " " * spaces)


def cluster_yaml() -> str:
    """What ``forkkv config`` prints."""
    return "\n".join(config_lines()) + "\n"


def files() -> dict[Path, str]:
    """What each written file should hold."""
    return {
        DEPLOY / "cluster.yaml": cluster_yaml(),
        DEPLOY / "serve.yaml": serve_yaml({}),
        DEPLOY / "kuberay" / "rayservice.yaml": rayservice_yaml(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    options = parser.parse_args(argv)
    stale = [path for path, text in files().items() if not path.is_file() or path.read_text() != text]
    if options.check:
        for path in stale:
            name = path.relative_to(DEPLOY.parent)
            print(f"{name} is not what deploy/generate.py gives: run python deploy/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files()[path])
    print(f"{len(stale)} of {len(files())} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

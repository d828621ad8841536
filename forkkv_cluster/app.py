"""The composition root: the only place that knows every part. ``build_app`` for Serve, ``start_cluster`` for one host.

Serve reads the annotation of ``serve_app`` to parse its arguments, so this module keeps real annotations, not strings.
"""

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig

from forkkv_cluster.core.config import AdapterConfig, ClusterConfig
from forkkv_cluster.core.errors import InvalidArgument, Unavailable
from forkkv_cluster.directory.client import directory_name, kill_directory
from forkkv_cluster.gateway.ingress import AgentGateway
from forkkv_cluster.gateway.proxy_services import servicer_functions
from forkkv_cluster.preflight import check_before_start, check_ports
from forkkv_cluster.routing.request_router import router_config
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.worker.deployment import ForkKVWorker

EMBEDDED_MODEL_NAME = "casebook"

_OWN_ERRORS = "forkkv_cluster.core.errors."
_OBJECT_STORE_BYTES = 100 * 2**20
"""Requests and token streams are small; Ray's default would take a third of the host's memory."""


def resolve_config(config: ClusterConfig) -> ClusterConfig:
    """``config`` as the replicas need it: a model that exists, absolute paths.

    Without a model, the casebook model that ships with this package is served with its adapters.
    Raises InvalidArgument for a missing directory, and for an adapter that takes the base model's name.
    """
    config = config if config.model.path else _with_embedded_model(config)
    model_dir = _existing_dir("model.path", config.model.path)
    model = config.model.model_copy(update={"path": str(model_dir), "name": config.model.name or model_dir.name})
    for adapter in config.adapters:
        if adapter.name == model.name:
            field = f"adapters.{adapter.name}.name"
            raise InvalidArgument(field, adapter.name, "is the base model's name", "Rename the adapter, or set model.name.")
    adapters = tuple(
        adapter.model_copy(update={"path": str(_existing_dir(f"adapters.{adapter.name}.path", adapter.path))})
        for adapter in config.adapters
    )
    gateway = config.gateway
    if gateway.session_store.startswith("sqlite:"):
        path = Path(gateway.session_store.removeprefix("sqlite:")).absolute()
        gateway = gateway.model_copy(update={"session_store": f"sqlite:{path}"})
    return config.model_copy(update={"model": model, "adapters": adapters, "gateway": gateway})


def _with_embedded_model(config: ClusterConfig) -> ClusterConfig:
    if not assets.is_shipped():
        problem = "is empty, and this installation lacks the casebook model, which is served without one"
        raise InvalidArgument("model.path", "", problem, "Name a Hugging Face checkpoint directory.")
    configured = {adapter.name for adapter in config.adapters}
    embedded = [AdapterConfig(name=n, path=str(path)) for n, path in assets.adapter_dirs().items() if n not in configured]
    model = config.model.model_copy(update={"path": str(assets.model_dir()), "name": config.model.name or EMBEDDED_MODEL_NAME})
    return config.model_copy(update={"model": model, "adapters": (*config.adapters, *embedded)})


def _existing_dir(field: str, path: str) -> Path:
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise InvalidArgument(field, path, "is not a directory", "Name an existing one.")
    return directory


def build_app(config: ClusterConfig) -> Application:
    """Gateways bound to workers, routed by prefix. Raises InvalidArgument for paths that are not there."""
    config = resolve_config(config)
    workers = serve.deployment(
        name="worker",
        num_replicas=config.worker.num_replicas,
        ray_actor_options={"num_cpus": config.worker.num_cpus, "num_gpus": config.worker.num_gpus},
        # The engine's own queue decides what waits, and refuses with a hint; Serve's limit must never bite first.
        max_ongoing_requests=2 * (config.scheduler.max_num_seqs + config.scheduler.max_num_waiting),
        request_router_config=router_config(config, directory_name(config.server.app_name)),
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,
    )(ForkKVWorker)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.num_replicas,
        ray_actor_options={"num_cpus": config.gateway.num_cpus},
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,
    )(AgentGateway)
    return gateway.bind(config, workers.bind(config))


def serve_app(config: ClusterConfig) -> Application:
    """For ``serve deploy``: ``import_path: forkkv_cluster.app:serve_app``, ``args:`` as in a configuration file."""
    return build_app(config)


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class RunningCluster:
    """A cluster on this host. ``stop`` it, or use it as a context manager."""

    config: ClusterConfig
    owns_ray: bool

    @property
    def http_url(self) -> str:
        return f"http://{self._reachable_host}:{self.config.server.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self._reachable_host}:{self.config.server.grpc_port}"

    @property
    def _reachable_host(self) -> str:
        host = self.config.server.host
        return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host

    def stop(self) -> None:
        """End the application, the directory, and Ray where this cluster started it. Harmless when repeated."""
        if not ray.is_initialized():
            return
        if self.owns_ray:
            # Drain the application, then end Ray with all that is left: Serve's controller would only complain of its end.
            serve.delete(self.config.server.app_name)
            ray.shutdown()
            return
        serve.shutdown()  # type: ignore[no-untyped-call]
        kill_directory(self.config.server.app_name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_cluster(config: ClusterConfig, *, log_level: str = "WARNING") -> RunningCluster:
    """Start everything on this host and wait until it serves. Port 0 takes a free one.

    Uses Ray if this process is connected to one, else starts a local one of its own. Raises InvalidArgument for what can be
    checked beforehand, and Unavailable when a deployment does not come up; then everything is stopped again.
    """
    config = resolve_config(_with_ports(config))
    logging.getLogger("ray.serve").setLevel(log_level)
    check_before_start(config)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        check_ports(config.server)  # A Ray that others started may run Serve on these very ports.
        _start_ray(config)
    cluster = RunningCluster(config, owns_ray)
    try:
        logs = LoggingConfig(log_level=log_level, enable_access_log=False)
        serve.start(
            http_options=HTTPOptions(host=config.server.host, port=config.server.http_port),
            grpc_options=gRPCOptions(
                port=config.server.grpc_port, grpc_servicer_functions=servicer_functions(config.server.host)
            ),
            logging_config=logs,
        )
        serve.run(build_app(config), name=config.server.app_name, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        reason = _why_not_up(config.server.app_name, error)
        cluster.stop()
        raise Unavailable(f"the cluster did not come up: {reason}") from None
    except (RayError, TimeoutError) as error:
        cluster.stop()
        raise Unavailable(
            f"the cluster did not come up: Ray Serve's proxies did not start ({type(error).__name__}). If the machine is busy, "
            "try again; else see the logs under /tmp/ray."
        ) from None
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _with_ports(config: ClusterConfig) -> ClusterConfig:
    server = config.server
    ports = {name: getattr(server, name) or free_port() for name in ("http_port", "grpc_port")}
    return config.model_copy(update={"server": server.model_copy(update=ports)})


def _start_ray(config: ClusterConfig) -> None:
    needed = config.worker.num_replicas * config.worker.num_cpus + config.gateway.num_replicas * config.gateway.num_cpus
    options: dict[str, Any] = {"num_gpus": 0} if config.worker.num_gpus == 0 else {}
    # Serve ends a proxy that is not up after three of these; with its default, 5 s, a busy machine starts none.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "20")
    # Ray's own notices would drown the banner; errors of replicas come back through serve.run.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(needed) + 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **options,
    )


def _why_not_up(app_name: str, error: RuntimeError) -> str:
    """What the replicas said: Serve's own error names only the deployments that failed."""
    status = serve.status().applications.get(app_name)
    failed = [] if status is None else [deployment.message for deployment in status.deployments.values() if deployment.message]
    return root_cause([str(error), *failed])


def root_cause(messages: list[str]) -> str:
    """The last line that names an error of ours, else the last line at all: messages of Serve end in a traceback."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(_OWN_ERRORS)]
    return (named or lines)[-1].removeprefix(_OWN_ERRORS)

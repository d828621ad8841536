"""What can be known to fail before Ray starts: half a minute earlier, and with nothing to stop again.

Only what is cheap and certain is checked here; a replica says the rest when it starts.
"""

from __future__ import annotations

import socket
from pathlib import Path

from forkkv_cluster.core.config import ClusterConfig, ServerConfig
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.gateway.sqlite_store import check_can_open


def check_before_start(config: ClusterConfig) -> None:
    """Checks files and the session store of a resolved configuration.

    Raises InvalidArgument, Unsupported or FailedPrecondition, naming the file.
    """
    check_checkpoint(Path(config.model.path), has_weights=config.model.load_format != "dummy")
    for adapter in config.adapters:
        check_adapter(Path(adapter.path))
    if config.gateway.session_store.startswith("sqlite:"):
        check_can_open(config.gateway.session_store.removeprefix("sqlite:"))


def check_checkpoint(directory: Path, *, has_weights: bool = True) -> None:
    """config.json is there and names a model that the engine runs; every safetensors file is whole."""
    from forkkv_cluster.engine.models.config import read_json  # Here and below: they need torch.
    from forkkv_cluster.engine.models.registry import family_of

    family_of(read_json(directory / "config.json").get("architectures"))
    if not has_weights:
        return
    index = directory / "model.safetensors.index.json"
    shards = set(read_json(index).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    for shard in sorted(shards):
        _check_safetensors(directory / shard)


def check_adapter(directory: Path) -> None:
    """adapter_config.json is JSON, and the safetensors file is whole."""
    from forkkv_cluster.engine.models.config import read_json

    read_json(directory / "adapter_config.json")
    _check_safetensors(directory / "adapter_model.safetensors")


def _check_safetensors(path: Path) -> None:
    from forkkv_cluster.engine.safetensors_reader import SafetensorsReader

    with SafetensorsReader(path):
        pass  # Opening reads the header and compares it with the length of the file.


def check_ports(server: ServerConfig) -> None:
    """Nobody listens there yet. Raises InvalidArgument that names ``server.http_port`` or ``server.grpc_port``."""
    if server.http_port == server.grpc_port:
        raise InvalidArgument("server.grpc_port", server.grpc_port, "is server.http_port, too", "Choose another one.")
    for field, port in (("server.http_port", server.http_port), ("server.grpc_port", server.grpc_port)):
        hosts = {server.host, "0.0.0.0"} if field == "server.grpc_port" else {server.host}  # Serve binds gRPC to all.
        for host in sorted(hosts):
            _check_port(field, host, port)


def _check_port(field: str, host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As servers do: a port whose last connections are still winding up counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise InvalidArgument(
            field,
            port,
            f"cannot be listened on at {host} ({error.strerror})",
            "Stop what uses it, or choose another; 0: a free one.",
        ) from None

"""Which runner a configuration asks for."""

from __future__ import annotations

from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.engine.torch_runner import TorchRunner


def make_runner(config: ClusterConfig) -> TorchRunner:
    """The configured model, whole or cut over several processes. Raises InvalidArgument or Unsupported that names the bad
    field."""
    if config.worker.tensor_parallel == 1:
        return TorchRunner.from_config(config)
    from forkkv_cluster.engine.shard_group import Leader  # Here: torch.distributed is not needed otherwise.

    return Leader.from_config(config)

"""Whether an engine would take an adapter, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapters import load_adapter
from forkkv_cluster.engine.models.config import ModelConfig


def check_adapter(path: str | Path, model: ModelConfig) -> AdapterInfo:
    """Read a PEFT directory as an fp32 engine over ``model`` would, and keep nothing but its facts (the name is the
    directory's). Raises as ``load_adapter``."""
    geometry = KVGeometry(model.num_layers, model.num_kv_heads, model.head_dim, page_size=1, dtype_bytes=4)
    norms = [torch.ones(model.head_dim)] * model.num_layers  # Facts do not depend on what K is normalised with.
    return load_adapter(Path(path).name, path, model, geometry, torch.float32, torch.device("cpu"), norms).info

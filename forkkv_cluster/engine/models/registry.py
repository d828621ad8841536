"""Which class runs which ``architectures[0]`` of a config.json."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.models.llama import LlamaModel, load_llama

ModelLoader = Callable[[ModelConfig, Callable[[str, tuple[int, ...]], Tensor]], LlamaModel]

_LOADERS: dict[str, ModelLoader] = {
    "LlamaForCausalLM": load_llama,
    "MistralForCausalLM": load_llama,
    "Qwen2ForCausalLM": load_llama,
    "Qwen3ForCausalLM": load_llama,
}


def loader_of(architectures: object) -> tuple[str, ModelLoader]:
    """The architecture's name and its loader. Raises Unsupported, naming those there are, for any other."""
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(name, str) or name not in _LOADERS:
        raise Unsupported("architectures", name, "is not supported", f"Use one of {', '.join(sorted(_LOADERS))}.")
    return name, _LOADERS[name]

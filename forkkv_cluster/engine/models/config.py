"""What the engine needs of a checkpoint's ``config.json``, and the refusal, by name, of what it cannot run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.engine.layers.rotary import RopeSettings
from forkkv_cluster.engine.models.family import Family
from forkkv_cluster.engine.models.rope_config import parse_rope

_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "image_token_id", "image_token_index")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder. Sizes in elements, ``max_position`` in tokens.

    ``sliding_window`` tokens: longest sequence of which no layer hides anything; None where there is no such limit.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    sliding_window: int | None
    rope: RopeSettings
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    o_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InvalidArgument, naming the file, when it is missing, broken or not an object."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument("path", str(path), f"cannot be read ({error.strerror})", "Name a complete directory.") from None
    except ValueError as error:
        raise InvalidArgument("path", str(path), f"is not JSON ({error})", "Download or save it again.") from None
    if not isinstance(value, dict):
        raise InvalidArgument("path", str(path), "is not a JSON object", "Download or save it again.")
    return value


def parse_config(config: Mapping[str, Any], family: Family, generation: Mapping[str, Any]) -> ModelConfig:
    """Check and convert ``config.json`` and ``generation_config.json`` (may be empty).

    Raises Unsupported for features that would change the result, InvalidArgument for missing or impossible sizes.
    """
    _refuse_features(config)
    num_heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    head_dim = _size(config, "head_dim", family.default_head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise InvalidArgument(
            "num_key_value_heads", num_kv_heads, f"does not fit {num_heads} heads of {head_dim} elements", "Mend config.json."
        )
    max_position = _size(config, "max_position_embeddings")
    num_layers = _size(config, "num_hidden_layers")
    window = family.sliding_window(config, num_layers)
    biases = family.biases(config)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position=max_position,
        sliding_window=window if window is not None and window < max_position else None,
        rope=parse_rope(config, max_position, head_dim),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=biases.qkv,
        qk_norm=family.has_qk_norm,
        o_bias=biases.o,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=_eos(config, generation),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(key, value, "is missing from config.json or is not a positive integer", "Mend config.json.")
    return value


def _refuse_features(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise Unsupported(
            "quantization_config",
            config["quantization_config"],
            "quantised weights are not supported",
            "Use a checkpoint in bf16.",
        )
    for keys, feature in ((_MOE_KEYS, "mixture of experts is"), (_MULTIMODAL_KEYS, "multimodal models are")):
        for key in keys:
            if config.get(key):
                raise Unsupported(key, config[key], f"{feature} not supported", "Use a dense text model.")
    if config.get("mlp_bias"):
        raise Unsupported("mlp_bias", True, "biases in the MLP are not supported", "Use a model without them.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise Unsupported("hidden_act", activation, "is not supported", "Use a model with silu.")
    unknown = sorted(set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    if unknown:
        raise Unsupported("layer_types", unknown, "are not supported", "Use a model of full_attention layers.")


def _eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """``generation_config.json`` wins over ``config.json``; either may hold one id or a list."""
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)

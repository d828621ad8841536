"""The rotary settings of a ``config.json``, in today's spelling and in that of older checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.engine.layers.rotary import RopeSettings

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def parse_rope(config: Mapping[str, Any], max_position: int, head_dim: int) -> RopeSettings:
    """Transformers 5 writes ``rope_parameters``, older versions ``rope_theta`` and ``rope_scaling``: both are read.

    Raises Unsupported for a rope type or option that this engine does not compute, InvalidArgument for a missing or
    impossible field.
    """
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise Unsupported("rope_type", rope_type, f"is not one of {', '.join(_ROPE_TYPES)}", "Use a model with one of these.")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported("partial_rotary_factor", rope, "partial rotation is not supported", "Use a model without it.")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor")
    if factor is None:  # DeepSeek and Phi leave it to the ratio of the two lengths.
        factor = max_position / original if rope_type in ("yarn", "longrope") else 1.0
    return RopeSettings(
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_type=rope_type,
        factor=float(factor),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position=int(original),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(rope_type, rope, float(factor), int(original)),
        short_factors=_short_factors(rope, head_dim) if rope_type == "longrope" else (),
        max_fixed_len=_max_fixed_len(rope_type, max_position, int(original)),
    )


def _attention_factor(rope_type: str, rope: Mapping[str, Any], factor: float, original: int) -> float:
    """What cosines and sines are multiplied with, so that attention stays as sharp over a longer context."""
    if rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope_type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, float(rope["mscale"])) / _mscale(factor, float(rope["mscale_all_dim"]))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _short_factors(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or len(factors) != head_dim // 2:
        raise InvalidArgument("short_factor", factors, f"is not a list of {head_dim // 2} numbers", "Mend config.json.")
    return tuple(float(value) for value in factors)


def _max_fixed_len(rope_type: str, max_position: int, original: int) -> int | None:
    """Length in tokens up to which the frequencies do not depend on it; None where they never do."""
    if rope_type == "dynamic":
        return max_position
    return original if rope_type == "longrope" else None

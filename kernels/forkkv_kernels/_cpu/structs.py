"""The structs of ``tables.h``, field by field in the same order: 64-bit integers, addresses among them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

_INT, _REAL = ctypes.c_int64, ctypes.c_double


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _struct(name: str, fields: str, types: Mapping[str, type] | None = None) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(f, (types or {}).get(f, _INT)) for f in _names(fields)]})


RESIDUAL_FIELDS = _names(
    "row_begin row_end slots_first slots_listed k_a k_stride k_rank k_b v_a v_stride v_rank v_b "
    "norm change change_stride merged_k merged_stride"
)
TILE_FIELDS = _names("first_position num_keys slots_first slots_listed num_rows rows limits num_residuals residuals")
LORA_PART_FIELDS = _names("rank_begin rank_end out_begin out_end b")
LORA_SEGMENT_FIELDS = _names("row_begin row_end rank a ones num_parts parts")

Decode = _struct(
    "Decode",
    "num_kv_heads group head_dim num_rows rows q out base_k base_v cos_sin num_tiles tiles num_threads",
)
Gather = _struct(
    "Gather",
    "num_kv_heads head_dim num_tokens slots_first slots_listed pool out out_stride packed packed_stride first_position "
    "num_residual residual_first residual_listed a stride rank b cos_sin norm change change_stride num_threads",
)
Lora = _struct("Lora", "in_size x out out_stride num_segments segments num_threads")
RopeStore = _struct(
    "RopeStore",
    "num_rows num_heads num_kv_heads head_dim qkv cos_sin q_norm k_norm eps q slots k_cache v_cache num_threads",
    {"eps": _REAL},
)


def num_threads() -> int:
    """As many as torch's own ops use."""
    return torch.get_num_threads()

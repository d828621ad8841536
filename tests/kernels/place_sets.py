"""Fewer places on a GPU, where compilation takes most of a test's time: not fp16 beside bf16, and products not in fp32."""

from __future__ import annotations

import torch

from tests.kernels.places import ALL_PLACES, TRITON_PLACES

REFERENCE = ALL_PLACES[0]


def _chosen(*gpu: torch.dtype) -> list[object]:
    return [place for place in TRITON_PLACES if place.values[0].name != "gpu" or place.values[0].dtype in gpu]


ROW_PLACES = _chosen(torch.float32, torch.bfloat16)
DOT_PLACES = _chosen(torch.bfloat16)

"""The layers of a decode step with LoRA beside the linears, held against the same with LoRA in place."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from forkkv_kernels.launch import interpreted

from forkkv_cluster.engine.gpu.side_stream import SideStream
from forkkv_cluster.engine.models.config import ModelConfig, parse_config
from forkkv_cluster.engine.models.llama import LLAMA
from forkkv_cluster.testing.decode_layers import DecodeLayers

ADAPTERS = [None, None, 0, 0, 0, 1, 3, 3]


def config(hidden_size: int) -> ModelConfig:
    sizes = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    widths = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "head_dim": hidden_size // 4}
    return parse_config({**sizes, **widths, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}, LLAMA, {})


@pytest.mark.parametrize("place", ["references", pytest.param("interpreter", marks=pytest.mark.interpreter)])
def test_what_is_added_by_the_next_kernel_is_what_would_be_added_in_place(place: str) -> None:
    device = torch.device("cpu")
    layers = DecodeLayers(config(64), len(ADAPTERS), 4, 8, torch.float32, device)
    with interpreted() if place == "interpreter" else nullcontext():
        plain, in_place, beside = (
            step() for step in (layers.plain_step(), layers.step(ADAPTERS, None), layers.step(ADAPTERS, SideStream(device)))
        )
    torch.testing.assert_close(beside, in_place, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beside[:2], plain[:2], atol=1e-6, rtol=1e-6)
    assert ((beside - plain)[2:].norm(dim=1) > 0.01 * plain[2:].norm(dim=1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_with_adapters_gives_what_one_without_a_side_stream_gives(dtype: torch.dtype) -> None:
    """In every replay to the bit the same: nothing is read before it is there, or after it is gone."""
    device = torch.device("cuda")
    layers = DecodeLayers(config(1024), len(ADAPTERS), 4, 16, dtype, device)
    step, in_place = layers.step(ADAPTERS, SideStream(device)), layers.step(ADAPTERS, None)().float()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        uncaptured = step().float()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    graph.replay()
    first = found.clone()
    for wanted in (uncaptured, in_place):
        assert (first.float() - wanted).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()
    for _ in range(100):
        found.zero_()
        graph.replay()
        assert torch.equal(found, first)

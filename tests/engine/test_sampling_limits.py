"""What ``SamplingParams.validate`` lets through, the sampler can draw from: an error in a step would end the whole worker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forkkv_cluster.core.request import MAX_STOP_TOKENS, SamplingParams
from forkkv_cluster.engine.sampler import sample
from forkkv_cluster.engine.sampling_row import SamplingRow

VOCAB_SIZE = 300
EOS = (0, 299)


@pytest.mark.parametrize("temperature", [0.0, 1e-20, 100.0])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0, "min_p": 1.0},
        {"logit_bias": tuple((token, -100.0) for token in range(VOCAB_SIZE)), "top_p": 5e-324},
        {"stop_token_ids": tuple(range(MAX_STOP_TOKENS)), "min_tokens": 16, "logprobs": 20},
        {"stop_token_ids": (VOCAB_SIZE - 1,), "min_tokens": 16, "top_k": 2**31 - 1},
    ],
)
def test_the_ends_of_the_ranges_draw_a_token_that_is_allowed(temperature: float, options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=temperature, seed=3, **options)
    params.validate(VOCAB_SIZE)
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 1e4
    row = SamplingRow(params, 8, np.arange(20, 30, dtype=np.int32), num_prompt=4)
    (token,) = sample(logits, [row], EOS)
    held_back = {*params.stop_token_ids, *EOS} if params.min_tokens else set()
    assert token.token_id in set(range(VOCAB_SIZE)) - held_back

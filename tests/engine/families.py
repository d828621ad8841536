"""Small random checkpoints of every supported family, and the logits of their rows under Hugging Face and our engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forkkv_cluster.engine.model_runner import ModelRunner
from tests.engine.hand_scheduler import HandScheduler, Span

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64,
             "beta_fast": 8.0, "beta_slow": 0.5}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 128,
             "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [3.0, 5.0, 7.0, 9.0]}  # fmt: skip
TOKENS = [(7 * i * i + 3) % 300 for i in range(100)]


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | options)))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama2-mha": lambda: llama(num_key_value_heads=4),
    "llama-gqa": llama,
    "llama-mqa": lambda: llama(num_key_value_heads=1),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biased-wide-heads": lambda: llama(attention_bias=True, head_dim=16),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "linear-rope": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}),
    "yarn-rope": lambda: llama(rope_parameters=YARN_ROPE),
    "yarn-rope-smooth": lambda: llama(rope_parameters={**YARN_ROPE, "truncate": False, "attention_factor": 0.7}),
    "yarn-rope-mscale": lambda: llama(rope_parameters={**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "dynamic-rope": lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0}),
    "mistral": lambda: mistral(),
    "mistral-tied-wide-heads": lambda: mistral(tie_word_embeddings=True, head_dim=16, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: qwen2(),
    "qwen2-mha-tied": lambda: qwen2(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2-yarn-rope": lambda: qwen2(rope_parameters=YARN_ROPE),
    "qwen3": lambda: qwen3(),
    "qwen3-biased-tied": lambda: qwen3(attention_bias=True, tie_word_embeddings=True),
    "qwen3-yarn-rope": lambda: qwen3(num_key_value_heads=1, rope_parameters=YARN_ROPE),
}


def mistral(**options: Any) -> Any:
    return MistralForCausalLM(MistralConfig(**(SMALL | {"sliding_window": None} | options)))


def qwen2(**options: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**(SMALL | options)))


def qwen3(**options: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**(SMALL | {"head_dim": 16} | options)))


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save with biases and norms that are not what they are initialised to (zeros and ones would hide a mistake)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(str(directory), **options)
    return directory


def hugging_face_logits(model: Any, tokens: Sequence[int] = TOKENS) -> Tensor:
    """[len(tokens), V] fp32."""
    with torch.no_grad():
        return model.eval()(torch.tensor([list(tokens)])).logits[0].float()


def engine_logits(
    runner: ModelRunner, sizes: Sequence[int] = (len(TOKENS),), lora: int | None = None, tokens: Sequence[int] = TOKENS
) -> Tensor:
    """[len(tokens), V] fp32, run in chunks of ``sizes``; the last size repeats."""
    scheduler = HandScheduler(runner)
    pages = scheduler.pages(len(tokens))
    logits, start = [], 0
    while start < len(tokens):
        end = min(start + sizes[min(len(logits), len(sizes) - 1)], len(tokens))
        logits += scheduler.run(Span(tokens, start, end, pages, lora=lora))
        start = end
    return torch.cat(logits)


def assert_same_answers(actual: Tensor, wanted: Tensor) -> None:
    """Within 1e-4, and the same greedy token wherever the two best are more than 1e-3 apart."""
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)
    top = wanted.topk(2, dim=-1).values
    is_clear = top[:, 0] - top[:, 1] > 1e-3
    assert torch.equal(actual.argmax(-1)[is_clear], wanted.argmax(-1)[is_clear])

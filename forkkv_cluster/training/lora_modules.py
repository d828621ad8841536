"""What a projection gives out, base and adapter apart, from the modules that peft has put into a Transformers model.

peft's own forward adds both up; under sharing they come from different passes. An adapter is named by each call, so that no
module has a state to be switched. Plain LoRA alone: what else there is was refused when the adapter was opened.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import linear


def base_part(module: Any, x: Tensor) -> Tensor:
    """x [..., in] W + b, of the base model -> [..., out]."""
    out: Tensor = module.get_base_layer()(x) if isinstance(module, LoraLayer) else module(x)
    return out


def adapter_part(module: Any, x: Tensor, adapter: str) -> Tensor | None:
    """x [..., in] A B s -> [..., out] in x's dtype, through which gradients reach A and B; None where it is not targeted.

    Factors are kept in fp32 and rounded to x's dtype here, as an engine of that dtype rounds them when it loads them. A bias
    of B (``lora_bias``) is scaled like the rest.
    """
    if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
        return None
    a: Any = module.lora_A[adapter]
    b: Any = module.lora_B[adapter]
    scaling: float = module.scaling[adapter]
    shrunk = linear(module.lora_dropout[adapter](x), a.weight.to(x.dtype))
    bias = b.bias.to(x.dtype) if b.bias is not None else None
    return linear(shrunk, b.weight.to(x.dtype), bias) * scaling


def project(module: Any, x: Tensor, adapter: str | None) -> Tensor:
    """Both -> [..., out]; ``adapter`` None is the base model."""
    base = base_part(module, x)
    added = adapter_part(module, x, adapter) if adapter is not None else None
    return base if added is None else base + added

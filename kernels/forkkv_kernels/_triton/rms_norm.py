"""y = x / sqrt(mean(x^2) + eps) * weight, one program for a row, which it holds in registers between its two passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, x_stride, delta_ptr, delta_stride, added_ptr, added_stride, weight_ptr, out_ptr, width, eps,
    HAS_DELTA: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=is_inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=is_inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * delta_stride + columns, mask=is_inside, other=0.0)
        if HAS_ADDED:
            added = tl.load(added_ptr + row * added_stride + columns, mask=is_inside, other=0.0)
            delta = (delta.to(tl.float32) + added.to(tl.float32)).to(delta.dtype)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + row * x_stride + columns, x, mask=is_inside)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    # Rounded before the product: what Hugging Face checkpoints were trained with.
    normed = (wide * inverse).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (normed * weight.to(tl.float32)).to(x.dtype), mask=is_inside)


def add_rms_norm_(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """x [T, H] += delta [T, H] (+ added [T, H]) in place where there is one -> the norm [T, H]. Rows may be strided."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width)
    if num_rows and width:
        block = triton.next_power_of_2(width)
        _add_rms_norm_kernel[(num_rows,)](
            x, x.stride(0), *_rows_of(delta, x), *_rows_of(added, x), weight, out, width, eps,
            HAS_DELTA=delta is not None, HAS_ADDED=added is not None, BLOCK=block, num_warps=_num_warps(block, num_rows),
        )  # fmt: skip
    return out


def _rows_of(tensor: Tensor | None, instead: Tensor) -> tuple[Tensor, int]:
    """The tensor and its stride; another one, not to be read, for None."""
    return (instead, 0) if tensor is None else (tensor, tensor.stride(0))


def _num_warps(block: int, num_rows: int) -> int:
    """Few rows wait for the latency of one, so more threads share it; many rows fill the card with small programs."""
    elements = 8 if num_rows <= 256 else 16
    return min(16, max(1, block // (32 * elements)))


def aot_variants() -> list[AotVariant]:
    """Few and many rows of a wide model, and a width that is no power of two."""
    return [_variant("bf16", 4096, 32, True), _variant("bf16", 4096, 8192, True), _variant("fp16", 3584, 32, False)]


def _variant(dtype: str, width: int, num_rows: int, has_delta: bool) -> AotVariant:
    block = triton.next_power_of_2(width)
    signature = dict.fromkeys(("x_ptr", "delta_ptr", "added_ptr", "weight_ptr", "out_ptr"), f"*{dtype}") | {"eps": "fp32"}
    signature |= dict.fromkeys(("x_stride", "delta_stride", "added_stride", "width"), "i32:16")
    constants = {"HAS_DELTA": has_delta, "HAS_ADDED": has_delta, "BLOCK": block}
    name = f"rms_norm_{dtype}_{width}x{num_rows}{'_add' if has_delta else ''}"
    return AotVariant(_add_rms_norm_kernel, signature, constants, _num_warps(block, num_rows), 3, name)

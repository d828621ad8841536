"""y = silu(gate) * up, one program for a piece of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant

_BLOCK = 2048
_NUM_WARPS = 8


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, row_stride, added_ptr, added_stride, out_ptr, width, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    start = gate_up_ptr + row * row_stride
    gate = tl.load(start + columns, mask=is_inside, other=0.0)
    up = tl.load(start + width + columns, mask=is_inside, other=0.0)
    if HAS_ADDED:
        start = added_ptr + row * added_stride
        gate = (gate.to(tl.float32) + tl.load(start + columns, mask=is_inside, other=0.0).to(tl.float32)).to(gate.dtype)
        up = (up.to(tl.float32) + tl.load(start + width + columns, mask=is_inside, other=0.0).to(tl.float32)).to(up.dtype)
    wide = gate.to(tl.float32)
    # Rounded in between, as the reference does: silu(gate) is a tensor of its own there.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up.to(tl.float32)).to(gate.dtype), mask=is_inside)


def silu_mul(gate_up: Tensor, added: Tensor | None) -> Tensor:
    """gate_up [T, 2 I] (+ added [T, 2 I]), rows may be strided -> [T, I]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows and width:
        block = min(_BLOCK, max(32, triton.next_power_of_2(width)))
        grid = (num_rows, triton.cdiv(width, block))
        other = gate_up if added is None else added
        _silu_mul_kernel[grid](
            gate_up, gate_up.stride(0), other, other.stride(0), out, width,
            HAS_ADDED=added is not None, BLOCK=block, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out


def aot_variants() -> list[AotVariant]:
    return [_variant("bf16", False), _variant("bf16", True), _variant("fp16", True)]


def _variant(dtype: str, has_added: bool) -> AotVariant:
    signature = dict.fromkeys(("gate_up_ptr", "added_ptr", "out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("row_stride", "added_stride", "width"), "i32:16")
    constants = {"HAS_ADDED": has_added, "BLOCK": _BLOCK}
    return AotVariant(_silu_mul_kernel, signature, constants, _NUM_WARPS, 3, f"silu_mul_{dtype}{'_added' if has_added else ''}")

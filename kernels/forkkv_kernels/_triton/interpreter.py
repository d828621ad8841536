"""A repair of Triton's interpreter, which runs kernels on the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import triton


def accept_loop_bounds() -> None:
    """Bounds of loops that are known at run time only: Triton (3.6) makes numbers of them by int(array of one element), which
    numpy refuses from 2.4 on."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter  # Here: of no use without the knob.

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

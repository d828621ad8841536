"""Sizes of KV memory: pure arithmetic, no tensors.

One arena per worker, [num_layers, 2, num_elems] (plane 0 holds K or x A_k, plane 1 holds V or x A_v), is cut into
slabs. A slab is ``slab_width`` elements wide per token, plane and layer, and ``page_size`` tokens long. The width is a
common multiple of a base row (Hkv * D elements) and of every rank class, so that whole pages of any class fill a slab
and page ids are dense in each class's view of the arena:

    base page p          arena[l, plane].view(-1, P, Hkv, D)[p]
    residual page p (r)  arena[l, plane].view(-1, P, r)[p]

Example: Hkv * D = 1024 and rank classes up to 128 give slab_width 1024: one base page or 64 residual pages of rank 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from forkkv_cluster.core.errors import InvalidArgument

RANK_CLASSES = (8, 16, 32, 64, 128)
"""Widths of residual pages. An adapter takes the smallest that holds its k and v ranks; no padding to the largest."""


@dataclass(frozen=True)
class KVGeometry:
    """Shape of the KV memory of one model. ``dtype_bytes`` is the size of one element, ``page_size`` counts tokens.

    Raises InvalidArgument for a size that is not positive, or rank classes that do not ascend.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype_bytes: int
    rank_classes: tuple[int, ...] = RANK_CLASSES

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size", "dtype_bytes"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, getattr(self, name), "must be at least 1", "Take it from the model's config.")
        if not self.rank_classes or list(self.rank_classes) != sorted({c for c in self.rank_classes if c > 0}):
            raise InvalidArgument("rank_classes", self.rank_classes, "must ascend and be positive", "Use 8, 16, 32, 64, 128.")

    @property
    def base_width(self) -> int:
        """Elements of one token, plane and layer of a base page: Hkv * D."""
        return self.num_kv_heads * self.head_dim

    @cached_property
    def slab_width(self) -> int:
        """Elements of one token, plane and layer of a slab."""
        return math.lcm(self.base_width, *self.rank_classes)

    @property
    def slab_elems(self) -> int:
        """Elements of one slab in one plane of one layer."""
        return self.slab_width * self.page_size

    @property
    def slab_bytes(self) -> int:
        """Bytes of one slab over all layers and both planes."""
        return self.num_layers * 2 * self.slab_elems * self.dtype_bytes

    @property
    def base_bytes_per_token(self) -> int:
        """Bytes of one token's base KV over all layers."""
        return self.bytes_per_token(None)

    def page_width(self, rank_class: int | None) -> int:
        """Elements of one token, plane and layer of a page: base (None) or residual of that rank class.

        Raises InvalidArgument for a number that is not a rank class.
        """
        if rank_class is None:
            return self.base_width
        if rank_class not in self.rank_classes:
            raise InvalidArgument("rank_class", rank_class, f"is not one of {self.rank_classes}", "Ask rank_class(rank).")
        return rank_class

    def bytes_per_token(self, rank_class: int | None) -> int:
        """Bytes of one token over all layers: base (None) or residual of that rank class."""
        return self.num_layers * 2 * self.page_width(rank_class) * self.dtype_bytes

    def page_bytes(self, rank_class: int | None) -> int:
        """Bytes of one page over all layers: base (None) or residual of that rank class."""
        return self.page_size * self.bytes_per_token(rank_class)

    def pages_per_slab(self, rank_class: int | None) -> int:
        """Pages in one slab: base (None) or residual of that rank class."""
        return self.slab_width // self.page_width(rank_class)

    def num_slabs(self, kv_bytes: int) -> int:
        """Whole slabs in ``kv_bytes``. Raises InvalidArgument when not even one fits."""
        num_slabs = kv_bytes // self.slab_bytes
        if num_slabs < 1:
            raise InvalidArgument(
                "kv_bytes", kv_bytes, f"is less than one slab ({self.slab_bytes} bytes)", "Give the worker more KV memory."
            )
        return num_slabs

    def rank_class(self, rank: int) -> int:
        """The smallest rank class that holds ``rank``. Raises InvalidArgument when none does."""
        for rank_class in self.rank_classes:
            if 0 < rank <= rank_class:
                return rank_class
        raise InvalidArgument(
            "lora_rank", rank, f"is not from 1 to {self.rank_classes[-1]} on k and v", "Train the adapter with a smaller rank."
        )

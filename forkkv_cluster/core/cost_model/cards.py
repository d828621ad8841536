"""Cards, with the two ceilings that bound every step: bytes a second, and matrix arithmetic a second."""

from __future__ import annotations

from dataclasses import dataclass, replace

from forkkv_cluster.core.errors import InvalidArgument

MIB, GIB = 2**20, 2**30
_COPY_SHARE, _MATMUL_SHARE = 0.90, 0.80
"""Of the datasheet's rates, what was measured on both Hopper cards (copy 0.90 and 0.89, matrix product 0.81 and 0.80): the
estimate for cards that were not measured."""


@dataclass(frozen=True, slots=True)
class Card:
    """``tb_per_s``: a copy within the card, counting bytes read and written. ``tflop_per_s``: a large bf16 matrix product."""

    name: str
    memory_bytes: int
    tb_per_s: float
    tflop_per_s: float
    source: str

    def with_measured(self, memory_bytes: int | None, tb_per_s: float | None, tflop_per_s: float | None) -> Card:
        """The card with what an operator measured in place of the table's numbers."""
        if (memory_bytes, tb_per_s, tflop_per_s) == (None, None, None):
            return self
        return replace(
            self,
            memory_bytes=memory_bytes or self.memory_bytes,
            tb_per_s=tb_per_s or self.tb_per_s,
            tflop_per_s=tflop_per_s or self.tflop_per_s,
            source=f"given, the rest {self.source}",
        )


def _estimated(name: str, memory_bytes: int, datasheet_tb_per_s: float, datasheet_tflop_per_s: float) -> Card:
    tb_per_s, tflop_per_s = _COPY_SHARE * datasheet_tb_per_s, _MATMUL_SHARE * datasheet_tflop_per_s
    return Card(name, memory_bytes, tb_per_s, tflop_per_s, "estimated: 0.90 and 0.80 of the datasheet's rates")


CARDS = {
    card.name.lower(): card
    for card in (
        # Datasheets: 3.35 TB/s and 989 TFLOP/s; 4.8 and 989; dense bf16 in all of them.
        Card("H100", 81559 * MIB, 3.0, 798, "measured, H100 80GB HBM3 (SXM), torch 2.11"),
        Card("H200", 143771 * MIB, 4.29, 791, "measured, H200, torch 2.11"),
        _estimated("A100", 80 * GIB, 2.039, 312),  # SXM, 80 GB
        _estimated("L4", 23 * GIB, 0.300, 121),  # 24 GB, of which ECC and the driver leave 23
    )
}


def card_named(name: str) -> Card:
    """Raises InvalidArgument, naming those there are."""
    if name.lower() not in CARDS:
        known = ", ".join(card.name for card in CARDS.values())
        remedy = f"Name one of {known}, and for another card its --memory, --tb-per-s and --tflop-per-s beside the nearest."
        raise InvalidArgument("card", name, "is not in the table", remedy)
    return CARDS[name.lower()]

"""What the cost model expects of RESULTS.md's lines: ``python kernels/benchmarks/predictions.py [H100 H200 kit.json ...]``.

Cards of the table, or the card that a run of the kit measured.

Llama-3.1-8B, bf16, 32k shared tokens. A floor is what the card's ceilings allow, an expectation takes off what kernels usually
lose (``core.cost_model.work.Efficiency``). A ratio is the baseline's time over ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where nothing is installed

from forkkv_cluster.core.cost_model.cards import Card, card_named
from forkkv_cluster.core.cost_model.memory import Policy
from forkkv_cluster.core.cost_model.plan import make_plan
from forkkv_cluster.core.cost_model.shapes import LLAMA_3_1_8B as MODEL
from forkkv_cluster.core.cost_model.shapes import LoraShape, Workload
from forkkv_cluster.core.cost_model.work import FLOOR, Efficiency, Work, decode_work, own_attention, shared_attention

CONTEXT, LAYERS = 32768, MODEL.num_layers
ALL_LINEARS = LoraShape(16, ("q", "k", "v", "o", "gate", "up", "down"))


class Prediction(NamedTuple):
    """floor and expected: of the same quantity, milliseconds or ratios; target as RESULTS.md has it."""

    line: str
    target: str
    floor: str
    expected: str


def predictions(card: Card) -> Iterator[Prediction]:
    usual = Efficiency()

    def layer_ms(work: Work, efficiency: Efficiency) -> float:
        return 1e3 * work.seconds(card, efficiency.decode_bytes, efficiency.decode_flop) / LAYERS

    def pair(line: str, target: str, work: Work, baseline: Work, baseline_shares: tuple[Efficiency, Efficiency]) -> Prediction:
        texts = (
            f"{layer_ms(work, ours):.3f} ms, {layer_ms(baseline, theirs) / layer_ms(work, ours):.2f}x"
            for ours, theirs in zip((FLOOR, usual), baseline_shares, strict=True)
        )
        return Prediction(line, target, *texts)

    def separate(agents: int, has_residual: bool) -> Work:
        return own_attention(MODEL, Workload(agents=agents, adapters=agents), agents, CONTEXT, has_residual)

    plain, sdpa = separate(16, False), (FLOOR, FLOOR)  # SDPA was measured at the copy's rate
    yield pair("decode, 16 x 32k, rank 0", "0.9x of SDPA", plain, plain, sdpa)
    yield pair("decode, 16 x 32k, rank 16", "0.87x of rank 0", separate(16, True), plain, (FLOOR, usual))
    alone = separate(32, False)
    for line, target, adapters, targets in (
        ("grouped, 32 agents, 32 adapters on q, k, v", "4x", 32, ("q", "k", "v")),
        ("grouped, 32 agents, 8 adapters on q, k, v", "8x", 8, ("q", "k", "v")),
        ("grouped, 32 agents, 32 adapters on q, v", "12x", 32, ("q", "v")),
    ):
        workload = Workload(CONTEXT, 32, adapters, lora=LoraShape(16, targets))
        yield pair(line, target, shared_attention(MODEL, workload, 32, adapters, 1, True), alone, sdpa)
    steps = {
        adapters: decode_work(policy, MODEL, Workload(1, 32, 8, lora=ALL_LINEARS), 32, adapters, 0).linears
        for adapters, policy in ((0, Policy.NO_ADAPTERS), (8, Policy.BASE))
    }
    shares = [
        steps[8].seconds(card, e.streaming, e.prefill) / steps[0].seconds(card, e.streaming, e.prefill) for e in (FLOOR, usual)
    ]
    yield Prediction("LoRA on all linears, batch 32, 8 adapters", "at most +10 %", *(f"+{100 * s - 100:.1f} %" for s in shares))
    yield from end_to_end(card)


def end_to_end(card: Card) -> Iterator[Prediction]:
    workload = Workload(CONTEXT, 16, 16, turns=3, input=128, output=128)
    ideal, usual = make_plan(MODEL, card, workload, FLOOR), make_plan(MODEL, card, workload)
    for to, target in ((Policy.ISOLATED, "5x"), (Policy.NO_ADAPTERS, "0.9x")):
        ratios = [plan.ratio(Policy.EAGER, to) for plan in (ideal, usual)]
        name = f"eager against {to.value}, 16 agents" + ("" if ideal[to].fits else f" ({ideal[to].capacity} fit)")
        yield Prediction(name, target, *("none fits" if ratio is None else f"{ratio:.2f}x" for ratio in ratios))
    made = usual[Policy.EAGER]
    if made.decode_step_s is not None and made.decode_step_floor_s is not None:
        step = f"{1e3 * made.decode_step_s:.1f} ms, {made.decode_step_s / made.decode_step_floor_s:.2f}x"
        yield Prediction("decode step of eager, batch 16", "2x of its floor", f"{1e3 * made.decode_step_floor_s:.1f} ms", step)


def measured_card(path: Path) -> Card:
    """From what the kit wrote."""
    facts = json.loads(path.read_text())["facts"]
    card = facts["card"]
    return Card(
        card["name"], card["memory_bytes"], facts["copy_tb_per_s"], facts["matmul_tflop_per_s"], f"measured, {path.name}"
    )


def main() -> None:
    for name in sys.argv[1:] or ["H100", "H200"]:
        card = measured_card(Path(name)) if name.endswith(".json") else card_named(name)
        print(f"{card.name}: {card.tb_per_s:.2f} TB/s, {card.tflop_per_s:.0f} TFLOP/s ({card.source})\n")
        print("| line | target | at the ceilings | expected |\n| --- | --- | --- | --- |")
        for made in predictions(card):
            print("| " + " | ".join(made) + " |")
        print()


if __name__ == "__main__":
    main()

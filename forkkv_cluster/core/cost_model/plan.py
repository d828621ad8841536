"""The plan of a workload on a card: what each policy holds, how long its parts take, and what comes out a second."""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.core.cost_model.cards import Card
from forkkv_cluster.core.cost_model.memory import KVBytes, Policy, adapters_of, capacity, kv_bytes, pool_bytes
from forkkv_cluster.core.cost_model.shapes import ModelShape, Workload
from forkkv_cluster.core.cost_model.work import FLOOR, Efficiency, decode_work, extend_seconds


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """One policy. Times in seconds on an otherwise idle card.

    kv: with every agent after its last turn. capacity: agents that fit at once. fits: all of them. batch: agents that decode
    together.
    context_s: all passes over the shared context before the last agent can start. fork_ttft_s: first token of one more agent
    with an adapter that has not been here, over a context that the base model has run. decode_step_floor_s: the card's
    ceilings alone; decode_step_s: with the expected efficiency. run_s: the whole workload. None where not one agent fits.
    """

    policy: Policy
    kv: KVBytes
    capacity: int
    fits: bool
    batch: int
    context_s: float
    fork_ttft_s: float
    decode_step_floor_s: float | None
    decode_step_s: float | None
    run_s: float | None
    output_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    model: ModelShape
    card: Card
    workload: Workload
    pool_bytes: int
    policies: tuple[PolicyPlan, ...]

    def __getitem__(self, policy: Policy) -> PolicyPlan:
        return next(made for made in self.policies if made.policy is policy)

    def ratio(self, policy: Policy, to: Policy = Policy.ISOLATED) -> float | None:
        """Throughput beside that of another policy; None where one of them does not run."""
        ours, theirs = self[policy].output_tokens_per_s, self[to].output_tokens_per_s
        return ours / theirs if ours is not None and theirs is not None else None


def make_plan(
    model: ModelShape,
    card: Card,
    workload: Workload,
    efficiency: Efficiency | None = None,
    utilization: float = 0.9,
    reserve_bytes: int = 2 * 2**30,
) -> Plan:
    """Raises InvalidArgument for targets or ranks that the model cannot have."""
    pool = pool_bytes(model, workload, card, utilization, reserve_bytes)
    made = tuple(_policy_plan(policy, model, card, workload, efficiency or Efficiency(), pool) for policy in Policy)
    return Plan(model, card, workload, pool, made)


def context_seconds(
    policy: Policy, model: ModelShape, card: Card, workload: Workload, efficiency: Efficiency
) -> tuple[float, float]:
    """(the base model's pass over the shared context, one adapter's own pass over it, 0 where it needs none)."""
    lora, length = workload.lora, workload.context
    plain = extend_seconds(model, card, efficiency, length, 0)
    adapted = lora.num_params(model)
    kv_products = 2 * model.num_layers * model.hidden_size * model.kv_size
    match policy:
        case Policy.ISOLATED:
            return 0.0, extend_seconds(model, card, efficiency, length, 0, extra_params=adapted)
        case Policy.RESIDUAL:  # base K and V are there: their products alone are saved
            return plain, extend_seconds(model, card, efficiency, length, 0, adapted, saved_params=kv_products)
        case Policy.EAGER:  # x [A_1 | ... | A_N] of k and v in the base model's pass
            columns = workload.adapters * lora.rank * len({"k", "v"} & {*lora.targets})
            shrinks = model.num_layers * model.hidden_size * columns
            return extend_seconds(model, card, efficiency, length, 0, extra_params=shrinks), 0.0
        case Policy.BASE | Policy.NO_ADAPTERS:
            return plain, 0.0


def _policy_plan(
    policy: Policy, model: ModelShape, card: Card, workload: Workload, efficiency: Efficiency, pool: int
) -> PolicyPlan:
    most = capacity(policy, model, workload, pool)
    batch = min(workload.agents, most)
    shared_s, adapter_s = context_seconds(policy, model, card, workload, efficiency)
    adapted = workload.lora.num_params(model) if policy is not Policy.NO_ADAPTERS else 0
    turn_s = extend_seconds(model, card, efficiency, workload.input, workload.context, adapted)
    context_s = shared_s + workload.adapters * adapter_s
    kv = kv_bytes(policy, model, workload)
    if batch == 0:
        return PolicyPlan(policy, kv, most, False, 0, context_s, adapter_s + turn_s, None, None, None, None)
    work = decode_work(policy, model, workload, batch, adapters_of(batch, workload), workload.own_tokens / 2)
    step_s = work.seconds(card, efficiency)
    # Agents that do not fit take turns, and each finds its adapter's pass over the context evicted when its turn comes again.
    passes = 1 if batch == workload.agents else workload.turns
    rounds = -(-workload.agents // batch)
    run_s = (
        shared_s
        + passes * workload.adapters * adapter_s
        + workload.turns * (workload.agents * turn_s + rounds * workload.output * step_s)
    )
    return PolicyPlan(
        policy=policy,
        kv=kv,
        capacity=most,
        fits=batch == workload.agents,
        batch=batch,
        context_s=context_s,
        fork_ttft_s=adapter_s + turn_s,
        decode_step_floor_s=work.seconds(card, FLOOR),
        decode_step_s=step_s,
        run_s=run_s,
        output_tokens_per_s=workload.agents * workload.turns * workload.output / run_s,
    )

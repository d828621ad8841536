"""Bytes of KV under each policy, and how many agents a pool holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from forkkv_cluster.core.cost_model.cards import Card
from forkkv_cluster.core.cost_model.shapes import ELEMENT_BYTES, ModelShape, Workload

_MOST_AGENTS = 1 << 20


class Policy(StrEnum):
    """How agents use the shared context: a branch's ``sharing``, or agents without adapters, the ceiling of all of them."""

    ISOLATED = "isolated"
    RESIDUAL = "residual"
    EAGER = "eager"
    BASE = "base"
    NO_ADAPTERS = "no adapters"


@dataclass(frozen=True, slots=True)
class KVBytes:
    """base: of the shared context, all copies. residual: of the shared context, all adapters. own: all agents' own tokens."""

    base: int
    residual: int
    own: int

    @property
    def total(self) -> int:
        return self.base + self.residual + self.own


def kv_bytes(policy: Policy, model: ModelShape, workload: Workload, agents: int | None = None) -> KVBytes:
    """For ``agents`` (left out: the workload's), the workload's share of them with an adapter of their own."""
    agents = workload.agents if agents is None else agents
    adapters = adapters_of(agents, workload)
    base, residual = model.base_bytes_per_token, workload.lora.residual_bytes_per_token(model)
    copies = adapters if policy is Policy.ISOLATED else 1
    has_residual = policy in (Policy.RESIDUAL, Policy.EAGER)
    own = base if policy in (Policy.ISOLATED, Policy.NO_ADAPTERS) else base + residual
    return KVBytes(
        base=copies * workload.context * base,
        residual=adapters * workload.context * residual if has_residual else 0,
        own=agents * workload.own_tokens * own,
    )


def adapters_of(agents: int, workload: Workload) -> int:
    """Distinct adapters among so many agents: the workload's share, rounded up."""
    return -(-agents * workload.adapters // workload.agents)


def pool_bytes(model: ModelShape, workload: Workload, card: Card, utilization: float, reserve_bytes: int) -> int:
    """What is left for KV: ``utilization`` of the card without weights, adapters and ``reserve_bytes`` for activations,
    graphs and workspaces. Not below 0."""
    adapters = workload.adapters * workload.lora.num_params(model) * ELEMENT_BYTES
    return max(0, int(card.memory_bytes * utilization) - model.weight_bytes - adapters - reserve_bytes)


def capacity(policy: Policy, model: ModelShape, workload: Workload, pool: int) -> int:
    """The most agents whose KV, after their last turn, fits the pool together; 0 where not one does."""
    least, most = 0, 1
    while most < _MOST_AGENTS and kv_bytes(policy, model, workload, most).total <= pool:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if kv_bytes(policy, model, workload, middle).total <= pool:
            least = middle
        else:
            most = middle
    return least

"""Batches of decode rows as an engine would lay them out, with garbage everywhere else: both planes are NaN where no cached
position points, pages lie in random order, page tables end in numbers of pages that do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from forkkv_kernels.ops.combine_partials import combine_partials, new_partials
from forkkv_kernels.ops.residual_attention_decode import DecodeRows, Residuals, residual_attention_decode
from forkkv_kernels.ops.residual_attention_grouped import SharedRuns, residual_attention_grouped
from forkkv_kernels.reference.rope_basis import RopeBasis, rope_basis
from torch import Tensor

NO_PAGE = 2**30
CLASSES = (8, 16, 32, 64, 128)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Of the norm of what is wanted; float16 and bfloat16 round K, V, the weights and the output."""


@dataclass(frozen=True)
class Agent:
    """kv_len tokens, the row's own included; the first residual_len of them have a residual of adapter."""

    kv_len: int
    residual_len: int = 0
    adapter: int = -1


@dataclass(frozen=True)
class Shape:
    """shared_len: first tokens that all agents have in common, and that those of one adapter have in common residuals for;
    is_copied: each agent has pages of its own for them all the same, with equal contents."""

    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 32
    page_size: int = 16
    ranks: Sequence[tuple[int, int]] = ((4, 4),)
    """(r_k, r_v) of each adapter."""
    is_normed: bool = False
    stack_rank: int = 16
    shared_len: int = 0
    is_copied: bool = False
    attention_factor: float = 1.0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


@dataclass(frozen=True, eq=False)
class Case:
    q: Tensor
    k_plane: Tensor
    v_plane: Tensor
    rows: DecodeRows
    residuals: Residuals
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype


def make_case(agents: Sequence[Agent], shape: Shape | None = None, seed: int = 0) -> Case:
    shape = shape or Shape()
    maker = _Maker(agents, shape, torch.Generator().manual_seed(seed))
    base_pages = maker.lay_base()
    residual_pages = maker.lay_residuals()
    q = maker.random(len(agents), shape.num_kv_heads * shape.group, shape.head_dim)
    kv_lens = torch.tensor([agent.kv_len for agent in agents]).int()
    rows = DecodeRows(base_pages, kv_lens, shape.page_size, shape.num_kv_heads)
    case = Case(q, *maker.planes, rows, maker.residuals(residual_pages), shape.head_dim**-0.5)
    return moved(case, torch.device(shape.device))


def moved(case: Case, device: torch.device) -> Case:
    def move(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return thing.to(device)
        if isinstance(thing, (DecodeRows, Residuals)):
            return replace(thing, **{name: move(getattr(thing, name)) for name in thing.__slots__})
        return thing

    return replace(case, **{name: move(getattr(case, name)) for name in Case.__dataclass_fields__})


def angles(num_positions: int, head_dim: int, factor: float = 1.0) -> Tensor:
    """cos|sin of each position, from float64: the fp32 product of a position beyond 64k with a frequency is off by 0.004."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequency)
    return (factor * torch.cat((angle.cos(), angle.sin()), dim=-1)).float()


@dataclass(frozen=True)
class Run:
    """Tokens [start, end) that ``agents`` have in common, into splits from first_split on."""

    start: int
    end: int
    agents: Sequence[int]
    first_split: int = 0


def shared_runs(case: Case, runs: Sequence[Run], members: int, spare: int = 1) -> SharedRuns:
    """Tables with garbage in ``spare`` places of each kind, a first position amid a tile among it.

    Agents without a residual over all of a run read base KV.
    """
    groups = torch.full((len(runs) + spare, 6), NO_PAGE, dtype=torch.int32)
    groups[len(runs) :, :2] = torch.tensor([NO_PAGE + 5, 0])
    places = torch.full((len(runs) + spare, members), -1, dtype=torch.int32)
    subgroups: list[list[int]] = []
    adapters, lens = case.residuals.adapters.tolist(), case.residuals.lens.tolist()
    for row, run in enumerate(runs):
        named = {n: adapters[n] if lens[n] >= run.end else -1 for n in run.agents}
        ordered = sorted(run.agents, key=named.__getitem__)
        places[row, : len(ordered)] = torch.tensor(ordered)
        first = len(subgroups)
        for adapter in sorted({adapter for adapter in named.values() if adapter >= 0}):
            own = [place for place, n in enumerate(ordered) if named[n] == adapter]
            subgroups.append([adapter, own[0], own[-1] + 1, ordered[own[0]]])
        groups[row] = torch.tensor([run.start, run.end - run.start, ordered[0], run.first_split, first, len(subgroups)])
    table = torch.tensor([*subgroups, *[[NO_PAGE] * 4] * spare], dtype=torch.int32)
    device = case.q.device
    return SharedRuns(groups.to(device), places.to(device), table.to(device))


def decode(case: Case, num_splits: int = 1, residuals: bool = True) -> Tensor:
    """[N, Hq, D] by the op and ``combine_partials``."""
    partials = new_partials(*case.q.shape[:2], num_splits, case.q.shape[2], case.q.device)
    chosen = case.residuals if residuals else None
    residual_attention_decode(case.q, case.k_plane, case.v_plane, case.rows, case.scale, partials, range(num_splits), chosen)
    return combine_partials(partials, case.dtype)


def decode_in_groups(
    case: Case, runs: Sequence[Run], members: int = 4, num_splits: int = 1, has_k: bool = True, residuals: bool = True
) -> Tensor:
    """[N, Hq, D]: runs in groups, what lies behind an agent's last run by itself, in a split of its own."""
    tail = max(run.first_split for run in runs) + num_splits
    partials = new_partials(*case.q.shape[:2], tail + 1, case.q.shape[2], case.q.device)
    chosen = case.residuals if residuals else None
    basis = basis_of(case) if residuals and has_k else None
    tables = shared_runs(case, runs, members)
    residual_attention_grouped(
        case.q, case.k_plane, case.v_plane, case.rows, tables, case.scale, partials, num_splits, chosen, basis
    )
    starts = [max((run.end for run in runs if n in run.agents), default=0) for n in range(len(case.q))]
    rows = replace(case.rows, kv_starts=torch.tensor(starts, device=case.q.device).int())
    residual_attention_decode(case.q, case.k_plane, case.v_plane, rows, case.scale, partials, range(tail, tail + 1), chosen)
    return combine_partials(partials, case.dtype)


def basis_of(case: Case) -> RopeBasis:
    return rope_basis(case.residuals.cos_sin, torch.float32 if case.dtype == torch.float32 else torch.float16)


def assert_close(found: Tensor, right: Tensor) -> None:
    difference = torch.linalg.norm(found.double() - right.double()) / torch.linalg.norm(right.double())
    assert difference <= TOLERANCE[found.dtype], f"off by {difference:.2e}"


class _Maker:
    def __init__(self, agents: Sequence[Agent], shape: Shape, generator: torch.Generator) -> None:
        self.agents, self.shape, self._generator = agents, shape, generator
        self._classes = [_row_class(ranks, shape) for ranks in shape.ranks]
        page, width = shape.page_size, shape.num_kv_heads * shape.head_dim
        longest = max(width, *self._classes)
        total_pages = sum(-(-agent.kv_len // page) + 1 for agent in agents)
        self._base_pages = total_pages + 2
        self._elems = (self._base_pages * width + (total_pages + 2 * len(agents)) * 2 * longest) * page
        self.planes = [torch.full((self._elems,), float("nan"), dtype=shape.dtype) for _ in range(2)]
        self._used = self._base_pages * width * page

    def random(self, *size: int, strength: float = 1.0) -> Tensor:
        return (strength * torch.randn(*size, generator=self._generator)).to(self.shape.dtype)

    def lay_base(self) -> Tensor:
        shape, page = self.shape, self.shape.page_size
        order = torch.randperm(self._base_pages, generator=self._generator).int().tolist()
        width = shape.num_kv_heads * shape.head_dim
        common = self.random(2, shape.shared_len, width)
        pages = torch.full((len(self.agents), max(-(-a.kv_len // page) for a in self.agents) + 2), NO_PAGE, dtype=torch.int32)
        shared = [order.pop() for _ in range(shape.shared_len // page)]
        for n, agent in enumerate(self.agents):
            needed = -(-agent.kv_len // page)
            kept = [] if shape.is_copied else shared[:needed]
            own = kept + [order.pop() for _ in range(needed - len(kept))]
            pages[n, :needed] = torch.tensor(own, dtype=torch.int32)
            slots = _slots(pages[n], agent.kv_len, page)
            length = min(shape.shared_len, agent.kv_len)
            for plane, content in zip(self.planes, common, strict=True):
                rows = torch.cat((content[:length], self.random(agent.kv_len - length, width)))
                plane[: self._base_pages * page * width].view(-1, width)[slots] = rows
        return pages

    def lay_residuals(self) -> Tensor:
        shape, page = self.shape, self.shape.page_size
        most = max(-(-agent.residual_len // page) for agent in self.agents) + 1
        pages = torch.full((len(self.agents), most), NO_PAGE, dtype=torch.int32)
        common = {a: self._rows(a, shape.shared_len) for a in range(len(shape.ranks))}
        shared: dict[int, list[int]] = {}
        for n, agent in enumerate(self.agents):
            if agent.adapter < 0:
                continue
            needed = -(-agent.residual_len // page)
            whole = min(shape.shared_len, agent.residual_len) // page
            kept = [] if shape.is_copied else shared.get(agent.adapter, [])[:whole]
            own = kept + self._take(self._classes[agent.adapter], needed - len(kept))
            if len(own[:whole]) > len(shared.get(agent.adapter, [])):
                shared[agent.adapter] = own[:whole]
            pages[n, :needed] = torch.tensor(own, dtype=torch.int32)
            self._write(agent, pages[n], common[agent.adapter])
        return pages

    def _write(self, agent: Agent, pages: Tensor, common: list[Tensor]) -> None:
        slots = _slots(pages, agent.residual_len, self.shape.page_size)
        row_class, length = self._classes[agent.adapter], min(self.shape.shared_len, agent.residual_len)
        for plane, content, own in zip(
            self.planes, common, self._rows(agent.adapter, agent.residual_len - length), strict=True
        ):
            pool = plane[: self._elems // row_class * row_class].view(-1, row_class)
            pool[slots] = torch.cat((content[:length], own))

    def _rows(self, adapter: int, count: int) -> list[Tensor]:
        """Residual rows in k_plane and v_plane, NaN in columns without a meaning."""
        shape, ranks = self.shape, self.shape.ranks[adapter]
        planes = []
        for which, rank in enumerate(ranks):
            rows = torch.full((count, self._classes[adapter]), float("nan"), dtype=shape.dtype)
            rows[:, :rank] = self.random(count, rank)
            if shape.is_normed and ranks[0]:
                start = max(ranks)
                scales = self.random(count, shape.num_kv_heads, strength=0.3)
                rows[:, start : start + shape.num_kv_heads] = scales + (1 - which)
            planes.append(rows)
        return planes

    def _take(self, row_class: int, count: int) -> list[int]:
        elems = self.shape.page_size * row_class
        first = -(-self._used // elems)
        self._used = (first + count) * elems
        assert self._used <= self._elems
        return (first + torch.randperm(count, generator=self._generator)).tolist()

    def residuals(self, pages: Tensor) -> Residuals:
        shape, agents = self.shape, self.agents
        factors = []
        for which in range(2):
            factor = torch.zeros(len(shape.ranks), shape.stack_rank, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
            for adapter, ranks in enumerate(shape.ranks):
                rank = ranks[which]
                factor[adapter, :rank] = self.random(rank, *factor.shape[2:], strength=0.5 / max(rank, 1) ** 0.5)
            factors.append(factor)
        columns = torch.tensor([max(ranks) if ranks[0] else -1 for ranks in shape.ranks]).int() if shape.is_normed else None
        return Residuals(
            pages,
            torch.tensor([agent.residual_len for agent in agents]).int(),
            torch.tensor([agent.adapter for agent in agents]).int(),
            *factors,
            torch.tensor(shape.ranks).int(),
            torch.tensor(self._classes).int(),
            angles(max(max(agent.kv_len for agent in agents), 1), shape.head_dim, shape.attention_factor),
            columns,
            columns,
        )


def _row_class(ranks: tuple[int, int], shape: Shape) -> int:
    needed = max(ranks) + (shape.num_kv_heads if shape.is_normed and ranks[0] else 0)
    return next(c for c in CLASSES if c >= needed)


def _slots(pages: Tensor, length: int, page_size: int) -> Tensor:
    positions = torch.arange(length)
    return pages[positions // page_size].long() * page_size + positions % page_size

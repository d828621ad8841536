"""A model runner without a model: every KV value records how it was made, so that any wrong page changes the tokens.

A row's hidden state is a hash of its token, its position, whose LoRA ran on it and every KV value that it attended
to; what it writes is derived from that state. So the next token depends, through the pages actually read, on the whole
history of how the context was computed. An oracle can compute the same chain from the semantics alone, without pages,
chunks or batches. Whole K in borrowed memory (``cache.merged_keys``) records the same: what is kept there for later steps
must be what the pages still say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from forkkv_cluster.cache.merged_keys import MergedRun
from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, ModelInfo, TokenLogprob
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.scores import TokenScores
from forkkv_cluster.testing.fake_kv_memory import FakeKVMemory


def mix(*parts: object) -> str:
    """A hash of the parts, 16 hex characters."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def hidden_state(token: int, position: int, adapter: str | None, attended: Sequence[str]) -> str:
    """State of one row: its token, position, active LoRA, and the values of all tokens before it."""
    return mix("hidden", token, position, adapter, tuple(attended))


def base_value(hidden: str, merged_adapter: str | None) -> str:
    """What a row writes to a base page: the base product, or one adapter's merged K and V."""
    return mix("base", hidden) if merged_adapter is None else mix("merged", hidden, merged_adapter)


def residual_value(hidden: str, adapter: str) -> str:
    return mix("residual", hidden, adapter)


def read_value(base: str, residual: str | None) -> str:
    """What attention sees of one token: base KV, plus a residual where there is one."""
    return base if residual is None else mix("sum", base, residual)


def next_token(hidden: str, vocab_size: int) -> int:
    return int(hidden, 16) % vocab_size


def fake_logprob(hidden: str, token: int) -> float:
    """Of ``token`` after the row of this state."""
    return -float(int(mix("logprob", hidden, token), 16) % 1000)


def _scores(logprobs: Sequence[float]) -> TokenScores:
    """Without alternatives."""
    ids, values = np.zeros((len(logprobs), 0), dtype=np.int32), np.zeros((len(logprobs), 0), dtype=np.float32)
    return TokenScores(np.array(logprobs, dtype=np.float32), np.ones(len(logprobs), dtype=np.int32), ids, values)


class FakeSample(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class FakeWeights:
    """What a fake adapter weighs: ``num_bytes`` is 100."""

    info: AdapterInfo
    residual_rank: int
    num_bytes: int = 100


class FakeModelRunner:
    """Runs ``engine.batch.Batch``es over dictionaries.

    Adapter paths look like ``fake:NAME:RANK``, those of an aLoRA like ``fake:NAME:RANK:5,6`` with its invocation tokens.
    """

    def __init__(self, geometry: Any, *, vocab_size: int = 97, max_model_len: int = 4096, eos: tuple[int, ...] = ()) -> None:
        self.geometry = geometry
        self.info = ModelInfo("fake", "fake-digest", vocab_size, max_model_len, geometry.base_bytes_per_token, "float32", eos)
        self.num_rows_run = 0
        self.num_whole_keys_read = 0  # positions that were read from where an earlier step had written them
        self._kv = FakeKVMemory(geometry)
        self._host: dict[tuple[int | None, int], list[str | None]] = {}  # (page class, host page) -> values by offset
        self.changed_files: dict[str, str] = {}
        self._adapters: dict[int, FakeWeights] = {}

    def allocate(self, kv_bytes: int, host_bytes: int = 0) -> None:
        self._kv = FakeKVMemory(self.geometry)
        self._host.clear()

    def read_adapter(self, name: str, path: str) -> FakeWeights:
        """The adapter that ``changed_files`` puts in the place of ``path``, else the one that the path itself describes."""
        kind, _, rest = self.changed_files.get(path, path).partition(":")
        content, _, rest = rest.partition(":")
        rank, _, invocation = rest.partition(":")
        if kind != "fake" or not rank.isdigit():
            raise InvalidArgument("path", path, "is not a fake adapter", "Write fake:NAME:RANK or fake:NAME:RANK:5,6.")
        tokens = tuple(int(token) for token in invocation.split(",") if token)
        residual_rank = int(rank) if not tokens else 0
        info = AdapterInfo(
            name, AdapterDigest(content), path, int(rank), ("k_proj", "v_proj"), residual_rank * 4, invocation_tokens=tokens
        )
        return FakeWeights(info, residual_rank)

    def place_adapter(self, weights: Any) -> int:
        slot = next(i for i in range(len(self._adapters) + 1) if i not in self._adapters)
        self._adapters[slot] = weights
        return slot

    def unload_adapter(self, slot: int) -> None:
        del self._adapters[slot]

    @property
    def num_adapters(self) -> int:
        """Slots that hold weights."""
        return len(self._adapters)

    def check_guide(self, guide: Any) -> None:
        raise Unsupported(guide.kind.value, guide.text, "this fake has no tokenizer", "Use a real engine.")

    def swap(self, batch: Any) -> None:
        """A page that is copied out is gone from the device: whoever still reads it there fails."""
        size = self.geometry.page_size
        for swap in batch.swap_outs:
            for page, host_page in zip(swap.device_pages.tolist(), swap.host_pages.tolist(), strict=True):
                slots = range(page * size, (page + 1) * size)
                self._host[swap.page_class, host_page] = [self._kv.pop(swap.page_class, slot) for slot in slots]
        for swap in batch.swap_ins:
            for page, host_page in zip(swap.device_pages.tolist(), swap.host_pages.tolist(), strict=True):
                for offset, value in enumerate(self._host.pop((swap.page_class, host_page))):
                    if value is not None:
                        self._kv.write(swap.page_class, page * size + offset, value)

    def run(self, batch: Any, sampling: Sequence[tuple[Any, int]]) -> StepResult:
        """Run the rows one by one, in the order of their positions within each span.

        A scored token's log probability is ``fake_logprob`` of the row before it; its rank is 1, and there are no others.
        """
        for copy in batch.tail_copies:
            self._copy_tail(copy)
        self.num_rows_run += batch.num_rows
        active = {row: s.adapter_slot for s in batch.lora_segments for row in range(s.row_start, s.row_end)}
        hidden: dict[int, str] = {}
        written: set[MergedRun] = set()
        # The last layer of a step that nobody reads anything of stops before its attention.
        has_output = bool(len(batch.logit_rows) or len(batch.scored_rows))
        for span in batch.attention:
            self._attend_whole_keys(span, written, has_output)
            for row in range(span.row_start, span.row_end):
                hidden[row] = self._run_row(batch, span, row, active)
        tokens = [FakeSample(next_token(hidden[int(row)], self.info.vocab_size), None) for row in batch.logit_rows]
        scored = zip(batch.scored_rows, batch.scored_tokens, strict=True)
        logprobs = [fake_logprob(hidden[int(row)], int(token)) for row, token in scored]
        return StepResult(tokens, _scores(logprobs))

    def _attend_whole_keys(self, span: Any, written: set[MergedRun], has_output: bool) -> None:
        """Write the span's whole K, if it is to be written and no other span of this step has, and read it."""
        read = span.residual
        use = read.merged_keys if read is not None else None
        if use is None:
            return
        values = [self._read(span, position) for position in range(min(read.num_tokens, span.kv_len))]
        if not use.is_written and use.run not in written:
            self._kv.write_whole_keys(use.run, values, is_complete=has_output)
            written.add(use.run)
        for position, value in enumerate(values):
            self._kv.check_whole_key(use.run, position, value, needs_all_layers=has_output)
        self.num_whole_keys_read += len(values) if use.is_written else 0

    def _run_row(self, batch: Any, span: Any, row: int, active: dict[int, int]) -> str:
        position = int(batch.positions[row])
        adapter = self._adapters[active[row]].info.digest if row in active else None
        attended = [self._read(span, p) for p in range(position)]
        state = hidden_state(int(batch.token_ids[row]), position, adapter, attended)
        for where in (batch.base_rows == row).nonzero()[0]:
            merged = None if row in batch.plain_rows else adapter
            self._kv.write(None, int(batch.base_slots[where]), base_value(state, merged))
        for write in batch.residual_writes:
            target = self._adapters[write.adapter_slot]
            for where in (write.rows == row).nonzero()[0]:
                rank_class = self.geometry.rank_class(target.residual_rank)
                self._kv.write(rank_class, int(write.slots[where]), residual_value(state, target.info.digest))
        return state

    def _read(self, span: Any, position: int) -> str:
        size = self.geometry.page_size
        base = self._kv.read(None, int(span.pages[position // size]) * size + position % size)
        read = span.residual
        if read is None or position >= read.num_tokens:
            return base
        rank_class = self.geometry.rank_class(self._adapters[read.adapter_slot].residual_rank)
        slot = int(read.pages[position // size]) * size + position % size
        return read_value(base, self._kv.read(rank_class, slot))

    def _copy_tail(self, copy: Any) -> None:
        size = self.geometry.page_size
        for offset in range(copy.num_tokens):
            value = self._kv.read(None, copy.source_page * size + offset)
            if copy.adapter_slot is not None:
                rank_class = self.geometry.rank_class(self._adapters[copy.adapter_slot].residual_rank)
                value = read_value(value, self._kv.read(rank_class, copy.residual_page * size + offset))
            self._kv.write(None, copy.target_page * size + offset, value)

"""Compositions: who arrives when over which shared contexts, among whom, on how large an engine; and what each branch answers.

One trained model, read once; every composition gets a fresh engine over it, whose memory starts as NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeAlias

import numpy as np

from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.request import AdapterRef, SamplingParams, Sharing, TokenLogprob, WriterMode
from forkkv_cluster.core.request_builder import Envelope, RequestBuilder
from forkkv_cluster.core.session import BranchSpec, Session
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.torch_runner import TorchRunner
from forkkv_cluster.testing.manual_clock import ManualClock

PAGE_SIZE = 16
ROOMY, TIGHT = 100, 28
"""Slabs of KV memory: for all branches at once; for one or two of them."""

_SAMPLING = SamplingParams(max_tokens=16, logprobs=2)
_ids = count()


@dataclass(frozen=True)
class Ask:
    """One branch and its turn: which of the contexts it forks, how it shares that, whose it is (None: the base model), what it
    appends, and its tenant."""

    context: int
    sharing: Sharing
    adapter: str | None
    own: tuple[int, ...]
    tenant: str = "agents"

    @property
    def place(self) -> tuple[int, Sharing, str]:
        """Branches of one place are branches of one session."""
        return self.context, self.sharing, self.tenant


@dataclass(frozen=True)
class Open:
    """The pass of a session's context, asked for before or while its branches run."""

    place: tuple[int, Sharing, str]


@dataclass(frozen=True)
class Cancel:
    """Of the branch that came last, if it still runs."""


Event: TypeAlias = Ask | Open | Cancel | int
"""An int: that many steps of the engine."""


@dataclass(frozen=True)
class Composition:
    """``declared``: adapters in the order in which they get their slots and sessions declare them."""

    events: tuple[Event, ...]
    declared: tuple[str, ...]
    num_slabs: int = ROOMY
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 16

    @property
    def asks(self) -> list[Ask]:
        return [event for event in self.events if isinstance(event, Ask)]


def compose(seed: int, asks: Sequence[Ask], adapters: Iterable[str]) -> Composition:
    """Two to five of ``asks`` in random order: some at once, some while others run; sessions written before their branches
    come, between them, or by whoever needs the context; in any chunks, in memory that is plenty or evicts."""
    rng = random.Random(seed)
    events: list[Event] = []
    for ask in rng.sample(asks, rng.randint(2, 5)):
        events.append(ask)
        if rng.random() < 0.1:
            events.append(Cancel())
        if rng.random() < 0.5:
            events.append(rng.randint(1, 4))
    places = sorted({event.place for event in events if isinstance(event, Ask)})
    for place in rng.sample(places, len(places)):
        if place[1] is not Sharing.ISOLATED and rng.random() < 0.75:
            events.insert(rng.randint(0, len(events)), Open(place))
    names = list(adapters)
    return Composition(
        tuple(events),
        tuple(rng.sample(names, len(names))),
        num_slabs=rng.choice((ROOMY, TIGHT)),
        max_num_batched_tokens=rng.choice((20, 50, 120, 512)),
        max_num_seqs=rng.choice((2, 16)),
    )


@dataclass(frozen=True)
class Answer:
    """Greedy tokens with the log probabilities of the best and the second best."""

    entries: tuple[TokenLogprob, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(entry.token_id for entry in self.entries)

    @property
    def margin(self) -> float:
        """Least distance of the two best log probabilities."""
        return min(entry.top[0][1] - entry.top[1][1] for entry in self.entries)

    def distance(self, other: Answer) -> float:
        """Greatest, of the log probabilities of equal tokens."""
        return max(abs(a.logprob - b.logprob) for a, b in zip(self.entries, other.entries, strict=True))


@dataclass(frozen=True)
class Played:
    """``answers`` of branches that nobody cancelled; ``most_at_once``: branches that got a token in the same step."""

    answers: dict[Ask, Answer]
    evictions: int
    preemptions: int
    most_at_once: int


class Stage:
    """The model and its adapters in float32, and engines over them, one after the other.

    ``contexts`` [n] token ids each. float32: how many rows run together moves log probabilities by 4e-6 there, and by 0.03 in
    bfloat16, in which the same compositions gave the same tokens, but two tokens that close would be told apart by chance.
    """

    def __init__(self, model_dir: Path, adapter_dirs: Mapping[str, Path], contexts: Sequence[Sequence[int]]) -> None:
        self._runner = TorchRunner.from_directory(model_dir, dtype="float32", device="cpu", page_size=PAGE_SIZE)
        self._weights = {name: self._runner.read_adapter(name, path) for name, path in adapter_dirs.items()}
        self._contexts = [np.array(context, dtype=np.int32) for context in contexts]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: weights.info.lora_rank for name, weights in self._weights.items()}

    def is_activated(self, adapter: str) -> bool:
        """Whether it is an aLoRA."""
        return bool(self._weights[adapter].info.invocation_tokens)

    def play(self, composition: Composition, writer: WriterMode = WriterMode.CANONICAL) -> Played:
        return _Play(self, composition, writer).run()

    def alone(self, ask: Ask, writer: WriterMode = WriterMode.CANONICAL) -> Answer:
        """What the branch answers when nobody else is there."""
        return self.play(Composition((ask,), tuple(self._weights)), writer).answers[ask]


class _Play:
    def __init__(self, stage: Stage, composition: Composition, writer: WriterMode) -> None:
        self._composition = composition
        runner, weights = stage._runner, stage._weights
        config = SchedulerConfig(
            max_num_batched_tokens=composition.max_num_batched_tokens, max_num_seqs=composition.max_num_seqs
        )
        self._engine = Engine(runner, composition.num_slabs * runner.geometry.slab_bytes, config, ManualClock())
        runner.kv.arena.fill_(float("nan"))
        self._refs = [self._engine.register_adapter(name, weights[name]).ref for name in composition.declared]
        self._builder = RequestBuilder(runner.info, block_size=PAGE_SIZE, namespace_of="{}/{}".format)
        self._sessions = {ask.place: self._session(stage, ask, writer) for ask in composition.asks}
        self._asked: dict[str, Ask] = {}
        self._entries: dict[str, list[TokenLogprob]] = {}
        self._live: list[str] = []
        self._most_at_once = 0

    def _session(self, stage: Stage, ask: Ask, writer: WriterMode) -> Session:
        refs: tuple[AdapterRef, ...] = tuple(self._refs)
        context = stage._contexts[ask.context]
        return Session(f"s{next(_ids)}", ask.tenant, context, refs, ask.sharing, writer, created_s=0.0)

    def run(self) -> Played:
        for event in self._composition.events:
            if isinstance(event, int):
                for _ in range(event):
                    self._step()
            elif isinstance(event, Open):
                self._open(event)
            elif isinstance(event, Ask):
                self._ask(event)
            else:
                self._cancel()
        while self._engine.has_work:
            self._step()
        return self._end()

    def _open(self, event: Open) -> None:
        session = self._sessions[event.place]
        if session.needs_context_pass:
            envelope = Envelope(f"pass-{next(_ids)}", session.tenant)
            refs, group = session.adapters, session.sharing_group
            self._engine.add_request(
                self._builder.context_pass(session.context, refs, session.sharing, group, session.session_id, envelope)
            )

    def _ask(self, ask: Ask) -> None:
        name = f"b{next(_ids)}"
        session = self._sessions[ask.place] = self._sessions[ask.place].fork((BranchSpec(name, ask.adapter),))
        own, envelope = np.array(ask.own, dtype=np.int32), Envelope(name, ask.tenant)
        self._engine.add_request(self._builder.turn(session, session.branch(name), own, _SAMPLING, envelope))
        self._asked[name], self._entries[name] = ask, []
        self._live.append(name)

    def _cancel(self) -> None:
        name = next(reversed(self._asked))
        if name in self._live:
            self._engine.abort(name)
            del self._asked[name]

    def _step(self) -> None:
        output = self._engine.step()
        self._most_at_once = max(self._most_at_once, len({chunk.request_id for chunk in output.chunks} & self._entries.keys()))
        for chunk in output.chunks:
            if chunk.request_id in self._entries:
                self._entries[chunk.request_id] += chunk.logprobs
                if chunk.finish_reason is not None:
                    self._live.remove(chunk.request_id)
        for failure in output.failures:
            assert failure.request_id not in self._asked, failure
            self._live.remove(failure.request_id)

    def _end(self) -> Played:
        assert self._live == []
        self._engine.check_invariants()
        status = self._engine.status()
        assert status.num_pinned_pages == 0
        for name in self._composition.declared:  # The next engine's adapters get their slots.
            self._engine.unload_adapter(name)
        answers = {ask: Answer(tuple(self._entries[name])) for name, ask in self._asked.items()}
        return Played(answers, status.counters.evictions, status.counters.preemptions, self._most_at_once)

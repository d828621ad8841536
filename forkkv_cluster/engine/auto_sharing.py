"""How ``auto`` is served on each adapter of one engine: verdicts, and the calibrations that bring them.

Verdicts are kept by (base model, adapter content, reference, samples, bound) for as long as the process lives, demotions among
them: an adapter that is loaded again is not measured again, and one that drifted does not come back as if it had not.

An adapter that was registered with ``auto`` by name is measured at once, one that ``auto`` is only the default of when it has
first been used: of thousands that are registered, most may never be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.config import CalibrationConfig
from forkkv_cluster.core.errors import DeadlineExceeded, ForkKVError
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, ModelInfo, Sharing
from forkkv_cluster.core.request_builder import RequestBuilder
from forkkv_cluster.core.verdict import SharingVerdict, VerdictState, decide, unmeasured
from forkkv_cluster.engine.background import Lane, Rounds
from forkkv_cluster.engine.calibration import Calibration, Measurement
from forkkv_cluster.engine.sample_contexts import SampleContexts, SampleSource

logger = logging.getLogger(__name__)

_Key = tuple[str, AdapterDigest, Sharing, str, float]


@dataclass(frozen=True, slots=True)
class _Registered:
    """``asked``: the sharing that it was registered with, ``is_named`` unless that is the default. ``key`` of its kept verdict,
    None where nothing is measured."""

    info: AdapterInfo
    asked: Sharing
    is_named: bool
    reference: Sharing
    fixed: SharingVerdict | None
    key: _Key | None


class AutoSharing:
    """Not thread-safe. Adapters by name; two names of equal content share a measurement."""

    def __init__(
        self,
        model: ModelInfo,
        page_size: int,
        config: CalibrationConfig,
        default: Sharing,
        contexts: SampleContexts,
        lane: Lane,
        clock: Clock,
    ) -> None:
        """``default``: what an adapter is registered with that names nothing."""
        self._model = model
        self._config = config
        self._default = default
        self._contexts = contexts
        self._lane = lane
        self._clock = clock
        self._builder = RequestBuilder(model, block_size=page_size, namespace_of=lambda tenant, group: tenant)
        self._registered: dict[str, _Registered] = {}
        self._verdicts: dict[_Key, SharingVerdict] = {}
        self._failed: set[_Key] = set()  # measured again when the adapter is registered again
        self._put_off: dict[_Key, Rounds] = {}  # until the adapter has been used
        self.num_calibrations = 0
        self.num_demotions = 0

    # --- adapters ---------------------------------------------------------------------------------------------------

    def prepare(self, path: str, sharing: Sharing | None) -> None:
        """Read ahead the samples of an adapter that is about to be registered. Safe on any thread. Raises as ``source_for``."""
        if (sharing if sharing is not None else self._default) is Sharing.AUTO:
            self._contexts.prepare(path)

    def source_for(self, info: AdapterInfo, sharing: Sharing | None) -> SampleSource | None:
        """The samples that registering it needs, None where nothing is measured. Raises InvalidArgument for ones that cannot
        be used."""
        asked, _ = self._asked(info, sharing)
        return self._contexts.source_for(info.path) if asked is Sharing.AUTO and not info.invocation_tokens else None

    def register(
        self, info: AdapterInfo, sharing: Sharing | None, candidates: tuple[Sharing, ...], source: SampleSource | None
    ) -> None:
        """``candidates``: what can serve it besides ``isolated``; ``source`` as ``source_for`` gave it. A measurement begins
        where there is none yet."""
        asked, is_named = self._asked(info, sharing)
        previous = self._registered.get(info.name)
        reference = info.trained_for or Sharing.ISOLATED
        if reference in (Sharing.EAGER, Sharing.RESIDUAL) and not candidates:
            reference = Sharing.ISOLATED  # no page is wide enough for what it was trained for
        fixed = _fixed_verdict(info, asked, reference, is_named=is_named)
        key = None
        if source is not None:
            key = self._key(info, reference, source)
            self._measure(info, reference, candidates, source, key)
            if is_named:
                self._start(key)
        self._registered[info.name] = _Registered(info, asked, is_named, reference, fixed, key)
        self._release(previous)

    def unregister(self, name: str) -> None:
        """A calibration that nobody needs any more ends."""
        self._release(self._registered.pop(name, None))

    def asked(self, name: str) -> Sharing | None:
        """What a registered adapter was registered with by name; None for the default."""
        entry = self._registered[name]
        return entry.asked if entry.is_named else None

    def _asked(self, info: AdapterInfo, sharing: Sharing | None) -> tuple[Sharing, bool]:
        """What it is registered with, and whether somebody named it: now, or when the same content got the name."""
        known = self._registered.get(info.name)
        if sharing is None and known is not None and known.info.digest == info.digest:
            return known.asked, known.is_named
        return (sharing, True) if sharing is not None else (self._default, False)

    def _release(self, gone: _Registered | None) -> None:
        if gone is None or gone.key is None or any(other.key == gone.key for other in self._registered.values()):
            return
        if self._verdicts[gone.key].state in (VerdictState.WAITING, VerdictState.CALIBRATING):
            del self._verdicts[gone.key]
            self._put_off.pop(gone.key, None)
            self._lane.cancel(str(gone.key))

    def described(self, info: AdapterInfo) -> SharingVerdict:
        """Of a registered adapter."""
        entry = self._registered[info.name]
        if entry.fixed is not None:
            return entry.fixed
        return self._verdicts[entry.key] if entry.key is not None else unmeasured(entry.reference)

    def note_used(self, digest: AdapterDigest) -> None:
        """A client's turn on that content has ended: what was put off until then begins."""
        for key in [key for key in self._put_off if key[1] == digest]:
            self._start(key)

    # --- drift ------------------------------------------------------------------------------------------------------

    def is_chosen(self, digest: AdapterDigest, sharing: Sharing) -> bool:
        """Whether ``auto`` serves some name of that content under ``sharing`` because a measurement said so."""
        return any(
            verdict.state is VerdictState.MEASURED and verdict.sharing is sharing and sharing is not verdict.reference
            for key, verdict in self._verdicts.items()
            if key[1] == digest
        )

    def demote(
        self, digest: AdapterDigest, sharing: Sharing, drift: Agreement, is_beyond: Callable[[float], bool]
    ) -> list[SharingVerdict]:
        """Fall back to the reference wherever ``sharing`` was picked and ``is_beyond`` its bound; the new verdicts."""
        demoted = []
        for key, verdict in self._verdicts.items():
            is_picked = verdict.state is VerdictState.MEASURED and verdict.sharing is sharing is not verdict.reference
            if key[1] == digest and is_picked and is_beyond(verdict.max_disagreement):
                self._verdicts[key] = verdict.demoted(drift, self._clock.wall())
                demoted.append(self._verdicts[key])
        self.num_demotions += len(demoted)
        return demoted

    # --- measuring --------------------------------------------------------------------------------------------------

    def _key(self, info: AdapterInfo, reference: Sharing, source: SampleSource) -> _Key:
        config = self._config
        samples = f"{source.digest} {config.min_positions} {config.continuation_tokens} {config.max_samples}"
        return self._model.digest, info.digest, reference, samples, config.max_disagreement

    def _measure(
        self, info: AdapterInfo, reference: Sharing, candidates: tuple[Sharing, ...], source: SampleSource, key: _Key
    ) -> None:
        if key in self._verdicts and key not in self._failed:
            return
        self._failed.discard(key)
        measured = tuple(sharing for sharing in (*candidates, Sharing.ISOLATED) if sharing is not reference)
        end = partial(self._end, key, reference, source.name)
        if not candidates:
            end(Measurement(()))
            return
        reason = f"measured once it has been used; served {reference} until then"
        self._verdicts[key] = SharingVerdict(
            reference, VerdictState.WAITING, reference, reason, self._config.max_disagreement, samples=source.name
        )
        calibration = Calibration(info, reference, measured, source, self._config, self._builder, self._clock)
        self._put_off[key] = calibration.rounds(end)

    def _start(self, key: _Key) -> None:
        """Measure what was put off; anything else is measured already, or being so."""
        rounds = self._put_off.pop(key, None)
        if rounds is None:
            return
        verdict = self._verdicts[key]
        reason = f"being measured; served {verdict.reference} meanwhile"
        self._verdicts[key] = replace(verdict, state=VerdictState.CALIBRATING, reason=reason)
        self._lane.start(str(key), rounds)
        self.num_calibrations += 1

    def _end(self, key: _Key, reference: Sharing, samples: str, found: Measurement) -> None:
        verdict = decide(
            reference,
            found.measured,
            max_disagreement=self._config.max_disagreement,
            min_positions=self._config.min_positions,
            failure=_failure(found.error, self._config),
            samples=samples,
            decided_s=self._clock.wall(),
        )
        self._verdicts[key] = verdict
        if found.error is not None:
            self._failed.add(key)
        names = sorted(name for name, entry in self._registered.items() if entry.key == key)
        logger.info("adapter %s: auto is served %s: %s", ", ".join(names), verdict.sharing, verdict.reason)


def _failure(error: ForkKVError | None, config: CalibrationConfig) -> str:
    if isinstance(error, DeadlineExceeded):
        return f"the calibration did not end within {config.timeout_s:g} s"
    return f"the calibration failed: {error.message}" if error is not None else ""


def _fixed_verdict(info: AdapterInfo, asked: Sharing, reference: Sharing, *, is_named: bool) -> SharingVerdict | None:
    """The verdict where nothing needs to be measured; None for ``auto``."""
    if info.invocation_tokens and (asked is Sharing.AUTO or not is_named):
        return SharingVerdict(Sharing.BASE, VerdictState.EXACT, Sharing.BASE, "an aLoRA: every sharing is exact")
    if asked is Sharing.AUTO:
        return None
    if not is_named and (info.trained_for is not None or asked is Sharing.ISOLATED):
        return unmeasured(reference)
    who = "whoever registered it" if is_named else "defaults.adapter_sharing"
    told = f"{who} named it, and it is not measured"
    if info.trained_for not in (None, asked):
        told += f"; its metadata says that it was trained for {info.trained_for}"
    return SharingVerdict(asked, VerdictState.NAMED, reference, told)

"""What an engine runs without being asked: calibrations of adapters, and shadow probes of what it served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Self

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.config import CalibrationConfig, ClusterConfig, GuardrailConfig
from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, GenerateRequest, ModelInfo, Sharing, TokenChunk
from forkkv_cluster.core.request_builder import RequestBuilder
from forkkv_cluster.core.status import AdapterDrift
from forkkv_cluster.engine.auto_sharing import AutoSharing
from forkkv_cluster.engine.background import Lane
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.outputs import Failure
from forkkv_cluster.engine.runner import Runner
from forkkv_cluster.engine.sample_contexts import SampleContexts, SampleSource
from forkkv_cluster.engine.sequence import Turn, is_background
from forkkv_cluster.engine.shadow_probe import ShadowProbe
from forkkv_cluster.engine.tokenizer_files import TokenizerFiles


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How ``auto`` is measured and watched. ``contexts`` None: generated from the model's vocabulary."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    guardrail: GuardrailConfig = field(default_factory=GuardrailConfig)
    adapter_sharing: Sharing = Sharing.ISOLATED
    contexts: SampleContexts | None = None

    @classmethod
    def from_config(cls, config: ClusterConfig, model: ModelInfo) -> Self:
        """Raises InvalidArgument for ``calibration.samples`` that cannot be used."""
        files, calibration = TokenizerFiles(config.model.path), config.calibration
        contexts = SampleContexts(
            model,
            operator_path=calibration.samples,
            model_dir=config.model.path,
            context_tokens=calibration.context_tokens,
            seed=calibration.seed,
            encode=files.encode,
            plain_tokens=files.plain_tokens,
        )
        return cls(calibration, config.guardrail, config.defaults.adapter_sharing, contexts)


class OwnWork:
    """Not thread-safe. ``add`` and ``abort`` are the engine's own."""

    def __init__(
        self,
        fidelity: Fidelity,
        runner: Runner,
        clock: Clock,
        add: Callable[[GenerateRequest], None],
        abort: Callable[[RequestId], None],
    ) -> None:
        model, size, calibration = runner.info, runner.geometry.page_size, fidelity.calibration
        contexts = fidelity.contexts or SampleContexts(model, context_tokens=calibration.context_tokens, seed=calibration.seed)
        self._widest = runner.geometry.rank_classes[-1]
        self._default = fidelity.adapter_sharing
        self._calibrations, self._probes = Lane(add, abort), Lane(add, abort)
        self.auto = AutoSharing(model, size, calibration, self._default, contexts, self._calibrations, clock)
        builder = RequestBuilder(model, block_size=size, namespace_of=lambda tenant, group: tenant)
        self.probe = ShadowProbe(fidelity.guardrail, builder, self.auto, self._probes)
        self._infos: dict[str, AdapterInfo] = {}

    # --- adapters ---------------------------------------------------------------------------------------------------

    def prepare(self, path: str, sharing: Sharing | None) -> None:
        """Read ahead what registering an adapter needs. Safe on any thread. Raises InvalidArgument for bad samples."""
        self.auto.prepare(path, sharing)

    def check(self, weights: Weights, sharing: Sharing | None) -> SampleSource | None:
        """What to measure on, None where nothing is measured. Raises Unsupported for a sharing that cannot serve the adapter,
        InvalidArgument for bad samples."""
        asked = sharing if sharing is not None else self._default
        if asked in (Sharing.EAGER, Sharing.RESIDUAL) and not self._candidates(weights):
            raise Unsupported(
                "sharing",
                str(asked),
                f"with adapter {weights.info.name} needs {weights.residual_rank} columns of residual, and the widest page has "
                f"{self._widest}",
                "Name isolated or auto, or use an adapter of a smaller rank.",
            )
        return self.auto.source_for(weights.info, sharing)

    def register(self, info: AdapterInfo, weights: Weights, sharing: Sharing | None, source: SampleSource | None) -> None:
        """``source`` as ``check`` gave it."""
        self._infos[info.name] = info
        self.auto.register(info, sharing, self._candidates(weights), source)

    def unregister(self, name: str) -> None:
        info = self._infos.pop(name)
        self.auto.unregister(name)
        if all(other.digest != info.digest for other in self._infos.values()):
            self.probe.forget(info)

    def described(self, info: AdapterInfo) -> AdapterInfo:
        """With what it was registered with, and how ``auto`` is served on it."""
        return replace(info, sharing=self.auto.asked(info.name), verdict=self.auto.described(info))

    def served(self, ref: AdapterRef) -> Sharing:
        """What ``auto`` comes to on that adapter now; ``isolated`` unless its name stands for this very content."""
        info = self._infos.get(ref.name)
        return self.auto.described(info).sharing if info is not None and info.digest == ref.digest else Sharing.ISOLATED

    def _candidates(self, weights: Weights) -> tuple[Sharing, ...]:
        """What can serve it besides ``isolated``. Without LoRA on k and v all sharings compute the same, and ``base`` says so;
        with it ``base`` drops the residual, which nobody is served by."""
        if weights.residual_rank == 0:
            return (Sharing.BASE,)
        return (Sharing.EAGER, Sharing.RESIDUAL) if weights.residual_rank <= self._widest else ()

    # --- steps ------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self._calibrations.has_work or self._probes.has_work

    def submit(self, *, is_idle: bool) -> None:
        """Before a step. ``is_idle``: no client's request waits."""
        self._calibrations.submit()
        if is_idle:
            self._probes.submit()

    def take(
        self, chunks: Iterable[TokenChunk], failures: Iterable[Failure], *, is_crowded: bool
    ) -> tuple[list[TokenChunk], list[Failure]]:
        """After a step: keeps what is its own, returns the rest. ``is_crowded``: a client's request could not start."""
        for lane in (self._calibrations, self._probes):
            chunks, failures = lane.take(chunks, failures)
        if is_crowded:
            self.probe.make_way()
        return list(chunks), list(failures)

    def note_served(self, turn: Turn) -> None:
        """A turn has ended, well or because nobody wants more of it."""
        if not is_background(turn):
            if turn.adapter is not None:
                self.auto.note_used(turn.adapter.info.digest)
            self.probe.note_served(turn)

    def drift(self) -> tuple[AdapterDrift, ...]:
        return self.probe.drift({info.digest: info.name for info in self._infos.values()})

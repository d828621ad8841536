"""Where the time of a decode step goes: an engine that profiles its steps, and the shares as measurements."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterable
from typing import Any

from forkkv_cluster.bench.measurement import Measurement
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.outputs import StepOutput

Files = str | tuple[str, ...]
"""How a path may end."""
Function = tuple[str, int, str]
"""(file, line, name), as the profiler names one."""

_STEP = ("engine/engine.py", "step")
_PARTS: tuple[tuple[str, tuple[tuple[str, str], ...], Files], ...] = (
    # what, functions, files that they must be called from ("": any): no two of them contain each other
    ("linear layers", (("layers/linear.py", "__call__"),), ("models/decoder.py", "engine/step_lora.py")),
    ("LoRA", (("engine/step_lora.py", "_add_"),), ""),
    ("attention", (("engine/attention.py", "run"), ("engine/native_attention.py", "run")), ""),
    (
        "norms, rotation, activation",
        (("rms_norm.py", "add_rms_norm_"), ("store_kv.py", "store_kv"), ("silu_mul.py", "silu_mul")),
        "models/decoder.py",
    ),
    ("sampling", (("engine/torch_runner.py", "_sample"),), ""),
    ("scheduling", (("engine/scheduler.py", "schedule"),), ""),
    (
        "building the batch",
        (
            ("engine/batch_builder.py", "build_batch"),
            ("engine/attention_plan.py", "plan_attention"),
            ("engine/step_inputs.py", "step_inputs"),
        ),
        "",
    ),
)


class ProfiledEngine(Engine):
    """Profiles every step that runs no prompt token. Python calls cost more under the profiler, so its shares of what is
    made of many small calls are upper bounds."""

    _profiles: pstats.Stats | None = None

    def step(self) -> StepOutput:
        before = self.status().counters
        profile = cProfile.Profile()
        output = profile.runcall(super().step)
        after = self.status().counters
        is_decode = after.num_steps > before.num_steps and after.prefill_tokens_run == before.prefill_tokens_run
        if is_decode and self._profiles is None:
            self._profiles = pstats.Stats(profile)
        elif is_decode and self._profiles is not None:
            self._profiles.add(profile)
        return output

    def step_shares(self, name: str) -> list[Measurement]:
        """Milliseconds of the mean decode step so far, whole and by part; none before the first."""
        if self._profiles is None:
            return []
        stats: dict[Function, tuple[Any, ...]] = self._profiles.stats  # type: ignore[attr-defined]
        step = next(entry for function, entry in stats.items() if _is(function, _STEP))
        num_steps, whole_s = step[1], step[3]
        parts = {part: _seconds(stats, functions, caller) for part, functions, caller in _PARTS}
        parts["the rest"] = whole_s - sum(parts.values())
        rows = [Measurement(f"{name}: a decode step under the profiler", whole_s / num_steps * 1000, "ms")]
        return rows + [
            Measurement(f"{name}: {part}, {seconds / whole_s:.0%} of it", seconds / num_steps * 1000, "ms")
            for part, seconds in parts.items()
        ]


def _seconds(stats: dict[Function, tuple[Any, ...]], functions: Iterable[tuple[str, str]], caller: Files) -> float:
    """Time in the functions and whatever they call."""
    callers = [entry[4] for function, entry in stats.items() if any(_is(function, name) for name in functions)]
    return float(sum(call[3] for calls in callers for by, call in calls.items() if by[0].endswith(caller)))


def _is(function: Function, name: tuple[str, str]) -> bool:
    return function[0].endswith(name[0]) and function[2] == name[1]

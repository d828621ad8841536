"""The engine, driven offline: many branches of many contexts at once, in one cell of the comparison after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject
from forkkv_cluster.bench.quality.recorder import Reading, RecordingRunner
from forkkv_cluster.core.config import ClusterConfig, SchedulerConfig, parse_config
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, PromptLogprobs, SamplingParams, Sharing, joined_prompt_logprobs
from forkkv_cluster.core.request_builder import NO_MODES, Envelope, Modes, RequestBuilder, context_plan
from forkkv_cluster.core.session import BranchSpec, Session
from forkkv_cluster.core.verdict import SharingVerdict
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.local_runs import LocalRun, run_to_end, settle
from forkkv_cluster.engine.own_work import Fidelity

__all__ = ["Answer", "Job", "QualityEngine", "engine_config"]

_TENANT = "quality"
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sample as tokens: context [c] and question [q], int32."""

    context: TokenArray
    question: TokenArray


@dataclass(frozen=True, slots=True)
class Answer:
    """What greedy decoding said, the end-of-text token among it; ``num_shared``: tokens of the context that the branch found
    in the cache, base and residual, and so did not run again for itself."""

    token_ids: tuple[int, ...]
    num_shared: int


def engine_config(
    model_dir: str | Path,
    adapters: Mapping[str, str],
    *,
    dtype: str,
    kv_bytes: str,
    num_threads: int,
    calibration: Mapping[str, Any] = MappingProxyType({}),
) -> ClusterConfig:
    """``calibration``: fields of that section, over its defaults. Raises InvalidArgument that names the bad field."""
    return parse_config(
        {
            "model": {"path": str(model_dir), "name": Path(model_dir).name, "dtype": dtype},
            "adapters": [{"name": name, "path": path} for name, path in adapters.items()],
            "cache": {"kv_bytes": kv_bytes},
            # One caller, who waits for everything: there is nobody to be told to come again.
            "scheduler": SchedulerConfig(max_num_waiting=_NO_LIMIT).model_dump(),
            "worker": {"num_threads": num_threads},
            "calibration": dict(calibration),
            # Measured when asked for, and nothing beside it.
            "defaults": {"adapter_sharing": "isolated"},
            "guardrail": {"share": 0.0},
        }
    )


class QualityEngine:
    """One engine of this process, with the adapters that ``config`` names."""

    def __init__(self, config: ClusterConfig) -> None:
        """Raises InvalidArgument or Unsupported that names the bad field."""
        import torch

        torch.set_num_threads(config.worker.num_threads)
        runner = RecordingRunner.from_config(config)
        assert isinstance(runner, RecordingRunner)
        self._runner = runner
        self.engine = Engine(
            runner,
            config.cache.kv_bytes,
            config.scheduler,
            merged_share=config.cache.merged_share,
            adapter_memory=config.adapter_memory,
            fidelity=Fidelity.from_config(config, runner.info),
        )
        infos = [self.engine.load_adapter(adapter.name, adapter.path) for adapter in config.adapters]
        self._infos: dict[str, AdapterInfo] = {info.name: info for info in infos}
        self._builder = RequestBuilder(
            self.engine.model_info, block_size=config.cache.page_size, namespace_of=lambda tenant, group: f"{tenant}:{group}"
        )
        self._tokenizer = _load_tokenizer(config.model.path)

    @property
    def subjects(self) -> list[Subject]:
        """In the order of the configuration."""
        return [Subject(info.name, info.lora_rank, bool(info.invocation_tokens)) for info in self._infos.values()]

    def calibrate(self, adapter: str) -> SharingVerdict:
        """How ``auto`` is served on it, as the engine itself measures that when it is loaded so. Takes a while."""
        self.engine.load_adapter(adapter, self._infos[adapter].path, Sharing.AUTO)
        settle(self.engine)
        verdict = next(info.verdict for info in self.engine.list_adapters() if info.name == adapter)
        assert verdict is not None
        return verdict

    def job(self, context: str, question: str) -> Job:
        """Tokens of both; the context begins with what the tokenizer puts before a text of its own."""
        ids = (self._tokenizer.encode(context), self._tokenizer.encode(question, add_special_tokens=False))
        return Job(*(np.asarray(tokens, dtype=np.int32) for tokens in ids))

    def text(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def open(self, cell: Cell, jobs: Sequence[Job], modes: Modes = NO_MODES, group: str = "") -> CellRun:
        """Sessions of the cell over the jobs' contexts: written, and forked by whoever comes first. ``auto`` is served as
        ``modes`` say; pages are found within ``group`` alone."""
        return CellRun(self, cell, jobs, modes, group)

    def run(self, runs: list[LocalRun]) -> list[LocalRun]:
        """To their end, all at once. Raises the error of the first that failed."""
        run_to_end(self.engine, runs)
        return runs

    def session(self, cell: Cell, context: TokenArray, group: str) -> Session:
        """Pages of one order of arrival and one writer are apart from those of any other, and those of ``auto``, of which is
        counted what it finds."""
        return Session(
            session_id=new_id("session"),
            tenant=_TENANT,
            context=context,
            adapters=tuple(self._infos[name].ref for name in dict.fromkeys((cell.first, cell.adapter))),
            sharing=cell.policy.sharing,
            writer=cell.writer,
            created_s=time.time(),
            sharing_group=f"{group}/{cell.writer}/{cell.first if cell.first != cell.adapter else ''}{_own_group(cell)}",
        )

    def context_passes(self, session: Session, modes: Modes) -> list[LocalRun]:
        """The base model's pass over the session's context, if one is needed."""
        plan = context_plan(session, modes) if session.needs_context_pass else None
        if plan is None:
            return []
        sharing, declared = plan
        request = self._builder.context_pass(
            session.context, declared, sharing, session.sharing_group, session.session_id, _envelope()
        )
        return [LocalRun(request)]

    def turn(
        self, session: Session, branch: str, tokens: TokenArray, sampling: SamplingParams, modes: Modes, num_unscored: int = 0
    ) -> LocalRun:
        """One turn of a branch of the session, which must have been forked; its first ``num_unscored`` tokens, of those it
        appends, are not scored, whatever ``sampling`` asks."""
        request = self._builder.turn(session, session.branch(branch), tokens, sampling, _envelope(), modes)
        return LocalRun(replace(request, scored_from=len(session.context) + num_unscored))

    def record(self, run: LocalRun, context_len: int) -> Reading:
        """Run one request, alone, and read what it read and computed."""
        with self._runner.recording(context_len):
            self.run([run])
            return self._runner.reading()


class CellRun:
    """The sessions of one cell, one for each job. ``first`` of the cell has had its turn when this is made."""

    def __init__(self, engine: QualityEngine, cell: Cell, jobs: Sequence[Job], modes: Modes, group: str) -> None:
        self._engine, self._cell, self._jobs, self._modes = engine, cell, jobs, modes
        sessions = [engine.session(cell, job.context, group) for job in jobs]
        engine.run([run for session in sessions for run in engine.context_passes(session, modes)])
        self._sessions = [self._fork(session) for session in sessions]
        if cell.first != cell.adapter:
            self._turns("first", [job.question for job in jobs], SamplingParams(max_tokens=1))

    def _fork(self, session: Session) -> Session:
        names = (self._cell.first, self._cell.adapter)
        first, adapter = (None if self._cell.policy is Policy.UNADAPTED else name for name in names)
        return session.fork((BranchSpec("first", first), BranchSpec("own", adapter)))

    def _turns(self, branch: str, tokens: Sequence[TokenArray], sampling: SamplingParams) -> list[LocalRun]:
        pairs = zip(self._sessions, tokens, strict=True)
        return self._engine.run([self._engine.turn(session, branch, own, sampling, self._modes) for session, own in pairs])

    def answers(self, max_tokens: int) -> list[Answer]:
        """To each question, of at most ``max_tokens`` tokens."""
        runs = self._turns("own", [job.question for job in self._jobs], SamplingParams(max_tokens=max_tokens))
        return [
            Answer(tuple(run.token_ids), min(run.usage.useful_hit_tokens, len(job.context)))
            for run, job in zip(runs, self._jobs, strict=True)
        ]

    def scores(self, answers: Sequence[Sequence[int]], num_top: int, *, alone: bool = False) -> list[PromptLogprobs]:
        """Each answer's tokens, teacher-forced, with the ``num_top`` most likely at each position; ``alone``: one by one."""
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=num_top)
        runs = [
            self._engine.turn(session, "own", _forced(job, answer), sampling, self._modes, len(job.question))
            for session, job, answer in zip(self._sessions, self._jobs, answers, strict=True)
        ]
        for group in [[run] for run in runs] if alone else [runs]:
            self._engine.run(group)
        return [_last(run, len(answer)) for run, answer in zip(runs, answers, strict=True)]

    def readings(self, answers: Sequence[Sequence[int]], indices: Sequence[int]) -> list[Reading]:
        """Of the jobs at ``indices``, with their answers forced."""
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)  # What is scored runs, though it is cached.
        found = []
        for index in indices:
            job = self._jobs[index]
            turn = self._engine.turn(self._sessions[index], "own", _forced(job, answers[index]), sampling, self._modes)
            found.append(self._engine.record(turn, len(job.context)))
        return found


def _own_group(cell: Cell) -> str:
    return "/auto" if cell.policy is Policy.AUTO else ""


def _forced(job: Job, answer: Sequence[int]) -> TokenArray:
    return np.concatenate([job.question, np.asarray(answer, dtype=np.int32)]).astype(np.int32)


def _last(run: LocalRun, num_tokens: int) -> PromptLogprobs:
    joined = joined_prompt_logprobs(run.prompt_logprobs)
    assert joined is not None
    return joined.between(joined.end - num_tokens, joined.end)


def _envelope() -> Envelope:
    return Envelope(new_id("quality"), _TENANT)


def _load_tokenizer(model_dir: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        problem = f"holds no tokenizer that can be loaded ({str(error).splitlines()[0]})"
        raise InvalidArgument("model", model_dir, problem, "Add tokenizer.json and tokenizer_config.json.") from None

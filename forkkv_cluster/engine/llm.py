"""The offline API: a model, its adapters and shared contexts in one process, without a server.

    llm = LLM("./llama", adapters={"planner": "./planner"})
    llm.generate(["Once", "Twice"], adapter="planner", max_tokens=32)
    context = llm.context(document, adapters=["planner"])
    branch = context.fork("a", adapter="planner")
    branch.generate("Plan the first week.", max_tokens=64)
    context.join(branch)

Everything that one call is given runs at once, through continuous batching. Not thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from forkkv_cluster.core.adapter_semantics import mismatched_training
from forkkv_cluster.core.config import ClusterConfig, SchedulerConfig, parse_config
from forkkv_cluster.core.detokenizer import IncrementalDetokenizer
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument, NotFound
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.output_text import OutputText
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import (
    AdapterInfo,
    AdapterRef,
    FinishReason,
    GenerateRequest,
    PrefixUsage,
    SamplingParams,
    Sharing,
    TokenLogprob,
    token_array,
)
from forkkv_cluster.core.request_builder import Envelope, Modes, PromptSharing, RequestBuilder, context_plan
from forkkv_cluster.core.session import Session
from forkkv_cluster.core.status import EngineStatus
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.llm_context import LOCAL_TENANT, Branch, Context, new_session, parse_sharing
from forkkv_cluster.engine.local_runs import LocalRun, run_to_end, settle
from forkkv_cluster.engine.tokenizer_files import TokenizerFiles

__all__ = ["LLM", "Branch", "Completion", "Context", "Prompt"]

Prompt: TypeAlias = str | Sequence[int] | TokenArray
"""Text, or token ids [n]."""

_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt or turn brought. ``text`` is empty where the model directory holds no tokenizer.

    ``is_adapter_inactive``: its adapter is an aLoRA that the prompt does not invoke, so that the base model answered.
    ``mismatched_training``: the sharing that its adapter was trained for, where another one served it.
    prompt_logprobs  one for each token of the prompt (of a branch: its whole history) where they were asked for; None for
                     the first, and for shared context that this request did not run and the token after it
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: PrefixUsage
    logprobs: tuple[TokenLogprob, ...] = ()
    is_adapter_inactive: bool = False
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    mismatched_training: Sharing | None = None


class LLM:
    """One engine of this process. ``block_size`` and the tokenizer's directory belong to the engine's model."""

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_bytes: int | str = "256MiB",
        num_threads: int | None = None,
        adapter_sharing: Sharing | str = Sharing.ISOLATED,
    ) -> None:
        """Load a Hugging Face directory and PEFT directories by name; ``num_threads`` None takes all cores.

        ``adapter_sharing``: what ``auto`` comes to on adapters that name nothing, unless their metadata says what they were
        trained for. ``auto`` measures each of them when it is loaded, which the call waits for.

        Raises InvalidArgument or Unsupported that names the bad field. For every other setting: ``from_config``.
        """
        default = parse_sharing(adapter_sharing)
        # By name they are measured at once, by the default alone only when they have been used.
        named = {"sharing": str(default)} if default is Sharing.AUTO else {}
        self._open(
            parse_config(
                {
                    "model": {"path": str(model), "name": Path(model).name, "dtype": dtype, "device": device},
                    "adapters": [{"name": name, "path": str(path), **named} for name, path in (adapters or {}).items()],
                    "cache": {"kv_bytes": kv_bytes},
                    # One caller, who waits for everything: there is nobody to be told to come again.
                    "scheduler": SchedulerConfig(max_num_waiting=_NO_LIMIT).model_dump(),
                    "worker": {"num_threads": num_threads or os.cpu_count() or 1},
                    "defaults": {"adapter_sharing": str(default)},
                }
            )
        )

    @classmethod
    def from_config(cls, config: ClusterConfig) -> LLM:
        """From the model, adapters, cache, scheduler and worker sections of a cluster's configuration."""
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: ClusterConfig) -> None:
        self.engine = Engine.from_config(config)
        self._tokenizer_files = TokenizerFiles(config.model.path)
        settle(self.engine)  # Adapters with sharing auto are measured before anything is served.
        # One owner of all pages: nobody to be kept apart, so that no salt is needed.
        self._builder = RequestBuilder(
            self.engine.model_info, block_size=config.cache.page_size, namespace_of=lambda tenant, group: f"{tenant}:{group}"
        )

    # --- generating -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: str | Sequence[str | None] | None = None,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Complete each prompt by itself: ``isolated``, its KV cached per adapter.

        ``adapter`` is one name for all prompts, one for each, or None for the base model. ``options`` are fields of
        ``SamplingParams``, over those of ``sampling``. Raises InvalidArgument or NotFound; then nothing has run.
        """
        if isinstance(prompts, str):
            raise InvalidArgument("prompts", prompts, "is one prompt, not a list of them", "Put it into a list.")
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise InvalidArgument("adapter", names, f"does not fit {len(prompts)} prompts", "Name one, or one for each prompt.")
        refs = [self.adapter_refs([name])[0] if name is not None else None for name in names]
        params = sampling_params(sampling, options)
        requests = [
            self._builder.prompt(self.tokens(prompt, special=True), ref, PromptSharing(), params, _envelope())
            for prompt, ref in zip(prompts, refs, strict=True)
        ]
        return self._run([self._local_run(request) for request in requests], params)

    def generate_turns(
        self, turns: Sequence[tuple[Branch, Prompt]], sampling: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """One turn on each of many branches, of any contexts, at once; ``options`` as for ``generate``.

        The history of every branch grows by its turn. Raises FailedPrecondition for a branch named twice, or the error
        of the first turn that failed; then no branch has changed.
        """
        if len({(id(branch.context), branch.name) for branch, _ in turns}) < len(turns):
            raise FailedPrecondition("a branch runs one turn at a time, and this call names one twice. Call again for it.")
        params = sampling_params(sampling, options)
        appended = [self.tokens(prompt) for _, prompt in turns]
        runs = []
        for (branch, _), tokens in zip(turns, appended, strict=True):
            session, state = branch.context.session, branch.state
            state.check_turn(tokens)
            request = self._builder.turn(session, state, tokens, params, _envelope(), self._modes(session))
            runs.append(self._local_run(request))
        completions = self._run(runs, params)
        for (branch, _), tokens, completion in zip(turns, appended, completions, strict=True):
            branch.context.finish_turn(branch.name, tokens, np.asarray(completion.token_ids, dtype=np.int32))
        return completions

    def _local_run(self, request: GenerateRequest) -> LocalRun:
        params = request.sampling
        if not params.stop or self._tokenizer is None:
            return LocalRun(request)
        tail = request.tokens[-16:].tolist()
        detokenizer = IncrementalDetokenizer(self._tokenizer, tail, skip_special_tokens=params.skip_special_tokens)
        return LocalRun(request, OutputText(detokenizer, params))

    def _run(self, runs: list[LocalRun], sampling: SamplingParams) -> list[Completion]:
        run_to_end(self.engine, runs)
        return [
            Completion(
                tuple(run.token_ids),
                run.text if run.text is not None else self._decode(run.visible_ids, sampling.skip_special_tokens),
                run.finish_reason,
                run.usage,
                tuple(run.logprobs),
                isinstance(run.request, GenerateRequest) and run.request.is_adapter_inactive,
                _prompt_entries(run) if sampling.prompt_logprobs is not None else None,
                _mismatch(run),
            )
            for run in runs
        ]

    # --- contexts ---------------------------------------------------------------------------------------------------

    def context(self, prompt: Prompt, adapters: Sequence[str] = (), sharing: Sharing | str = Sharing.AUTO) -> Context:
        """A shared context that ``adapters`` may fork. Its pass runs now, unless nobody would read it.

        ``auto`` shares it with aLoRAs, adapters trained for ``eager`` and those whose measured disagreement is within the
        bound; all others run it for themselves, exactly. Raises InvalidArgument, Unsupported or NotFound.
        """
        tokens = self.tokens(prompt, special=True)
        self._builder.check_context(tokens)
        session = new_session(tokens, self.adapter_refs(adapters), sharing)
        self.run_context_pass(session)
        return Context(self, session)

    def run_context_pass(self, session: Session) -> None:
        """Write what is missing of the session's shared pages, as its sharing asks."""
        plan = context_plan(session, self._modes(session)) if session.needs_context_pass else None
        if plan is not None:
            sharing, declared = plan
            request = self._builder.context_pass(
                session.context, declared, sharing, session.sharing_group, session.session_id, _envelope()
            )
            run_to_end(self.engine, [LocalRun(request)])

    def _modes(self, session: Session) -> Modes:
        return {adapter.name: self.engine.served_sharing(adapter) for adapter in session.adapters}

    # --- adapters, tokens, facts ------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str | Path, sharing: Sharing | str | None = None) -> AdapterInfo:
        """Load a PEFT directory. ``sharing``: how contexts with ``auto`` serve it; ``auto`` measures it, before this returns.

        Raises InvalidArgument, Unsupported or AlreadyExists.
        """
        info = self.engine.load_adapter(name, str(path), parse_sharing(sharing) if sharing is not None else None)
        settle(self.engine)
        return next(found for found in self.engine.list_adapters() if found.name == info.name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises NotFound."""
        self.engine.unload_adapter(name)

    def adapter_refs(self, names: Sequence[str]) -> tuple[AdapterRef, ...]:
        """Loaded adapters by name. Raises NotFound."""
        loaded = {info.name: info.ref for info in self.engine.list_adapters()}
        for name in names:
            if name not in loaded:
                raise NotFound("adapter", name, f"Loaded: {', '.join(loaded) or 'none'}. Load it first.")
        return tuple(loaded[name] for name in names)

    def tokens(self, prompt: Prompt, *, special: bool = False) -> TokenArray:
        """[n] int32; ``special`` adds what the tokenizer puts before a text of its own. Raises InvalidArgument."""
        if isinstance(prompt, str):
            prompt = self._tokenizer_files.encode(prompt, special)
        return token_array(prompt, name="prompt", vocab_size=self.engine.model_info.vocab_size)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; empty without a tokenizer."""
        return self._decode(token_ids, skip_special_tokens=True)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if self._tokenizer is None:
            return ""
        skip = skip_special_tokens
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    @property
    def _tokenizer(self) -> Any:
        return self._tokenizer_files.tokenizer

    def status(self) -> EngineStatus:
        """What the engine holds and has counted."""
        return self.engine.status()


def _prompt_entries(run: LocalRun) -> tuple[TokenLogprob | None, ...]:
    if not isinstance(run.request, GenerateRequest):
        return ()
    scored = [entry for part in run.prompt_logprobs for entry in part.entries()]
    return (*[None] * (run.request.num_prompt_tokens - len(scored)), *scored)


def _mismatch(run: LocalRun) -> Sharing | None:
    request = run.request
    return mismatched_training(request.adapter, request.sharing) if isinstance(request, GenerateRequest) else None


def _envelope() -> Envelope:
    return Envelope(new_id("local"), LOCAL_TENANT)


def sampling_params(sampling: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """``options`` over ``sampling``. Raises InvalidArgument for a name or a value that no request may have."""
    known = [field.name for field in fields(SamplingParams)]
    for name, value in options.items():
        if name not in known:
            raise InvalidArgument(name, value, "is not a sampling option", f"Known: {', '.join(known)}.")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    params = replace(sampling or SamplingParams(), **values)
    params.validate()
    return params

"""The guardrail through the real engine: what drifts falls back by itself, what does not is kept, and nobody pays for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forkkv_cluster.core.request import GenerateRequest, SamplingParams, Sharing
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.core.status import AdapterDrift
from forkkv_cluster.core.verdict import VerdictState
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.fidelity_kit import FidelityKit
from tests.oracle.oracle import Oracle

ALL = {"share": 1.0, "min_positions": 200, "max_pending": 100}
BOUND = 0.06


def contexts(number: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(20, 400, size=length).tolist() for _ in range(number)]


def short_samples(directory: Path) -> str:
    """Contexts of one token: what the operator took for typical."""
    path = directory / "short.jsonl"
    rng = np.random.default_rng(5)
    lines = [{"context": c, "prompts": [rng.integers(20, 400, size=12).tolist()]} for c in contexts(100, 1, 5)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def served(llm: LLM, adapter: str, number: int, *, length: int = 120, sharing: str = "auto") -> list[tuple[int, ...]]:
    """One branch with a turn over each of so many contexts."""
    return [
        llm.context(context, [adapter], sharing).fork("a", adapter).generate([5, 6, 7], max_tokens=24).token_ids
        for context in contexts(number, length, 9)
    ]


def drift_of(llm: LLM) -> AdapterDrift:
    (drift,) = llm.status().drift
    return drift


# --- what follows -----------------------------------------------------------------------------------------------------


def test_an_adapter_that_drifts_on_what_is_served_falls_back_by_itself_and_says_so(
    fidelity_kit: FidelityKit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = {"samples": short_samples(tmp_path), "max_disagreement": BOUND}
    llm = LLM.from_config(fidelity_kit.config(calibration=calibration, guardrail=ALL))
    path = fidelity_kit.adapters["middle"]
    info = llm.load_adapter("middle", path, "auto")
    assert llm.engine.served_sharing(info.ref) is Sharing.EAGER  # on the operator's contexts it keeps to the bound
    with caplog.at_level(logging.WARNING):
        served(llm, "middle", 12)
    assert llm.engine.served_sharing(info.ref) is Sharing.ISOLATED
    (found,) = llm.engine.list_adapters()
    assert found.verdict is not None
    assert found.verdict.state is VerdictState.DEMOTED
    assert "eager drifted" in found.verdict.reason
    assert any("adapter middle falls back to isolated: eager drifted" in message for message in caplog.messages)
    drift = drift_of(llm)
    assert (drift.adapter, drift.sharing) == ("middle", Sharing.EAGER)
    assert drift.agreement.num_positions >= 200
    assert drift.agreement.lower_bound > BOUND
    assert drift.agreement.mean_kl > 0
    assert drift.num_diverged >= 1
    assert drift.first_divergence is not None
    assert llm.status().counters.demotions == 1
    # New turns are exact again, and those of branches that shared before, too.
    assert served(llm, "middle", 3) == served(llm, "middle", 3, sharing="isolated")
    llm.unload_adapter("middle")
    again = llm.load_adapter("middle", path, "auto")
    assert llm.engine.served_sharing(again.ref) is Sharing.ISOLATED


def test_a_good_adapter_is_kept_however_often_it_is_probed(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config(guardrail=ALL))
    info = llm.load_adapter("weak", fidelity_kit.adapters["weak"], "auto")
    served(llm, "weak", 12)
    assert llm.engine.served_sharing(info.ref) is Sharing.EAGER
    drift, counters = drift_of(llm), llm.status().counters
    assert (drift.num_probes, counters.probes, counters.demotions) == (12, 12, 0)
    assert drift.agreement.num_positions == 12 * 24
    assert drift.agreement.num_disagreements <= 3  # ties


def test_the_figures_are_those_of_an_independent_implementation(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config(guardrail={"named_share": 1.0}))
    llm.load_adapter("strong", fidelity_kit.adapters["strong"])
    context = contexts(1, 90, 4)[0]
    branch = llm.context(context, ["strong"], "eager").fork("a", "strong")
    first = branch.generate([5, 6, 7], max_tokens=16)
    second = branch.generate([8], max_tokens=20, temperature=1.0, seed=3)  # what was served need not be the likeliest
    oracle = Oracle(fidelity_kit.model_dir)
    agent = oracle.adapter(fidelity_kit.adapters["strong"])
    wrong = unclear = 0
    kl = 0.0
    firsts = []
    own: list[int] = []
    for asked, answer in (([5, 6, 7], first.token_ids), ([8], second.token_ids)):
        own += asked
        start = len(own) - 1
        isolated, eager = (
            oracle.logits(context, [*own, *answer[:-1]], agent, sharing, None)[start:] for sharing in ("isolated", "eager")
        )
        own += answer
        differs = isolated.argmax(-1) != eager.argmax(-1)
        margins = [row.topk(2, dim=-1).values for row in (isolated, eager)]
        unclear += int(sum((m[:, 0] - m[:, 1] < 1e-3).sum() for m in margins))
        wrong += int(differs.sum())
        firsts.append(int(differs.int().argmax()) if differs.any() else None)
        log_p, log_q = isolated.log_softmax(-1), eager.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
    drift = drift_of(llm)
    assert (drift.num_probes, drift.agreement.num_positions) == (2, 36)
    assert wrong > unclear
    assert abs(drift.agreement.num_disagreements - wrong) <= unclear
    assert 0 < drift.agreement.kl_sum <= kl + 1e-3  # of the 20 likeliest tokens: a part of the whole
    if not unclear:
        assert drift.first_divergence == sorted(f for f in firsts if f is not None)[len(firsts) // 2]


# --- which branches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guardrail", "sharing", "num_probes"),
    [
        ({"share": 1.0}, "eager", 0),  # the request named it: nobody chose for it
        ({"named_share": 1.0}, "eager", 2),
        ({"named_share": 1.0}, "residual", 2),
        ({"named_share": 1.0}, "base", 2),
        ({"named_share": 1.0, "share": 1.0}, "isolated", 0),  # exact already
        ({}, "eager", 0),
    ],
)
def test_branches_under_a_named_sharing_are_probed_where_the_operator_asks_for_it(
    fidelity_kit: FidelityKit, guardrail: dict[str, float], sharing: str, num_probes: int
) -> None:
    llm = LLM.from_config(fidelity_kit.config(guardrail=guardrail))
    llm.load_adapter("strong", fidelity_kit.adapters["strong"])
    served(llm, "strong", 2, length=40, sharing=sharing)
    assert llm.status().counters.probes == num_probes


def test_a_branch_that_a_stop_string_ended_is_probed_too(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config(guardrail={"named_share": 1.0}))
    llm.load_adapter("strong", fidelity_kit.adapters["strong"])
    branch = llm.context(contexts(1, 40)[0], ["strong"], "eager").fork("a", "strong")
    text = branch.fork("b").generate([5, 6], max_tokens=8).text
    before = llm.status().counters.probes
    branch.generate([5, 6], max_tokens=200, stop=(text[2:4],))
    assert llm.status().counters.probes == before + 1


# --- at nobody's cost -------------------------------------------------------------------------------------------------


def test_probes_leave_nothing_in_the_cache(fidelity_kit: FidelityKit) -> None:
    held = []
    for share in (0.0, 1.0):
        llm = LLM.from_config(fidelity_kit.config(guardrail={"named_share": share}))
        llm.load_adapter("strong", fidelity_kit.adapters["strong"])
        served(llm, "strong", 3, sharing="eager")
        status = llm.status()
        assert status.counters.probes == 3 * share
        held.append((status.base_bytes_held, status.residual_bytes_held))
        llm.engine.check_invariants()
    assert held[0] == held[1]


def probing_engine(kit: FidelityKit, **sections: Any) -> Engine:
    engine = Engine.from_config(kit.config(guardrail={"named_share": 1.0, "max_pending": 1}, **sections), ManualClock())
    engine.load_adapter("strong", str(kit.adapters["strong"]))
    return engine


def request(engine: Engine, context: Sequence[int], number: int, max_tokens: int = 8) -> GenerateRequest:
    builder = RequestBuilder(engine.model_info, block_size=16, namespace_of=lambda tenant, group: tenant)
    (info,) = engine.list_adapters()
    tokens = np.asarray([*context, 5, 6 + number], dtype=np.int32)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    envelope = Envelope(f"client-{number}", "client")
    return builder.prompt(tokens, info.ref, PromptSharing(Sharing.EAGER, len(context)), sampling, envelope)


def run_until(engine: Engine, request_id: str) -> None:
    while True:
        output = engine.step()
        assert all(chunk.request_id.startswith("client") for chunk in output.chunks)
        if any(c.request_id == request_id and c.finish_reason is not None for c in output.chunks):
            return


def test_nothing_is_probed_while_a_request_waits(fidelity_kit: FidelityKit) -> None:
    engine = probing_engine(fidelity_kit, scheduler={"max_num_seqs": 1})
    context = contexts(1, 60)[0]
    for number in range(3):
        engine.add_request(request(engine, context, number))
    run_until(engine, "client-1")
    assert engine.status().counters.probes == 0
    run_until(engine, "client-2")
    while engine.has_work:
        engine.step()
    counters = engine.status().counters
    assert (counters.probes, counters.dropped_probes) == (2, 1)  # one may wait: the second branch's, for the first's


def test_a_probe_under_way_is_dropped_when_a_request_has_to_wait(fidelity_kit: FidelityKit) -> None:
    engine = probing_engine(fidelity_kit, scheduler={"max_num_seqs": 2, "max_num_batched_tokens": 16})
    engine.add_request(request(engine, contexts(1, 200)[0], 0))
    run_until(engine, "client-0")
    for _ in range(3):
        engine.step()  # the probe's isolated pass takes 13 steps
    assert engine.status().num_running > 0
    for number, context in enumerate(contexts(3, 60, 2), start=1):
        engine.add_request(request(engine, context, number))
    engine.step()
    engine.step()
    assert engine.status().counters.dropped_probes == 1
    while engine.has_work:
        engine.step()
        engine.check_invariants()
    assert engine.status().num_pinned_pages == 0


def test_a_probe_of_an_adapter_that_is_unloaded_meanwhile_is_dropped(fidelity_kit: FidelityKit) -> None:
    engine = probing_engine(fidelity_kit)
    engine.add_request(request(engine, contexts(1, 60)[0], 0))
    run_until(engine, "client-0")
    engine.unload_adapter("strong")
    while engine.has_work:
        assert engine.step().failures == ()
    counters = engine.status().counters
    assert (counters.probes, counters.dropped_probes) == (0, 1)
    assert engine.status().drift == ()


def test_a_branch_that_fills_the_model_is_probed_without_its_last_token(fidelity_kit: FidelityKit) -> None:
    engine = probing_engine(fidelity_kit)
    context = contexts(1, 1024 - 10)[0]
    engine.add_request(request(engine, context, 0))
    run_until(engine, "client-0")
    while engine.has_work:
        engine.step()
    (drift,) = engine.status().drift
    assert drift.agreement.num_positions == 7

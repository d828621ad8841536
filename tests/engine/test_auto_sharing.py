"""``auto``: adapters are measured through the real engine, and served by what was found. float32, a random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forkkv_cluster.core.adapter_semantics import write_trained_for
from forkkv_cluster.core.errors import AlreadyExists, InvalidArgument, Unsupported
from forkkv_cluster.core.request import AdapterInfo, GenerateRequest, SamplingParams, Sharing
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.core.verdict import SharingVerdict, VerdictState
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.engine.harness import FakeEngine
from tests.fidelity_kit import FidelityKit
from tests.oracle.oracle import Oracle

CONTEXT = [(7 * i * i + 3) % 400 + 20 for i in range(150)]
QUICK = {"min_positions": 60, "continuation_tokens": 16, "max_disagreement": 0.1}


def verdict_of(info: AdapterInfo) -> SharingVerdict:
    assert info.verdict is not None
    return info.verdict


def engine_of(kit: FidelityKit, clock: ManualClock | None = None, **sections: Any) -> Engine:
    return Engine.from_config(kit.config(**sections), clock or ManualClock())


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_invariants()
    assert engine.status().num_pinned_pages == 0


def state_of(engine: Engine, name: str) -> SharingVerdict:
    return verdict_of(next(info for info in engine.list_adapters() if info.name == name))


def prompt(engine: Engine, adapter: AdapterInfo | None, tokens: Sequence[int], request_id: str) -> GenerateRequest:
    builder = RequestBuilder(engine.model_info, block_size=16, namespace_of=lambda tenant, group: tenant)
    ref = adapter.ref if adapter is not None else None
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    array = np.asarray(tokens, dtype=np.int32)
    return builder.prompt(array, ref, PromptSharing(), sampling, Envelope(request_id, "client"))


# --- what is found ----------------------------------------------------------------------------------------------------


def test_an_adapter_that_re_encodes_is_refused_and_served_isolated(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config())
    verdict = verdict_of(llm.load_adapter("strong", fidelity_kit.adapters["strong"], "auto"))
    assert (verdict.sharing, verdict.state) == (Sharing.ISOLATED, VerdictState.MEASURED)
    assert "no cheaper sharing keeps to 0.50%" in verdict.reason
    for sharing in (Sharing.EAGER, Sharing.RESIDUAL):
        agreement = verdict.of(sharing)
        assert agreement is not None
        assert agreement.num_positions >= 2000
        assert agreement.disagreement > 0.2
    auto, isolated = (llm.context(CONTEXT, ["strong"], sharing).fork("a", "strong") for sharing in ("auto", "isolated"))
    assert auto.generate([5, 6, 7], max_tokens=24).token_ids == isolated.generate([5, 6, 7], max_tokens=24).token_ids


def test_an_adapter_on_which_sharing_loses_nothing_is_kept_and_its_branches_share(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config())
    verdict = verdict_of(llm.load_adapter("weak", fidelity_kit.adapters["weak"], sharing="auto"))
    assert (verdict.sharing, verdict.state, verdict.reference) == (Sharing.EAGER, VerdictState.MEASURED, Sharing.ISOLATED)
    assert verdict.samples == "generated (seed 0, 96 tokens)"
    assert [entry.sharing for entry in verdict.measured] == [Sharing.EAGER, Sharing.RESIDUAL]
    assert all(entry.agreement.num_positions >= 2000 for entry in verdict.measured)
    first = llm.context(CONTEXT, ["weak"], "auto").fork("a", "weak").generate([5, 6, 7], max_tokens=8)
    assert first.usage.useful_hit_tokens == len(CONTEXT)  # the pass over the context wrote the residual, too


def test_an_adapter_that_leaves_k_and_v_alone_reads_the_base_models_pages(fidelity_kit: FidelityKit) -> None:
    llm = LLM.from_config(fidelity_kit.config())
    verdict = verdict_of(llm.load_adapter("late", fidelity_kit.adapters["late"], "auto"))
    assert verdict.sharing is Sharing.BASE
    assert [entry.sharing for entry in verdict.measured] == [Sharing.BASE]
    agreement = verdict.of(Sharing.BASE)
    assert agreement is not None
    assert agreement.num_disagreements == 0


def test_the_figures_are_those_of_an_independent_implementation(fidelity_kit: FidelityKit, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    texts = [[rng.integers(20, 400, size=n).tolist() for n in (70, 5, 24)] for _ in range(3)]
    lines = [json.dumps({"context": c, "prompts": [p], "continuations": [a]}) for c, p, a in texts]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    settings = {"samples": str(tmp_path / "s.jsonl"), "min_positions": 72}
    llm = LLM.from_config(fidelity_kit.config(calibration=settings))
    verdict = verdict_of(llm.load_adapter("strong", fidelity_kit.adapters["strong"], "auto"))
    oracle = Oracle(fidelity_kit.model_dir)
    agent = oracle.adapter(fidelity_kit.adapters["strong"])
    for sharing in (Sharing.EAGER, Sharing.RESIDUAL):
        wrong = unclear = 0
        for context, asked, answer in texts:
            start = len(asked) - 1
            rows = [oracle.logits(context, [*asked, *answer[:-1]], agent, s, None)[start:] for s in ("isolated", str(sharing))]
            differs = rows[0].argmax(-1) != rows[1].argmax(-1)
            tops = [r.topk(2, dim=-1).values for r in rows]
            is_tie = (tops[0][:, 0] - tops[0][:, 1] < 1e-3) | (tops[1][:, 0] - tops[1][:, 1] < 1e-3)
            wrong += int(differs.sum())
            unclear += int(is_tie.sum())
        agreement = verdict.of(sharing)
        assert agreement is not None
        assert agreement.num_positions == 72
        assert abs(agreement.num_disagreements - wrong) <= unclear
        assert wrong > unclear


# --- why nothing is found ---------------------------------------------------------------------------------------------


def test_too_few_positions_share_nothing_and_say_so(fidelity_kit: FidelityKit, tmp_path: Path) -> None:
    lines = [json.dumps({"context": CONTEXT[i : i + 60], "prompts": [[9, 8]]}) for i in range(3)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    llm = LLM.from_config(fidelity_kit.config(calibration={"samples": str(tmp_path / "s.jsonl")}))
    verdict = verdict_of(llm.load_adapter("weak", fidelity_kit.adapters["weak"], "auto"))
    assert verdict.sharing is Sharing.ISOLATED
    assert verdict.reason == "only 96 positions were compared, of at least 2000"
    assert verdict.samples == str(tmp_path / "s.jsonl")


def test_a_calibration_that_does_not_end_in_time_shares_nothing_and_is_tried_again_at_the_next_load(
    fidelity_kit: FidelityKit,
) -> None:
    clock = ManualClock()
    engine = engine_of(fidelity_kit, clock, calibration={**QUICK, "timeout_s": 60})
    path = str(fidelity_kit.adapters["weak"])
    engine.load_adapter("weak", path, Sharing.AUTO)
    for _ in range(5):
        engine.step()
    clock.advance(61)
    drain(engine)
    verdict = state_of(engine, "weak")
    assert verdict.sharing is Sharing.ISOLATED
    assert verdict.reason == "the calibration did not end within 60 s"
    engine.unload_adapter("weak")
    engine.load_adapter("weak", path, Sharing.AUTO)
    drain(engine)
    assert state_of(engine, "weak").sharing is Sharing.EAGER


def test_an_adapter_that_overflows_shares_nothing_and_the_reason_is_told(fidelity_kit: FidelityKit, tmp_path: Path) -> None:
    from tests.fidelity_kit import save_adapter

    path = save_adapter(fidelity_kit.model_dir, tmp_path / "overflow", 1e30)
    llm = LLM.from_config(fidelity_kit.config(calibration=QUICK))
    verdict = verdict_of(llm.load_adapter("overflow", path, "auto"))
    assert verdict.sharing is Sharing.ISOLATED
    assert "the calibration failed" in verdict.reason
    assert "not finite numbers" in verdict.reason


def test_a_bad_file_of_samples_is_refused_before_anything_is_loaded(fidelity_kit: FidelityKit, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"calibration.samples.*s.jsonl:1"):
        engine_of(fidelity_kit, calibration={"samples": str(tmp_path / "s.jsonl")})
    directory = tmp_path / "weak"
    shutil.copytree(fidelity_kit.adapters["weak"], directory)
    (directory / "calibration_samples.jsonl").write_text("{}")
    engine = engine_of(fidelity_kit)
    with pytest.raises(InvalidArgument, match=r"calibration_samples\.jsonl:1"):
        engine.load_adapter("weak", str(directory), Sharing.AUTO)
    assert engine.list_adapters() == ()


# --- while it is measured ---------------------------------------------------------------------------------------------


def test_while_an_adapter_is_measured_it_is_served_isolated_and_nobody_waits_for_that(fidelity_kit: FidelityKit) -> None:
    def steps_of_a_request(is_measuring: bool) -> int:
        engine = engine_of(fidelity_kit, calibration=QUICK)
        info = engine.load_adapter("weak", str(fidelity_kit.adapters["weak"]), Sharing.AUTO if is_measuring else None)
        for _ in range(12):  # into the middle of a calibration
            engine.step()
        if is_measuring:
            assert verdict_of(info).state is VerdictState.CALIBRATING
            assert engine.served_sharing(info.ref) is Sharing.ISOLATED
        engine.add_request(prompt(engine, info, CONTEXT, "client"))
        steps, is_done = 0, False
        while not is_done:
            output = engine.step()
            steps += 1
            assert {chunk.request_id for chunk in output.chunks} <= {"client"}
            is_done = any(chunk.finish_reason is not None for chunk in output.chunks)
        drain(engine)
        return steps

    assert steps_of_a_request(is_measuring=True) == steps_of_a_request(is_measuring=False)


def test_a_full_queue_delays_a_calibration_and_does_not_end_it(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK, scheduler={"max_num_waiting": 1, "max_num_seqs": 1})
    info = engine.load_adapter("weak", str(fidelity_kit.adapters["weak"]), Sharing.AUTO)
    finished = 0
    for number in range(6):
        engine.add_request(prompt(engine, info, CONTEXT[number:], f"client-{number}"))
        while not any(chunk.finish_reason is not None for chunk in engine.step().chunks):
            pass
        finished += 1
    assert (finished, state_of(engine, "weak").state) == (6, VerdictState.CALIBRATING)
    drain(engine)
    assert state_of(engine, "weak").sharing is Sharing.EAGER
    assert engine.status().counters.num_failed == 0


def test_an_adapter_that_is_unloaded_while_it_is_measured_leaves_nothing_behind(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK)
    path = str(fidelity_kit.adapters["weak"])
    ref = engine.load_adapter("weak", path, Sharing.AUTO).ref
    for _ in range(7):
        engine.step()
    engine.unload_adapter("weak")
    outputs = []
    while engine.has_work:
        outputs.append(engine.step())
    assert all(output.chunks == () and output.failures == () for output in outputs)
    assert len(outputs) <= 2
    assert engine.status().num_pinned_pages == 0
    assert engine.served_sharing(ref) is Sharing.ISOLATED
    engine.load_adapter("weak", path, Sharing.AUTO)
    drain(engine)
    assert state_of(engine, "weak").sharing is Sharing.EAGER


def test_two_names_of_the_same_content_are_measured_once_and_for_the_one_that_stays(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK)
    for name in ("weak", "feeble"):
        engine.load_adapter(name, str(fidelity_kit.adapters["weak"]), Sharing.AUTO)
    engine.step()
    engine.unload_adapter("weak")
    drain(engine)
    assert state_of(engine, "feeble").sharing is Sharing.EAGER
    assert engine.status().counters.calibrations == 1


# --- afterwards -------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_loaded_again_is_not_measured_again(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK)
    path = str(fidelity_kit.adapters["weak"])
    engine.load_adapter("weak", path, Sharing.AUTO)
    drain(engine)
    before, num_run = state_of(engine, "weak"), engine.status().counters.prefill_tokens_run
    engine.unload_adapter("weak")
    assert verdict_of(engine.load_adapter("weak", path, Sharing.AUTO)) == before
    assert not engine.has_work or engine.step().chunks == ()
    assert engine.status().counters.prefill_tokens_run == num_run


def test_loading_the_same_again_without_a_word_on_sharing_changes_nothing(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK)
    path = str(fidelity_kit.adapters["weak"])
    engine.load_adapter("weak", path, Sharing.AUTO)
    drain(engine)
    info = engine.load_adapter("weak", path)
    assert (info.sharing, verdict_of(info).sharing) == (Sharing.AUTO, Sharing.EAGER)
    with pytest.raises(AlreadyExists):
        engine.load_adapter("weak", str(fidelity_kit.adapters["strong"]), Sharing.EAGER)
    assert state_of(engine, "weak").sharing is Sharing.EAGER


def test_another_content_of_the_same_name_is_not_served_by_its_verdict(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, calibration=QUICK)
    ref = engine.load_adapter("a", str(fidelity_kit.adapters["strong"])).ref
    engine.unload_adapter("a")
    engine.load_adapter("a", str(fidelity_kit.adapters["weak"]), Sharing.AUTO)
    drain(engine)
    assert engine.served_sharing(ref) is Sharing.ISOLATED


# --- without measuring ------------------------------------------------------------------------------------------------


def test_an_adapter_loaded_without_a_word_on_sharing_is_isolated_under_auto_and_not_measured(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit)
    info = engine.load_adapter("weak", str(fidelity_kit.adapters["weak"]))
    verdict = verdict_of(info)
    assert (verdict.sharing, verdict.state) == (Sharing.ISOLATED, VerdictState.UNMEASURED)
    assert engine.status().counters.calibrations == 0


def test_where_auto_is_the_default_an_adapter_is_measured_once_it_has_been_used(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, defaults={"adapter_sharing": "auto"}, calibration=QUICK)
    weak, other = (engine.load_adapter(name, str(fidelity_kit.adapters[name])) for name in ("weak", "strong"))
    drain(engine)
    assert engine.status().counters.calibrations == 0
    assert (verdict_of(weak).sharing, verdict_of(weak).state) == (Sharing.ISOLATED, VerdictState.WAITING)
    engine.add_request(prompt(engine, weak, CONTEXT, "r"))
    drain(engine)
    assert (state_of(engine, "weak").sharing, state_of(engine, "weak").state) == (Sharing.EAGER, VerdictState.MEASURED)
    assert state_of(engine, "strong").state is VerdictState.WAITING
    assert engine.status().counters.calibrations == 1
    engine.load_adapter("strong", other.path, Sharing.AUTO)  # by name: at once
    assert state_of(engine, "strong").state is VerdictState.CALIBRATING
    engine.unload_adapter("strong")
    drain(engine)
    engine.load_adapter("strong", other.path)
    assert state_of(engine, "strong").state is VerdictState.WAITING


def test_an_adapter_that_was_never_used_is_forgotten_without_a_measurement(fidelity_kit: FidelityKit) -> None:
    engine = engine_of(fidelity_kit, defaults={"adapter_sharing": "auto"}, calibration=QUICK)
    weak = engine.load_adapter("weak", str(fidelity_kit.adapters["weak"]))
    engine.unload_adapter("weak")
    again = engine.load_adapter("again", weak.path)
    engine.add_request(prompt(engine, again, CONTEXT, "r"))
    drain(engine)
    assert state_of(engine, "again").sharing is Sharing.EAGER
    assert engine.status().counters.calibrations == 1


def test_the_configuration_may_name_auto_or_another_sharing_for_each_adapter(fidelity_kit: FidelityKit) -> None:
    config = fidelity_kit.config(
        adapters=[
            {"name": "weak", "path": str(fidelity_kit.adapters["weak"]), "sharing": "auto"},
            {"name": "strong", "path": str(fidelity_kit.adapters["strong"]), "sharing": "eager"},
        ],
        calibration=QUICK,
    )
    llm = LLM.from_config(config)
    strong, weak = llm.engine.list_adapters()
    assert (verdict_of(weak).sharing, verdict_of(weak).state) == (Sharing.EAGER, VerdictState.MEASURED)
    assert (verdict_of(strong).sharing, verdict_of(strong).state) == (Sharing.EAGER, VerdictState.NAMED)


def test_an_adapter_is_served_as_it_was_trained_and_what_else_would_lose_is_measured_against_that(
    fidelity_kit: FidelityKit, tmp_path: Path
) -> None:
    directory = tmp_path / "trained"
    shutil.copytree(fidelity_kit.adapters["strong"], directory)
    write_trained_for(directory, Sharing.EAGER, {})
    engine = engine_of(fidelity_kit, calibration=QUICK)
    info = engine.load_adapter("trained", str(directory), Sharing.AUTO)
    assert info.trained_for is Sharing.EAGER
    assert engine.served_sharing(info.ref) is Sharing.EAGER  # already while it is measured
    drain(engine)
    verdict = state_of(engine, "trained")
    assert (verdict.sharing, verdict.reference) == (Sharing.EAGER, Sharing.EAGER)
    assert "trained for eager, which loses nothing against itself" in verdict.reason
    isolated = verdict.of(Sharing.ISOLATED)
    assert isolated is not None
    assert isolated.disagreement > 0.2
    unasked = engine_of(fidelity_kit).load_adapter("trained", str(directory))
    assert (verdict_of(unasked).sharing, verdict_of(unasked).state) == (Sharing.EAGER, VerdictState.UNMEASURED)


def test_an_alora_needs_no_measurement_as_every_sharing_is_exact() -> None:
    fake = FakeEngine()
    info = fake.engine.load_adapter("v8", "fake:v8:8:1,2", Sharing.AUTO)
    assert (verdict_of(info).sharing, verdict_of(info).state) == (Sharing.BASE, VerdictState.EXACT)
    assert fake.engine.status().counters.calibrations == 0


def test_an_adapter_whose_residual_no_page_holds_is_isolated_under_auto_and_refused_for_others() -> None:
    fake = FakeEngine()
    verdict = verdict_of(fake.engine.load_adapter("wide", "fake:wide:17", Sharing.AUTO))
    assert (verdict.sharing, verdict.reason) == (Sharing.ISOLATED, "no sharing can serve this adapter")
    with pytest.raises(Unsupported, match=r"sharing='eager'.*17 columns"):
        fake.engine.load_adapter("broad", "fake:broad:17", Sharing.EAGER)
    assert "broad" not in {info.name for info in fake.engine.list_adapters()}


def test_offline_an_adapter_is_measured_before_the_first_answer_where_that_is_asked_for(fidelity_kit: FidelityKit):
    adapters = {"weak": fidelity_kit.adapters["weak"]}
    llm = LLM(fidelity_kit.model_dir, adapters, dtype="float32", kv_bytes="32MiB", num_threads=1, adapter_sharing="auto")
    (info,) = llm.engine.list_adapters()
    assert verdict_of(info).state is VerdictState.MEASURED

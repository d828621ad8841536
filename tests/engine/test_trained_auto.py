"""``auto`` on the shipped adapters and the samples that ship with them: who may share, and who is refused. float32."""

from __future__ import annotations

from typing import Any

import pytest

from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.core.verdict import SharingVerdict, VerdictState
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.engine.sample_contexts import SAMPLES_FILE
from forkkv_cluster.training.casebook import assets

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="the casebook model is not in this installation")

QUICK = {"min_positions": 600}
"""Less than a third of the default: enough for the bound of 0.5 % where nothing disagrees."""


def measured(adapter: str, **calibration: Any) -> SharingVerdict:
    llm = LLM.from_config(
        parse_config(
            {
                "model": {"path": str(assets.model_dir()), "dtype": "float32"},
                "cache": {"kv_bytes": "96MiB"},
                "calibration": calibration,
                "worker": {"num_threads": 1},
            }
        )
    )
    verdict = llm.load_adapter(adapter, assets.adapter_dirs()[adapter], "auto").verdict
    assert verdict is not None
    return verdict


def test_an_adapter_that_needs_its_residual_is_refused_for_eager() -> None:
    verdict = measured("extractor", **QUICK)
    eager = verdict.of(Sharing.EAGER)
    assert eager is not None
    assert eager.num_positions >= 600
    assert eager.upper_bound > verdict.max_disagreement
    assert verdict.sharing is not Sharing.EAGER


def test_an_adapter_that_answers_alike_under_eager_shares() -> None:
    verdict = measured("formatter", **QUICK)
    assert (verdict.sharing, verdict.state) == (Sharing.EAGER, VerdictState.MEASURED)
    assert verdict.samples == str(assets.adapter_dirs()["formatter"] / SAMPLES_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", list(assets.adapter_dirs()))
def test_the_shipped_samples_are_enough_for_a_verdict_at_the_default_bounds(adapter: str) -> None:
    verdict = measured(adapter)
    is_enough = all(entry.agreement.num_positions >= 2000 for entry in verdict.measured)
    assert verdict.state is VerdictState.EXACT or (verdict.measured and is_enough)
    assert "failed" not in verdict.reason

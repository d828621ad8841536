"""What a gateway adds to requests: its salt, and defaults."""

from __future__ import annotations

import numpy as np
import pytest

from forkkv_cluster.core.config import DefaultsConfig
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, GenerateRequest, SamplingParams, Sharing
from forkkv_cluster.gateway.commands import SamplingChoice, StatelessTarget
from forkkv_cluster.gateway.request_builder import Envelope, RequestBuilder
from tests.gateway.fakes import MODEL

PLANNER = AdapterRef("planner", AdapterDigest("a" * 32))
BUILDER = RequestBuilder(MODEL, block_size=4, salt="salt", defaults=DefaultsConfig(max_tokens=16))


def tokens(*values: int) -> TokenArray:
    return np.asarray(values, dtype=np.int32)


def stateless(target: StatelessTarget, tenant: str = "tenant") -> GenerateRequest:
    return BUILDER.stateless(tokens(*range(9)), PLANNER, target, SamplingParams(), Envelope("request-1", tenant))


def test_a_stateless_request_shares_as_its_target_says() -> None:
    request = stateless(StatelessTarget("planner", Sharing.EAGER, 8))
    assert (request.sharing, request.context_len, request.declared) == (Sharing.EAGER, 8, (PLANNER,))
    assert stateless(StatelessTarget("planner")).sharing is Sharing.ISOLATED


def test_tenants_and_groups_have_pages_of_their_own() -> None:
    own, other = stateless(StatelessTarget()), stateless(StatelessTarget(), tenant="other")
    ours, theirs = stateless(StatelessTarget(sharing_group="g")), stateless(StatelessTarget(sharing_group="g"), tenant="other")
    assert len({own.namespace, other.namespace, ours.namespace}) == 3
    assert ours.namespace == theirs.namespace
    assert not set(own.prefix.all_hashes) & set(other.prefix.all_hashes)


def test_missing_choices_become_the_servers() -> None:
    params = BUILDER.sampling(SamplingChoice(), 10, drawn_seed=99)
    assert (params.seed, params.max_tokens) == (99, 16)


def test_the_default_limit_is_cut_to_what_fits() -> None:
    assert BUILDER.sampling(SamplingChoice(), MODEL.max_model_len - 3, 0).max_tokens == 3


@pytest.mark.parametrize(
    ("choice", "num_prompt", "field"),
    [
        (SamplingChoice(max_tokens=0), 10, "max_tokens"),
        (SamplingChoice(max_tokens=500), 13, "max_tokens"),
        (SamplingChoice(), MODEL.max_model_len, "prompt"),
        (SamplingChoice(SamplingParams(temperature=-0.1)), 10, "temperature"),
        (SamplingChoice(seed=-1), 10, "seed"),
    ],
)
def test_sampling_that_cannot_work_names_its_field(choice: SamplingChoice, num_prompt: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        BUILDER.sampling(choice, num_prompt, 0)
    assert caught.value.field == field

"""Guides on a real tokenizer: what may come next, judged by parsing and by the standard library's expressions."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import FinishReason, Guide, GuideKind, SamplingParams
from forkkv_cluster.engine.guides import Guides
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import TinyEngine

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["s", "m"]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
JSON = Guide(GuideKind.JSON_SCHEMA, json.dumps(SCHEMA))
DATE = Guide(GuideKind.REGEX, r"[0-9]{4}-[0-9]{2}")


@pytest.fixture(scope="module")
def engine(tiny_kit: TinyKit) -> TinyEngine:
    return TinyEngine(tiny_kit, 16)


@pytest.fixture(scope="module")
def tokenizer(tiny_kit: TinyKit) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_kit.model_dir))


def guided(engine: TinyEngine, guide: Guide | None, temperature: float = 1.0, seed: int = 0) -> Any:
    request = engine.request([], [5, 6, 7], None, "isolated")
    sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=80, guide=guide)
    return dataclasses.replace(request, sampling=sampling)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_random_model_keeps_to_the_schema(engine: TinyEngine, tokenizer: Any, seed: int, temperature: float) -> None:
    request_id = engine.add(guided(engine, JSON, temperature, seed))
    engine.drain()
    assert engine.last[request_id].finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(tokenizer.decode(engine.outputs[request_id], skip_special_tokens=True)), SCHEMA)


def test_guided_and_free_rows_share_a_batch_without_a_trace(engine: TinyEngine, tokenizer: Any) -> None:
    alone = engine.add(guided(engine, None, seed=3))
    engine.drain()
    free, first, second = (engine.add(guided(engine, guide, seed=3)) for guide in (None, DATE, JSON))
    engine.drain()
    assert engine.outputs[free] == engine.outputs[alone]
    assert re.fullmatch(DATE.text, tokenizer.decode(engine.outputs[first], skip_special_tokens=True))
    jsonschema.validate(json.loads(tokenizer.decode(engine.outputs[second], skip_special_tokens=True)), SCHEMA)


def test_a_resumed_sequence_may_say_what_the_first_one_might(tiny_kit: TinyKit, engine: TinyEngine, tokenizer: Any) -> None:
    written = np.array([1, 2, *tokenizer.encode('{"ok": tr', add_special_tokens=False)], dtype=np.int32)
    info = engine.runner.info
    fresh = Guides(tiny_kit.model_dir, info.vocab_size, info.eos_token_ids)
    followed = Guides(tiny_kit.model_dir, info.vocab_size, info.eos_token_ids)
    params = SamplingParams(guide=JSON)
    for position in range(2, len(written) + 1):
        followed_mask, _ = followed.masks([SamplingRow(params, position, written, 2, "r")])
    fresh_mask, failed = fresh.masks([SamplingRow(params, len(written), written, 2, "r")])
    assert failed == []
    assert fresh_mask is not None
    assert followed_mask is not None
    assert fresh_mask.allowed.tolist() == followed_mask.allowed.tolist()
    words = {tokenizer.decode([token]) for token in fresh_mask.allowed[0].nonzero().flatten().tolist()}
    assert words
    assert all("ue, ".startswith(word) for word in words)


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (Guide(GuideKind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Guide(GuideKind.JSON_SCHEMA, '{"type": "nope"}'), "nope"),
        (Guide(GuideKind.JSON_SCHEMA, "no json"), "json_schema"),
        (Guide(GuideKind.REGEX, "[a-z"), "unclosed"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(engine: TinyEngine, guide: Guide, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        engine.add(guided(engine, guide))


@pytest.mark.parametrize("text", [r"[^\s\S]", r"a[^\x00-\U0010ffff]", r"(x|y)[^\s\S]z"])
def test_an_expression_that_matches_no_text_is_refused_by_name(engine: TinyEngine, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"regex=.*matches no text") as refused:
        engine.add(guided(engine, Guide(GuideKind.REGEX, text)))
    assert (refused.value.field, type(refused.value)) == ("regex", InvalidArgument)


@pytest.mark.parametrize("text", ["", "(ab)*", r"a|[^\s\S]"])
def test_an_expression_that_matches_little_is_served(engine: TinyEngine, tokenizer: Any, text: str) -> None:
    request_id = engine.add(guided(engine, Guide(GuideKind.REGEX, text)))
    engine.drain()
    assert request_id not in engine.errors
    assert re.fullmatch(text, tokenizer.decode(engine.outputs[request_id], skip_special_tokens=True))


def test_an_id_that_comes_again_with_another_guide_is_held_to_that_one(tiny_kit: TinyKit, engine: TinyEngine) -> None:
    info = engine.runner.info

    def allowed(guides: Guides, guide: Guide) -> np.ndarray:
        tokens = np.array([5, 6, 7, 0, 0], np.int32)
        row = SamplingRow(SamplingParams(max_tokens=2, guide=guide), 3, tokens, 3, "again")
        masks, failed = guides.masks([row])
        assert masks is not None
        assert failed == []
        return masks.allowed.numpy()

    used = Guides(tiny_kit.model_dir, info.vocab_size, info.eos_token_ids)
    first = allowed(used, Guide(GuideKind.REGEX, "a+"))
    fresh = Guides(tiny_kit.model_dir, info.vocab_size, info.eos_token_ids)
    wanted = allowed(fresh, DATE)
    assert (first != wanted).any()
    assert (allowed(used, DATE) == wanted).all()


def test_rows_without_guides_cost_no_mask(tiny_kit: TinyKit) -> None:
    assert Guides(tiny_kit.model_dir, 300, [1]).masks([SamplingRow(SamplingParams(), 0)]) == (None, [])

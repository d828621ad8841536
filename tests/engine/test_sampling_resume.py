"""A stream that is resumed on another engine goes on token by token, whatever its sampling looks back at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forkkv_cluster.core.request import Guide, GuideKind
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import TinyEngine

PROMPT = [5, 6, 7, 300, 301]
SCHEMA = json.dumps({"type": "object", "properties": {"word": {"enum": ["abc", "abd", "xyz"]}}, "required": ["word"]})


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 1.0, "seed": 11},
        {"min_p": 0.2, "temperature": 2.0, "seed": 4, "choice": 3},
        {"min_tokens": 12, "logit_bias": ((2000, 3.0),), "temperature": 1.0, "seed": 2},
        {"guide": Guide(GuideKind.JSON_SCHEMA, SCHEMA), "temperature": 1.0, "seed": 9},
    ],
)
def test_a_resumed_stream_says_what_it_would_have_said(tiny_kit: TinyKit, sampling: dict[str, Any]) -> None:
    engine = TinyEngine(tiny_kit, 16)
    whole = engine.run(engine.request([], PROMPT, "planner", "isolated", max_tokens=24, **sampling))
    assert len(whole) > 4
    for num_said in (1, 4):
        other = TinyEngine(tiny_kit, 16)
        resumed = other.request([], PROMPT, "planner", "isolated", max_tokens=24, resumed=whole[:num_said], **sampling)
        assert other.run(resumed) == whole[num_said:]

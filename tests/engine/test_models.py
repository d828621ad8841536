"""Every family that loads answers like Hugging Face: whole prompts, chunks, decode, and in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.engine.model_runner import ModelRunner
from tests.engine.families import (
    FAMILIES,
    LONG_ROPE,
    TOKENS,
    assert_same_answers,
    engine_logits,
    hugging_face_logits,
    llama,
    save,
)

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Family(NamedTuple):
    directory: Path
    model: Any
    wanted: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    directory = save(model, tmp_path_factory.mktemp(request.param) / "model")
    return Family(directory, model, hugging_face_logits(model))


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("sizes", [[100], [33, 20], [61, 1], [1]], ids=["prefill", "chunks", "then-decode", "decode"])
def test_a_family_answers_like_transformers(family: Family, sizes: list[int], page_size: int) -> None:
    runner = ModelRunner.from_directory(family.directory, dtype="float32", page_size=page_size)
    assert_same_answers(engine_logits(runner, sizes), family.wanted)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("sizes", [[100], [61, 1]], ids=["prefill", "then-decode"])
def test_half_precision_is_as_close_to_float32_as_transformers_is(family: Family, name: str, sizes: list[int]) -> None:
    runner = ModelRunner.from_directory(family.directory, dtype=name, page_size=16)
    actual = engine_logits(runner, sizes)
    theirs = hugging_face_logits(type(family.model).from_pretrained(family.directory, dtype=HALF[name]))
    scale = family.wanted.norm()
    assert (actual - family.wanted).norm() / scale < 1.5 * (theirs - family.wanted).norm() / scale + 1e-3
    top = family.wanted.topk(2, dim=-1).values
    is_clear = top[:, 0] - top[:, 1] > 0.25
    agrees = (actual.argmax(-1) == family.wanted.argmax(-1))[is_clear]
    assert is_clear.sum() > 20
    assert agrees.float().mean() > 0.9


def test_longrope_runs_with_its_short_factors_up_to_the_original_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(rope_parameters=LONG_ROPE)
    save(model, tmp_path / "model")
    runner = ModelRunner.from_directory(tmp_path / "model", page_size=16, max_model_len=128)
    assert_same_answers(engine_logits(runner, [61, 1]), hugging_face_logits(model))
    assert len(TOKENS) < 128


def test_frequencies_that_follow_the_length_are_refused_by_name(tmp_path: Path) -> None:
    save(llama(rope_parameters=LONG_ROPE), tmp_path / "long")
    with pytest.raises(Unsupported, match=r"rope_type.*longrope.*max_model_len to at most 128"):
        ModelRunner.from_directory(tmp_path / "long", page_size=16)
    save(llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0}), tmp_path / "dynamic")
    with pytest.raises(Unsupported, match=r"rope_type.*dynamic.*max_model_len to at most 256"):
        ModelRunner.from_directory(tmp_path / "dynamic", page_size=16, max_model_len=512)


def test_longrope_without_a_factor_for_each_frequency_is_refused(tmp_path: Path) -> None:
    save(llama(rope_parameters=LONG_ROPE), tmp_path / "long")
    config = tmp_path / "long" / "config.json"
    config.write_text(config.read_text().replace("1.5,", ""))
    with pytest.raises(InvalidArgument, match="short_factor"):
        ModelRunner.from_directory(tmp_path / "long", page_size=16, max_model_len=128)

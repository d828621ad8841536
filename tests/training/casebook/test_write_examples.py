"""Casebooks written for ``forkkv train-adapter``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.tokenizer import Encoder
from forkkv_cluster.training.casebook.write_examples import lines, main

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="the casebook model is not in this installation")


def test_lines_of_one_context_are_branches_and_a_seed_repeats_them() -> None:
    encoder = Encoder(assets.model_dir())

    def written(seed: int) -> list[dict[str, list[int]]]:
        return list(lines(encoder, "extractor", contexts=3, questions=4, lengths=(96, 128), seed=seed))

    found = written(5)
    assert found == written(5) != written(6)
    assert len({tuple(line["context"]) for line in found}) == 3 < len(found)
    for line in found:
        assert line["context"][0] == encoder.bos
        assert line["completion"][-1] == encoder.eos
        assert max(map(max, line.values())) < encoder.size


def test_held_out_lines_are_about_other_casebooks(tmp_path: Path) -> None:
    def written(is_held_out: bool) -> list[dict[str, list[int]]]:
        out = tmp_path / "clerk.jsonl"
        main("clerk", out, contexts=4, questions=3, length=[96], seed=2, is_held_out=is_held_out)
        return [json.loads(line) for line in out.read_text().splitlines()]

    encoder = Encoder(assets.model_dir())
    shared = {"contexts": 4, "questions": 3, "lengths": (96,), "seed": 2}
    assert written(True) == list(lines(encoder, "clerk", **shared, split="held_out")) != written(False)

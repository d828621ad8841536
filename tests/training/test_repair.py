"""Repair runs from the sharing as it is to the agent's own pass, and a measure puts the right tokens first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from forkkv_cluster.__main__ import cli
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.batches import make_batch
from forkkv_cluster.training.examples import BranchExample, ContextExamples
from forkkv_cluster.training.lora_model import STUDENT, LoraModel
from forkkv_cluster.training.repair import MEASURES, RepairSweep, _blocks_by
from forkkv_cluster.training.shared_forward import SharedForward
from tests.oracle.oracle import Oracle
from tests.training.kit import CONTEXT, OWN, opened, random_adapter, random_model

ROW = ContextExamples(tuple(CONTEXT), (BranchExample(tuple(OWN), (0,)),))


def model_of(tmp_path: Path, family: str = "llama-gqa") -> tuple[LoraModel, Path, Path]:
    model_dir = random_model(tmp_path, family)
    adapter_dir = random_adapter(model_dir, tmp_path / "adapter")
    return opened(model_dir, adapter_dir), model_dir, adapter_dir


def repaired_logits(model: LoraModel, chosen: list[int]) -> Tensor:
    forward, batch = SharedForward(model.causal_lm, model.config), make_batch([ROW], 1.0, model.device)
    with torch.no_grad():
        shared = forward.context(batch.context, STUDENT, Sharing.EAGER)
        seen = forward.repaired(shared, batch.context, torch.tensor(chosen, dtype=torch.long), STUDENT)
        return forward.logits(forward.branches(seen, batch.own, batch.positions, batch.mask, STUDENT))[0]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_from_no_token_to_all_repair_goes_from_the_sharing_to_isolated(family: str, tmp_path: Path) -> None:
    model, model_dir, adapter_dir = model_of(tmp_path, family)
    oracle = Oracle(model_dir)
    for chosen, sharing in (([], "eager"), (list(range(len(CONTEXT))), "isolated")):
        wanted = oracle.logits(CONTEXT, OWN, oracle.adapter(adapter_dir), sharing)
        torch.testing.assert_close(repaired_logits(model, chosen), wanted, atol=5e-5, rtol=0)


def test_a_repaired_end_of_the_context_is_a_branch_that_began_there(tmp_path: Path) -> None:
    model, model_dir, adapter_dir = model_of(tmp_path)
    oracle, start = Oracle(model_dir), 30
    own = [*CONTEXT[start:], *OWN]
    wanted = oracle.logits(CONTEXT[:start], own, oracle.adapter(adapter_dir), "eager")[-len(OWN) :]
    actual = repaired_logits(model, list(range(start, len(CONTEXT))))
    torch.testing.assert_close(actual, wanted, atol=5e-5, rtol=0)


def test_the_sweep_starts_below_isolated_and_ends_there_under_every_measure(tmp_path: Path) -> None:
    model, _, _ = model_of(tmp_path)
    rows = [ContextExamples(tuple(CONTEXT[c:]), (BranchExample(tuple(OWN[c:]), tuple(OWN)),) * 2) for c in range(4)]
    points = RepairSweep(model).run(rows, [0.0, 0.5, 1.0])
    for measure in MEASURES:
        none, half, whole = (point for point in points if point.measure == measure)
        assert none.agreement < 1.0
        assert none.kl > 0.01
        assert none.kl != half.kl
        assert (whole.agreement, whole.kl) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_what_deviates_most_is_repaired_first(tmp_path: Path) -> None:
    model, _, _ = model_of(tmp_path)
    sweep, forward = RepairSweep(model), SharedForward(model.causal_lm, model.config)
    with torch.no_grad():
        alone = forward.context(torch.tensor([CONTEXT]), STUDENT, Sharing.ISOLATED)
        shared = [type(kv)(kv.k.clone(), kv.v.clone()) for kv in alone]
        shared[1].v[:, :, 7] += 1.0
        shared[1].k[:, :, 3] += 0.1
        scores = sweep._scores("deviation", 0, ROW, shared, alone)
    assert scores.argsort(descending=True)[:2].tolist() == [7, 3]


def test_what_the_prompt_attends_to_is_repaired_first(tmp_path: Path) -> None:
    model, _, _ = model_of(tmp_path)
    sweep, forward = RepairSweep(model), SharedForward(model.causal_lm, model.config)
    with torch.no_grad():
        shared = forward.context(torch.tensor([CONTEXT]), STUDENT, Sharing.EAGER)
        spent = sweep._scores("attention", 0, ROW, shared, shared)
        assert spent.sum() < len(OWN) * model.config.num_heads * model.config.num_layers  # the rest goes to its own tokens
        least = int(spent.argmin())
        for kv in shared:  # a key that draws every query of its direction: the negative of none
            kv.k[:, :, least] = 30 * kv.k[:, :, int(spent.argmax())]
        assert int(sweep._scores("attention", 0, ROW, shared, shared).argmax()) == least


def test_a_block_is_repaired_whole_and_the_one_of_the_largest_sum_first() -> None:
    blocks = _blocks_by(torch.tensor([0.0, 9.0, 3.0, 4.0, 5.0, 3.0, 1.0]), 3)
    assert [block.tolist() for block in blocks] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [block.tolist() for block in _blocks_by(torch.tensor([0.0, 1.0, 2.0]), 2)] == [[2], [0, 1]]


def test_the_command_prints_a_point_for_each_share_and_refuses_what_is_none(tmp_path: Path) -> None:
    _, model_dir, adapter_dir = model_of(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"context": CONTEXT, "prompt": OWN}))
    command = ["measure-repair", str(model_dir), str(data), "--adapter", str(adapter_dir), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*command, "--shares", "0,1", "--completion-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert [(point["measure"], point["share"]) for point in points] == [(m, s) for m in MEASURES for s in (0.0, 1.0)]
    assert all(point["token_accuracy"] == 1.0 for point in points if point["share"] == 1.0)  # the completion is its own
    for option, value in (("--shares", "2"), ("--shares", "half"), ("--measures", "best")):
        refused = CliRunner().invoke(cli, [*command, option, value])
        assert refused.exit_code == 2
        assert option in refused.stderr

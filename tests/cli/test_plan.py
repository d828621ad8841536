"""``forkkv plan`` from its arguments to the table and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forkkv_cluster.__main__ import cli

runner = CliRunner()


def test_json_holds_the_bytes_of_sixteen_agents_over_32k() -> None:
    ran = runner.invoke(cli, ["plan", "Llama-3.1-8B", "--card", "h200", "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["model"]["base_bytes_per_token"] == 128 * 1024
    assert found["model"]["residual_bytes_per_token"] == 2048
    by_policy = {made["policy"]: made for made in found["policies"]}
    assert by_policy["isolated"]["kv"]["base"] == 64 * 2**30
    assert by_policy["eager"]["kv"]["base"] + by_policy["eager"]["kv"]["residual"] == 5 * 2**30
    assert by_policy["isolated"]["ratio_to_isolated"] == 1.0
    assert by_policy["eager"]["ratio_to_no_adapters"] < 1.0 < by_policy["eager"]["ratio_to_isolated"]


def test_the_table_has_a_row_for_each_policy_and_says_who_waits() -> None:
    ran = runner.invoke(cli, ["plan", "llama-3.1-8b", "--card", "h100"])
    assert ran.exit_code == 0, ran.output
    rows = [line.split()[0] for line in ran.stdout.splitlines() if line.strip()]
    assert [word for word in rows if word in {"isolated", "residual", "eager", "base", "no"}] == [
        "isolated", "residual", "eager", "base", "no",
    ]  # fmt: skip
    assert "Not all agents fit at once: isolated." in " ".join(ran.stdout.split())


def test_a_directory_gives_its_own_shape(tiny_model_dir: Path) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    ran = runner.invoke(cli, ["plan", str(tiny_model_dir), "--context", "64", "--agents", "4", "--rank", "8", "--json"])
    assert ran.exit_code == 0, ran.output
    model = json.loads(ran.stdout)["model"]
    assert (model["num_layers"], model["hidden_size"]) == (config["num_hidden_layers"], config["hidden_size"])


def test_measured_numbers_go_into_the_plan() -> None:
    command = ["plan", "qwen3-8b", "--memory", "40GiB", "--tb-per-s", "1.5", "--tflop-per-s", "200", "--json"]
    card = json.loads(runner.invoke(cli, command).stdout)["card"]
    assert (card["memory_bytes"], card["tb_per_s"], card["tflop_per_s"]) == (40 * 2**30, 1.5, 200.0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such-model"], "Qwen2.5-7B"),
        (["llama-3.1-8b", "--card", "b100"], "H200"),
        (["llama-3.1-8b", "--context", "many"], "32k"),
        (["llama-3.1-8b", "--targets", "q,w"], "gate"),
        (["llama-3.1-8b", "--agents", "2", "--adapters", "3"], "share an adapter"),
        (["llama-3.1-8b", "--memory", "lots"], "80GiB"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(arguments: list[str], complaint: str) -> None:
    ran = runner.invoke(cli, ["plan", *arguments])
    assert ran.exit_code == 2
    assert complaint in " ".join(ran.output.split())


def test_agents_beyond_the_models_positions_are_told() -> None:
    ran = runner.invoke(cli, ["plan", "qwen2.5-7b"])
    assert "beyond the 32768 positions" in " ".join(ran.stdout.split())

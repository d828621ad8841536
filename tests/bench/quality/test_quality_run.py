"""The whole comparison on the real engine, over a small random model: what must be exact is, and what must show does."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from forkkv_cluster.bench.cli import app
from forkkv_cluster.bench.quality.comparison import Row
from forkkv_cluster.bench.quality.engine import QualityEngine, engine_config
from forkkv_cluster.bench.quality.policies import Cell, Policy
from forkkv_cluster.bench.quality.pool import Local, Processes
from forkkv_cluster.bench.quality.recorder import Reading
from forkkv_cluster.bench.quality.run import QualityOptions, evenly_spaced, run_quality
from forkkv_cluster.bench.quality.samples import QualitySample
from forkkv_cluster.bench.quality.summary import whole
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import WriterMode
from forkkv_cluster.testing.tiny_models import build_tiny_kit, save_alora_adapter
from tests.fidelity_kit import SPEC, save_adapter

LINE = "The river rose in the night. The bridge was closed at four, and nobody told the school. "
QUESTION = "\nQ: What now?\nA:"
SAMPLES = [QualitySample(LINE * (1 + index) + str(index), QUESTION, "Nothing.") for index in range(3)]
ALL_BUT_AUTO = tuple(policy for policy in Policy if policy is not Policy.AUTO)
SHARED = (Policy.RESIDUAL, Policy.EAGER, Policy.DROPPED)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_kit(tmp_path_factory.mktemp("quality") / "kit", num_adapters=0, spec=SPEC).model_dir


@pytest.fixture(scope="module")
def adapters(model_dir: Path) -> Mapping[str, str]:
    """``still`` changes nothing (B is zero), ``strong`` changes everything."""
    directory = model_dir.parent.parent
    strengths = {"still": 0.0, "strong": 1.0}
    return {name: str(save_adapter(model_dir, directory / name, strength)) for name, strength in strengths.items()}


SMALL: dict[str, Any] = {"dtype": "float32", "kv_bytes": "16MiB", "num_threads": 1}


def engine_over(model_dir: Path, adapters: Mapping[str, str]) -> QualityEngine:
    return QualityEngine(engine_config(model_dir, adapters, **SMALL))


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapters: Mapping[str, str]) -> QualityEngine:
    return engine_over(model_dir, adapters)


@pytest.fixture(scope="module")
def rows(engine: QualityEngine) -> list[Row]:
    """Of all cells, over all lengths."""
    options = QualityOptions(policies=ALL_BUT_AUTO, max_tokens=6, batch_size=2)
    found = run_quality(engine.subjects, Local(engine), SAMPLES, options)
    engine.engine.check_invariants()
    return whole(found.rows)


def only(rows: list[Row], adapter: str, policy: Policy, writer: str = "canonical", first: str | None = None) -> Row:
    (row,) = (r for r in rows if (r.adapter, r.policy, r.writer, r.first) == (adapter, policy, writer, first or adapter))
    return row


def is_exact(row: Row) -> bool:
    errors = [value for values in row.errors.values() for value in values]
    return row.agreement.value == row.identical.value == 1.0 and row.kl < 1e-5 and max(errors) < 1e-4


def test_isolated_agrees_with_itself(rows: list[Row]):
    for adapter in ("still", "strong"):
        row = only(rows, adapter, Policy.ISOLATED)
        assert is_exact(row)
        assert (row.num_samples, row.num_positions) == (3, 18)
        assert row.accuracy_loss.value == row.f1_loss.value == 0.0


def test_an_adapter_that_changes_nothing_agrees_under_every_policy(rows: list[Row]):
    for policy in (*SHARED, Policy.UNADAPTED):
        assert is_exact(only(rows, "still", policy)), policy


def test_a_strong_adapter_disagrees_where_its_context_is_shared(rows: list[Row]):
    for policy in SHARED:
        row = only(rows, "strong", policy)
        assert row.agreement.value < 1.0
        assert row.kl > 1e-4
        assert row.identical.value < 1.0
        assert row.divergence is not None
        assert max(row.errors["hidden"]) > 0.01


def test_eager_is_exact_in_the_first_layer_where_dropping_the_residual_is_not(rows: list[Row]):
    eager, dropped = (only(rows, "strong", policy).errors for policy in (Policy.EAGER, Policy.DROPPED))
    for name in ("k", "v"):
        assert eager[name][0] < 1e-4 < 0.01 < dropped[name][0]
        assert np.mean(dropped[name]) > np.mean(eager[name])


def test_what_an_adapter_wrote_first_itself_is_exact_and_what_another_wrote_is_not(rows: list[Row]):
    assert is_exact(only(rows, "strong", Policy.RESIDUAL, "first"))
    foreign = only(rows, "still", Policy.RESIDUAL, "first", "strong")
    assert foreign.errors["k"][1] > 0.01
    assert not is_exact(foreign)


def test_what_the_base_model_writes_gives_the_same_answers_whoever_comes_first(rows: list[Row]):
    arrived = [row for row in rows if not row.is_first and row.writer == "canonical"]
    assert {row.policy for row in arrived} == {str(policy) for policy in SHARED}
    assert [row.same_as_alone for row in arrived] == [1.0] * len(arrived)


def test_an_alora_is_exact_under_base(model_dir: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    invocation = AutoTokenizer.from_pretrained(model_dir).encode(QUESTION, add_special_tokens=False)[-2:]
    path = save_alora_adapter(model_dir, tmp_path / "spark", invocation)
    engine = engine_over(model_dir, {"spark": str(path)})
    options = QualityOptions(policies=(Policy.BASE, Policy.UNADAPTED), max_tokens=4)
    found = run_quality(engine.subjects, Local(engine), SAMPLES[:2], options).rows
    assert is_exact(next(row for row in found if row.policy == "base"))
    assert not is_exact(next(row for row in found if row.policy == "unadapted"))


def test_a_converted_adapter_is_held_against_the_isolated_answers_of_the_one_it_was_made_from(
    engine: QualityEngine, rows: list[Row]
):
    options = QualityOptions((Policy.ISOLATED, Policy.EAGER), num_arrivals=1, max_tokens=6, references={"still": "strong"})
    found = run_quality(engine.subjects, Local(engine), SAMPLES, options)
    own = [row for row in whole(found.rows) if row.adapter == "still"]
    assert [(row.policy, row.reference, row.is_reference) for row in own] == [
        ("isolated", "strong", False),
        ("eager", "strong", False),
    ]
    assert all(row.agreement.value < 1.0 and row.errors["v"][0] > 0.01 for row in own)
    assert only(whole(found.rows), "strong", Policy.ISOLATED).accuracy == only(rows, "strong", Policy.ISOLATED).accuracy


def test_processes_find_what_one_engine_finds_and_auto_serves_what_it_measured(
    model_dir: Path, adapters: Mapping[str, str], engine: QualityEngine
):
    options = QualityOptions((Policy.EAGER, Policy.AUTO), num_arrivals=1, max_tokens=4, batch_size=1, num_probes=1)
    config = engine_config(
        model_dir, adapters, **SMALL, calibration={"min_positions": 200, "context_tokens": 32, "max_disagreement": 0.05}
    )
    with Processes(config, 2) as pool:
        apart = run_quality(engine.subjects, pool, SAMPLES, options)
    together = run_quality(engine.subjects, Local(QualityEngine(config)), SAMPLES, options)
    assert [row.to_json() for row in apart.rows] == [row.to_json() for row in together.rows]
    assert {name: verdict.sharing for name, verdict in apart.verdicts.items()} == {"still": "eager", "strong": "isolated"}
    still, strong = (only(whole(apart.rows), name, Policy.AUTO) for name in adapters)
    assert (still.served, strong.served) == ("eager", "isolated")
    assert still.shared_share > 0.5
    assert strong.shared_share == 0.0
    assert is_exact(strong)


def test_out_of_time_what_has_run_is_reported(engine: QualityEngine):
    options = QualityOptions((Policy.EAGER,), num_arrivals=1, max_tokens=2, batch_size=2, num_probes=0)
    found = run_quality(engine.subjects, Local(engine), SAMPLES, options, max_seconds=0)
    assert {(row.adapter, row.num_samples) for row in whole(found.rows)} == {("still", 2)}


def test_an_adapter_without_a_sample_is_refused(engine: QualityEngine):
    with pytest.raises(InvalidArgument, match="strong"):
        run_quality(engine.subjects, Local(engine), [QualitySample("C", "Q", "A", adapter="still")], QualityOptions())


def test_probes_are_spread_over_the_samples():
    assert evenly_spaced(10, 2) == [0, 5]
    assert evenly_spaced(3, 9) == [0, 1, 2]
    assert evenly_spaced(3, 0) == []


# --- what is read, against Transformers and PEFT ----------------------------------------------------------------------


def reading_of(engine: QualityEngine, policy: Policy) -> tuple[Reading, list[int]]:
    """Of ``strong``; the second: its whole input."""
    job = engine.job(LINE * 3, QUESTION)
    run = engine.open(Cell("strong", policy, WriterMode.CANONICAL, "strong", "strong"), [job])
    (reading,) = run.readings([(7, 8, 9)], [0])
    return reading, [*job.context.tolist(), *job.question.tolist(), 7, 8, 9]


def oracle(model_dir: Path, adapter: str | None, tokens: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """K, V [n, Hkv, D] and hidden states [n, H] by layer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=True)
    layers = out.past_key_values.layers
    keys, values = (
        [tensor[0].transpose(0, 1) for tensor in each] for each in zip(*((x.keys, x.values) for x in layers), strict=True)
    )
    return keys, values, [hidden[0] for hidden in out.hidden_states[1:]]


def test_readings_of_isolated_are_what_peft_computes(engine: QualityEngine, model_dir: Path, adapters: Mapping[str, str]):
    reading, tokens = reading_of(engine, Policy.ISOLATED)
    keys, values, hidden = oracle(model_dir, adapters["strong"], tokens)
    num_context = len(reading.k[0])
    for layer in range(SPEC.num_layers):
        torch.testing.assert_close(reading.k[layer], keys[layer][:num_context], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.v[layer], values[layer][:num_context], atol=1e-4, rtol=1e-4)
    for layer in range(SPEC.num_layers - 1):  # the last one's come out of Transformers normalised
        torch.testing.assert_close(reading.hidden[layer], hidden[layer][num_context:], atol=1e-4, rtol=1e-4)
    assert len(reading.hidden[-1]) == len(tokens) - num_context


def test_dropped_reads_the_base_models_context(engine: QualityEngine, model_dir: Path):
    reading, tokens = reading_of(engine, Policy.DROPPED)
    keys, values, _ = oracle(model_dir, None, tokens)
    for layer in range(SPEC.num_layers):
        torch.testing.assert_close(reading.k[layer], keys[layer][: len(reading.k[layer])], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.v[layer], values[layer][: len(reading.v[layer])], atol=1e-4, rtol=1e-4)


# --- the command ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Balanced tags, and how many of each."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quality", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_a_report_and_a_page(model_dir: Path, adapters: Mapping[str, str], tmp_path: Path):
    samples, out, page = tmp_path / "s.jsonl", tmp_path / "o.json", tmp_path / "o.html"
    samples.write_text(json.dumps({"context": LINE, "question": QUESTION, "answer": "<None> & nothing"}))
    options = [
        "--policy",
        "eager",
        "--writer",
        "canonical",
        "--arrivals",
        1,
        "--max-tokens",
        3,
        "--threads",
        1,
        "--kv-bytes",
        "16MiB",
    ]
    result = invoke(
        model_dir, f"--adapter=strong={adapters['strong']}", "--samples", samples, "--json", out, "--html", page, *options
    )
    assert result.exit_code == 0, result.output
    assert "strong (rank 8)" in result.output
    report = json.loads(out.read_text())
    assert (report["format"], report["num_samples"], report["options"]["num_top"]) == ("forkkv-quality/2", 1, 20)
    assert [row["policy"] for row in report["rows"]] == ["isolated", "eager"]
    assert {"value", "low", "high"} == set(report["rows"][1]["accuracy_loss"])
    text = page.read_text()
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.counts["tr"] == 7  # the adapter's table, and one line of each in the two over all adapters
    charts = text.split("<svg")[1:]
    assert len(charts) == 7
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--adapter", "strong"], "--adapter"),
        (["--adapter", "a=x", "--adapter", "a=y"], "twice"),
        (["--adapter", "poet=x"], "--role"),
        (["--adapter", "hop=x", "--samples", "none.jsonl"], "--samples"),
        (["--adapter", "hop=x", "--json", "/nowhere/o.json"], "--json"),
        (["--adapter", "hop=x", "--reference", "hop=hop-eager"], "--reference"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(model_dir: Path, arguments: list[str], named: str):
    result = invoke(model_dir, *arguments)
    assert result.exit_code == 2
    assert named in result.output

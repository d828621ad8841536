"""The tiny kit: deterministic, complete or absent, and honest about what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import AutoTokenizer

from forkkv_cluster.engine.digest import digest_files
from forkkv_cluster.testing.tiny_models import (
    ADAPTER_NAMES,
    TinyKit,
    TinyModelSpec,
    build_tiny_kit,
    demo_document,
    save_alora_adapter,
)

SMALL = TinyModelSpec(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)


def content(directory: Path) -> str:
    return digest_files(path for path in directory.iterdir() if path.is_file())


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (build_tiny_kit(tmp_path / name, num_adapters=3, spec=SMALL) for name in ("one", "two"))
    assert content(one.model_dir) == content(two.model_dir)
    for name in ADAPTER_NAMES[:3]:
        assert content(one.adapter_dirs[name]) == content(two.adapter_dirs[name])


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one, two = (build_tiny_kit(tmp_path / str(seed), num_adapters=1, seed=seed, spec=SMALL) for seed in (0, 1))
    assert content(one.model_dir) != content(two.model_dir)
    assert content(one.adapter_dirs["planner"]) != content(two.adapter_dirs["planner"])


def test_a_complete_kit_is_used_again(tmp_path: Path) -> None:
    kit = build_tiny_kit(tmp_path / "kit", num_adapters=1, spec=SMALL)
    before = (kit.model_dir / "model.safetensors").stat().st_mtime_ns
    again = build_tiny_kit(tmp_path / "kit", num_adapters=1, spec=SMALL)
    assert (again.model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "thesis.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match="is not this tiny kit"):
        build_tiny_kit(tmp_path / "kit", num_adapters=1, spec=SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["kit", "thesis.txt"]


def test_an_alora_is_saved_as_peft_saves_it_and_the_same_each_time(tmp_path: Path) -> None:
    kit = build_tiny_kit(tmp_path / "kit", num_adapters=1, spec=SMALL)
    one, two = (save_alora_adapter(kit.model_dir, tmp_path / name, [5, 6]) for name in ("one", "two"))
    assert PeftConfig.from_pretrained(str(one)).alora_invocation_tokens == [5, 6]
    assert content(one) == content(two)
    assert content(save_alora_adapter(kit.model_dir, tmp_path / "three", [5, 6], seed=1)) != content(one)


def test_more_adapters_than_names_get_numbers(tmp_path: Path) -> None:
    kit = build_tiny_kit(tmp_path / "kit", num_adapters=9, spec=SMALL)
    assert list(kit.adapter_dirs) == [*ADAPTER_NAMES, "planner-2"]
    assert content(kit.adapter_dirs["planner"]) != content(kit.adapter_dirs["planner-2"])


def test_the_kit_says_that_it_is_random(tiny_kit: TinyKit) -> None:
    assert "random" in tiny_kit.model_dir.name
    assert all("random" in path.name for path in tiny_kit.adapter_dirs.values())
    assert "means nothing" in (tiny_kit.directory / "README.md").read_text()


def test_the_document_is_long_enough_and_survives_the_tokenizer(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(demo_document()).input_ids
    assert len(ids) >= 4000
    assert tokenizer.decode(ids) == demo_document()


def test_text_that_the_tokenizer_never_saw_survives_it(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "Zürich, 北京: naïve 🙂\t100%"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_marks_roles_and_asks_for_an_answer(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Clara?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>Who is Clara?<|end|><|assistant|>"

"""Put a trained model, its adapters, logs and scores where the package ships them:

python -m forkkv_cluster.training.casebook.assemble BASE_DIRECTORY ADAPTERS_DIRECTORY --converted CONVERTED_DIRECTORY
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forkkv_cluster.core.adapter_semantics import SEMANTICS_FILE
from forkkv_cluster.training.casebook.assets import ROOT

_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_WEIGHTS = "adapter_model.safetensors"
_MAX_BYTES = 24_000_000


def main(
    base: Annotated[Path, typer.Argument(help="What train_base wrote.")],
    adapters: Annotated[Path, typer.Argument(help="What train_adapters wrote.")],
    converted: Annotated[Path | None, typer.Option(help="Adapters that train-adapter wrote, each in a folder.")] = None,
    target: Annotated[Path, typer.Option(help="Where the assets go.")] = ROOT,
) -> None:
    """Copy logs and weights, the adapters' in bfloat16; gather the scores. Refuses more than 24 MB of weights."""
    trained = sorted(path.parent for path in adapters.glob("*/scores.json"))
    shared = sorted(path.parent for path in converted.glob(f"*/{SEMANTICS_FILE}")) if converted is not None else []
    num_bytes = (base / "model" / "model.safetensors").stat().st_size + sum(map(_num_bytes, [*trained, *shared]))
    if num_bytes > _MAX_BYTES:
        raise typer.BadParameter(f"{num_bytes} bytes of weights are more than {_MAX_BYTES}: leave an adapter out.")
    _copy(base / "model", target / "model", _MODEL_FILES)
    _copy(base, target / "logs", ("training_log.jsonl",), "base.jsonl")
    scores: dict[str, Any] = {"base": json.loads((base / "scores.json").read_text()), "adapters": {}}
    for path in trained:
        _copy_adapter(path, target / "adapters" / path.name)
        _copy(path, target / "logs", ("training_log.jsonl",), f"{path.name}.jsonl")
        scores["adapters"][path.name] = json.loads((path / "scores.json").read_text())
    for path in shared:
        _copy_adapter(path, target / "converted" / path.name)
        _copy(path, target / "converted" / path.name, (SEMANTICS_FILE,))
    (target / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    typer.echo(f"{len(trained)} adapters, {len(shared)} converted, {num_bytes / 1e6:.1f} MB of weights in {target}")


def _num_bytes(adapter: Path) -> int:
    """In bfloat16."""
    with safe_open(adapter / _WEIGHTS, framework="pt") as file:
        return sum(2 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def _copy_adapter(source: Path, target: Path) -> None:
    _copy(source, target, ("adapter_config.json",))
    tensors = load_file(source / _WEIGHTS)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, target / _WEIGHTS, metadata={"format": "pt"})


def _copy(source: Path, target: Path, names: tuple[str, ...], renamed: str | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / (renamed or name))


if __name__ == "__main__":
    typer.run(main)

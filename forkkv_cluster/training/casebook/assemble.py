"""Put a trained model, its adapters, logs and scores where the package ships them:

python -m forkkv_cluster.training.casebook.assemble BASE_DIRECTORY ADAPTERS_DIRECTORY
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from forkkv_cluster.training.casebook.assets import ROOT

_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAX_BYTES = 24_000_000


def main(
    base: Annotated[Path, typer.Argument(help="What train_base wrote.")],
    adapters: Annotated[Path, typer.Argument(help="What train_adapters wrote.")],
    target: Annotated[Path, typer.Option(help="Where the assets go.")] = ROOT,
) -> None:
    """Copy weights and logs, gather the scores. Refuses more than 24 MB of weights."""
    trained = sorted(path.parent for path in adapters.glob("*/scores.json"))
    weights = [base / "model" / "model.safetensors", *(path / "adapter_model.safetensors" for path in trained)]
    num_bytes = sum(path.stat().st_size for path in weights)
    if num_bytes > _MAX_BYTES:
        raise typer.BadParameter(f"{num_bytes} bytes of weights are more than {_MAX_BYTES}: leave an adapter out.")
    _copy(base / "model", target / "model", _MODEL_FILES)
    _copy(base, target / "logs", ("training_log.jsonl",), "base.jsonl")
    scores: dict[str, Any] = {"base": json.loads((base / "scores.json").read_text()), "adapters": {}}
    for path in trained:
        _copy(path, target / "adapters" / path.name, _ADAPTER_FILES)
        _copy(path, target / "logs", ("training_log.jsonl",), f"{path.name}.jsonl")
        scores["adapters"][path.name] = json.loads((path / "scores.json").read_text())
    (target / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    typer.echo(f"{len(trained)} adapters, {num_bytes / 1e6:.1f} MB of weights in {target}")


def _copy(source: Path, target: Path, names: tuple[str, ...], renamed: str | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / (renamed or name))


if __name__ == "__main__":
    typer.run(main)

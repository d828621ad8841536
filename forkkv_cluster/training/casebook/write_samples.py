"""Casebooks as the samples on which ``auto`` measures the shipped adapters, each asked about its own role:

python -m forkkv_cluster.training.casebook.write_samples            # for every shipped adapter; again when one is added

An adapter that is asked what it was not trained for answers nonsense, on which sharing says nothing about its work. The
casebooks are of the training split, so that nothing held out is used up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from forkkv_cluster.engine.sample_contexts import SAMPLES_FILE
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.generator import Casebook, build_casebook
from forkkv_cluster.training.casebook.roles import Turn, ask
from forkkv_cluster.training.casebook.tokenizer import Encoder, turn_text

POSITIONS = 2_400
"""Answer tokens of a file, at least: 2,000 are compared, and an adapter's own answers may be shorter than the true ones."""

_LENGTHS = (192, 256, 320, 384)
_QUESTIONS = 8


def asked_books(encoder: Encoder, role: str, *, positions: int, seed: int) -> Iterator[tuple[Casebook, list[Turn]]]:
    """Training casebooks with questions of ``role``, until the true answers hold ``positions`` tokens, their ends included."""
    rng = random.Random(f"calibration/{role}/{seed}")
    num_tokens = 0
    while num_tokens < positions:
        book = build_casebook(rng, rng.choice(_LENGTHS), "train")
        turns = ask(role, rng, book, _QUESTIONS)
        if turns:
            num_tokens += sum(len(encoder.turn(turn)[1]) for turn in turns)
            yield book, turns


def sample_lines(encoder: Encoder, role: str, *, positions: int = POSITIONS, seed: int = 0) -> str:
    """The file's text; the same for the same arguments."""
    books = asked_books(encoder, role, positions=positions, seed=seed)
    lines = ({"context": book.text, "prompts": [turn_text(turn.question) for turn in turns]} for book, turns in books)
    return "".join(json.dumps(line) + "\n" for line in lines)


def measured_adapters() -> dict[str, Path]:
    """Directories of the shipped adapters that ``auto`` measures: an aLoRA is exact under every sharing."""
    return {name: path for name, path in assets.adapter_dirs().items() if not _is_activated(path)}


def _is_activated(directory: Path) -> bool:
    config = json.loads((directory / "adapter_config.json").read_text())
    return bool(config.get("alora_invocation_tokens"))


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Shipped adapters; all that are measured by default.")] = None,
) -> None:
    """Write calibration_samples.jsonl beside each shipped adapter that is no aLoRA."""
    encoder, shipped = Encoder(assets.model_dir()), measured_adapters()
    for name in names or shipped:
        if name not in shipped:
            raise typer.BadParameter(f"{name} is no shipped adapter that is measured: name one of {', '.join(shipped)}.")
        path = shipped[name] / SAMPLES_FILE
        path.write_text(sample_lines(encoder, assets.role_of(name)))
        typer.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)

"""Casebooks as the JSON lines that ``forkkv train-adapter`` reads: many questions of one role to each context."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.generator import build_casebook
from forkkv_cluster.training.casebook.roles import ask
from forkkv_cluster.training.casebook.split import Split
from forkkv_cluster.training.casebook.tokenizer import Encoder

Line = dict[str, list[int]]


def lines(
    encoder: Encoder, role: str, *, contexts: int, questions: int, lengths: tuple[int, ...], seed: int, split: Split = "train"
) -> Iterator[Line]:
    """``contexts`` casebooks of one of ``lengths`` tokens each, with up to ``questions`` branches: token ids."""
    rng = random.Random(f"{role}/{seed}")
    found = 0
    while found < contexts:
        book = build_casebook(rng, rng.choice(lengths), split)
        turns = ask(role, rng, book, questions)
        found += bool(turns)
        context = encoder.context(book.text).tolist()
        for turn in turns:
            prompt, completion = encoder.turn(turn)
            yield {"context": context, "prompt": list(prompt), "completion": list(completion)}


def main(
    role: Annotated[str, typer.Argument(help="A casebook role, for example extractor.")],
    out: Annotated[Path, typer.Argument(help="JSON lines file to write.")],
    contexts: Annotated[int, typer.Option(help="Casebooks.", min=1)] = 500,
    questions: Annotated[int, typer.Option(help="Questions to each, at most.", min=1)] = 6,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a casebook; repeatable. Default: 192 to 384.")] = None,
    seed: Annotated[int, typer.Option(help="Of the casebooks.")] = 0,
    is_held_out: Annotated[
        bool, typer.Option("--held-out", help="For --eval-data: of pairs that training never sees.")
    ] = False,
) -> None:
    """Write casebooks for `forkkv train-adapter`."""
    lengths = tuple(length or (192, 256, 320, 384))
    encoder = Encoder(assets.model_dir())
    split: Split = "held_out" if is_held_out else "train"
    written = lines(encoder, role, contexts=contexts, questions=questions, lengths=lengths, seed=seed, split=split)
    out.write_text("".join(json.dumps(line) + "\n" for line in written))


if __name__ == "__main__":
    typer.run(main)

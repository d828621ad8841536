"""One held-out casebook with questions to each role: what the demo and the quick start read.

``assets/casebook/sample`` holds it as files. After a change of the generator or the roles, write them anew:

python -m forkkv_cluster.training.casebook.sample
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from forkkv_cluster.training.casebook.assets import ROOT
from forkkv_cluster.training.casebook.generator import Casebook, build_casebook
from forkkv_cluster.training.casebook.roles import ROLES, Turn, ask

__all__ = ["NUM_TOKENS", "sample_book", "sample_turns", "write_sample"]

NUM_TOKENS = 2000
"""At most. With a branch's turns after it, it stays within the lengths of training."""
_SEED = 0
_NUM_QUESTIONS = 4


@cache
def sample_book() -> Casebook:
    """The same in every process."""
    return build_casebook(random.Random(_SEED), NUM_TOKENS, "held_out")


def sample_turns(role: str, count: int) -> list[Turn]:
    """Up to ``count`` questions about it, the same for the same arguments. Raises KeyError for an unknown role."""
    return ask(role, random.Random(f"{role}/{_SEED}"), sample_book(), count)


def write_sample(directory: Path) -> None:
    """``casebook.txt``, which does not end in a line break: questions begin with one. ``questions.json``: by role."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "casebook.txt").write_text(sample_book().text)
    questions = {
        role: [{"question": turn.question, "answer": turn.answer} for turn in sample_turns(role, _NUM_QUESTIONS)]
        for role in ROLES
    }
    (directory / "questions.json").write_text(json.dumps(questions, indent=2) + "\n")


def main(directory: Annotated[Path, typer.Argument(help="Where the files go.")] = ROOT / "sample") -> None:
    """Write the sample casebook and its questions."""
    write_sample(directory)


if __name__ == "__main__":
    typer.run(main)

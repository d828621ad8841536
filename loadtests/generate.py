"""Writes traces (forkkv-trace/1) of the workloads that loadtests/README.md describes. Seeded: same arguments, same bytes.

python loadtests/generate.py mapreduce --mappers 8 --context 4096 > mapreduce.jsonl
python loadtests/generate.py react --agents 4 --turns 8 --output react.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from forkkv_cluster.bench.trace import ContextEvent, JoinEvent, Timing, TokenSource, Trace, TraceEvent, TurnEvent
from forkkv_cluster.core.session import JoinWhat


class TokenSeeds:
    """A fresh seed for every run of tokens of one trace, so that no two share a prefix by accident."""

    def __init__(self, seed: int) -> None:
        self._next = itertools.count(seed * 2**20 + 1)

    def tokens(self, num_tokens: int) -> TokenSource:
        return TokenSource(num_tokens=num_tokens, seed=next(self._next) % 2**32)


def mapreduce(options: argparse.Namespace) -> Trace:
    """N mappers in parallel over one context, each with a private suffix; then one reducer over it and all their outputs."""
    draw, seeds = random.Random(options.seed), TokenSeeds(options.seed)
    events: list[TraceEvent] = []
    for c in range(options.contexts):
        context, at_s = f"c{c}", c * options.gap_s
        events.append(ContextEvent(context, seeds.tokens(options.context), options.adapters, "t0", Timing(at_s)))
        joins = []
        for m in range(options.mappers):
            turn, branch = f"{context}-map{m}", f"map{m}"
            adapter = options.adapters[m % len(options.adapters)]
            suffix = draw.randint(options.suffix[0], options.suffix[1])
            events.append(TurnEvent(turn, context, branch, adapter, seeds.tokens(suffix), options.max_tokens, Timing(at_s)))
            joins.append(JoinEvent(f"{context}-join{m}", context, branch, JoinWhat.OUTPUT, Timing(after=(turn,))))
        events.extend(joins)
        after = Timing(after=tuple(join.id for join in joins))
        ask = seeds.tokens(options.suffix[0])
        events.append(TurnEvent(f"{context}-reduce", context, "reduce", options.adapters[0], ask, options.reduce_tokens, after))
    note = f"mapreduce: {options.contexts} x {options.mappers} mappers over {options.context} tokens, seed {options.seed}"
    return Trace(options.vocab_size, options.adapters, tuple(events), note)


def react(options: argparse.Namespace) -> Trace:
    """Agents over one context take turns round robin: each appends an observation and generates; gaps are tool calls."""
    draw, seeds = random.Random(options.seed), TokenSeeds(options.seed)
    events: list[TraceEvent] = [ContextEvent("c0", seeds.tokens(options.context), options.adapters, "t0")]
    previous: tuple[str, ...] = ()
    for round_, agent in itertools.product(range(options.turns), range(options.agents)):
        turn = f"r{round_}-a{agent}"
        observation = max(1, round(draw.gauss(options.observation, options.observation / 4)))
        length = draw.randint(options.output_tokens[0], options.output_tokens[1])
        think_s = draw.expovariate(1 / options.think_s) if previous and options.think_s > 0 else 0.0
        adapter = options.adapters[agent % len(options.adapters)]
        timing = Timing(after=previous, think_s=round(think_s, 4))
        events.append(TurnEvent(turn, "c0", f"agent{agent}", adapter, seeds.tokens(observation), length, timing))
        previous = (turn,)
    note = f"react: {options.agents} agents x {options.turns} turns over {options.context} tokens, seed {options.seed}"
    return Trace(options.vocab_size, options.adapters, tuple(events), note)


def names(text: str) -> tuple[str, ...]:
    found = tuple(name for name in text.split(",") if name)
    if not found:
        raise argparse.ArgumentTypeError("name at least one adapter, for example planner,critic")
    return found


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    values = (positive(low), positive(high or low))
    if values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH with LOW at most HIGH")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = parser.add_subparsers(dest="recipe", required=True)
    for name, make in (("mapreduce", mapreduce), ("react", react)):
        recipe = recipes.add_parser(name, help=(make.__doc__ or "").strip(), description=make.__doc__)
        recipe.set_defaults(make=make)
        recipe.add_argument("--seed", type=int, default=0)
        recipe.add_argument("--vocab-size", type=positive, default=8192)
        recipe.add_argument("--adapters", type=names, default=("planner", "critic", "coder", "tester"), metavar="A,B")
        recipe.add_argument("--output", type=Path, help="file to write (default: standard output)")
        recipe.add_argument("--context", type=positive, default=8192, help="tokens of the shared context")
    mapping, acting = recipes.choices["mapreduce"], recipes.choices["react"]
    mapping.add_argument("--contexts", type=positive, default=1)
    mapping.add_argument("--gap-s", type=float, default=1.0, help="seconds between two contexts")
    mapping.add_argument("--mappers", type=positive, default=8)
    mapping.add_argument("--suffix", type=span, default=(128, 512), metavar="LOW:HIGH", help="tokens of a mapper's own input")
    mapping.add_argument("--max-tokens", type=positive, default=64, help="tokens that a mapper generates")
    mapping.add_argument("--reduce-tokens", type=positive, default=128, help="tokens that the reducer generates")
    acting.add_argument("--agents", type=positive, default=4)
    acting.add_argument("--turns", type=positive, default=8, help="turns of each agent")
    acting.add_argument("--observation", type=positive, default=256, help="tokens of an observation, on average")
    acting.add_argument("--output-tokens", type=span, default=(64, 256), metavar="LOW:HIGH")
    acting.add_argument("--think-s", type=float, default=0.2, help="seconds of a tool call, on average (exponential)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    make: Callable[[argparse.Namespace], Trace] = options.make
    text = "".join(line + "\n" for line in make(options).to_lines())
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

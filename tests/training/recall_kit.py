"""A small model that has learned to look values up, and the data of a role that answers with another word for them.

A context is pairs of key and value; a prompt asks for a key; the base answers its value, the role the value's translation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from forkkv_cluster.training.examples import BranchExample, ContextExamples

NUM_WORDS = 32
BOS, EOS, ASK = 0, 1, 2
FIRST_KEY, FIRST_VALUE = 3, 3 + NUM_WORDS
TRANSLATION = random.Random(7).sample(range(NUM_WORDS), NUM_WORDS)
_MAX_STEPS = 15_000
_MOST_FACTS = 10


def translated(value: int) -> int:
    return TRANSLATION[value]


def examples(seed: int, count: int, answer: Callable[[int], int] = translated, most_facts: int = 8) -> list[ContextExamples]:
    """Contexts of 4 to ``most_facts`` facts; a branch asks for each."""
    rng = random.Random(seed)
    return [_example(rng, 4, most_facts, answer) for _ in range(count)]


def _example(rng: random.Random, least: int, most: int, answer: Callable[[int], int]) -> ContextExamples:
    keys = rng.sample(range(NUM_WORDS), rng.randint(least, most))
    facts = [(key, rng.randrange(NUM_WORDS)) for key in keys]
    context = [BOS, *(token for key, value in facts for token in (FIRST_KEY + key, FIRST_VALUE + value))]
    branches = [BranchExample((ASK, FIRST_KEY + key), (FIRST_VALUE + answer(value), EOS)) for key, value in facts]
    rng.shuffle(branches)
    return ContextExamples(tuple(context), tuple(branches))


def train_recall_model(directory: Path, seed: int = 0) -> Path:
    """Takes minutes: more facts come as those so far are found. Raises AssertionError when it has not learned to."""
    config = LlamaConfig(
        vocab_size=FIRST_VALUE + NUM_WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        bos_token_id=BOS, eos_token_id=EOS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    model, rng = LlamaForCausalLM(config), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    most, found = 3, 0.0
    for step in range(_MAX_STEPS):
        found = _step(model, optimizer, [_example(rng, 2, most, lambda value: value) for _ in range(64)])
        warmup.step()
        if step % 100 == 0 and found > 0.99:
            if most == _MOST_FACTS:
                break
            most += 1
    assert found > 0.99, f"the model finds {found:.0%} of {most} facts"
    model.save_pretrained(str(directory))
    return directory


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: list[ContextExamples]) -> float:
    """One step over contexts with all of their questions behind each other: the share of values that were found."""
    ids, is_answer = [], []
    for row in rows:
        tokens, marks = list(row.context), [False] * len(row.context)
        for branch in row.branches:
            tokens += branch.tokens
            marks += [False] * len(branch.prompt) + [True] * len(branch.completion)
        ids.append(torch.tensor(tokens))
        is_answer.append(torch.tensor(marks))
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    where = torch.nn.utils.rnn.pad_sequence(is_answer, batch_first=True)[:, 1:]
    logits, targets = model(padded).logits[:, :-1][where], padded[:, 1:][where]
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    is_value = targets >= FIRST_VALUE
    return float((logits[is_value].argmax(dim=-1) == targets[is_value]).float().mean())

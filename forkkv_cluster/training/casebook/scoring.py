"""Whether an answer is right, as the role means it, and how much of it is."""

from __future__ import annotations

import json
import re
from collections import Counter

__all__ = ["f1", "score"]

_JSON_ROLES = ("formatter", "asked_for_json")
_VERDICT = re.compile(r"\bSo (\w+)\.$")


def score(role: str, answer: str, truth: str) -> float:
    """1.0 or 0.0. JSON counts by what it says, a comparer's answer by its verdict, every other by its words."""
    if role in _JSON_ROLES:
        return float(_parsed(answer) == json.loads(truth))
    if role == "comparer":
        return float(_verdict(answer) is not None and _verdict(answer) == _verdict(truth))
    return float(answer.split() == truth.split())


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words and numbers, each counted as often as it stands."""
    given, wanted = (Counter(re.findall(r"\w+", text)) for text in (answer, truth))
    shared = sum((given & wanted).values())
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def _parsed(answer: str) -> object:
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _verdict(text: str) -> str | None:
    found = _VERDICT.search(text.strip())
    return found.group(1) if found else None

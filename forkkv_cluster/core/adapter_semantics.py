"""What an adapter was trained for: which ``sharing`` its training served it under.

``forkkv.json`` in the adapter's PEFT directory says it, beside files that stay as peft writes them: peft loads such a directory
as any other. It is no part of the adapter's content digest: it says what the adapter is good for, and changes nothing of what
the adapter computes.

    {"format": "forkkv-adapter/1", "trained_for": "eager", "training": {...how, free in form...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import AdapterRef, Sharing

SEMANTICS_FILE = "forkkv.json"
FORMAT = "forkkv-adapter/1"
TRAINABLE = (Sharing.ISOLATED, Sharing.RESIDUAL, Sharing.EAGER, Sharing.BASE)
_REMEDY = f"Mend {SEMANTICS_FILE}, or remove it: then the adapter counts as trained in the ordinary way."


def read_trained_for(directory: str | Path) -> Sharing | None:
    """The sharing that the adapter in ``directory`` was trained under; None where nothing says so, as for every ordinary one.

    Raises InvalidArgument, naming the file, when it is there and cannot be understood.
    """
    path = Path(directory) / SEMANTICS_FILE
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidArgument("path", str(path), f"cannot be read ({error.strerror})", _REMEDY) from None
    except ValueError as error:
        raise InvalidArgument("path", str(path), f"is not JSON ({error})", _REMEDY) from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InvalidArgument("path", str(path), f"is not of format {FORMAT}", _REMEDY)
    trained_for = value.get("trained_for")
    if trained_for not in TRAINABLE:
        raise InvalidArgument("trained_for", trained_for, f"in {path} is not one of {', '.join(TRAINABLE)}", _REMEDY)
    return Sharing(trained_for)


def mismatched_training(adapter: AdapterRef | None, sharing: Sharing) -> Sharing | None:
    """What ``adapter`` says it was trained for, where it is served under another ``sharing``: its answers are then not what
    its training made them. None where both agree, for an adapter that says nothing, and under ``auto``, which is a choice."""
    trained_for = adapter.trained_for if adapter is not None else None
    return trained_for if sharing not in (trained_for, Sharing.AUTO) else None


def write_trained_for(directory: str | Path, sharing: Sharing, training: Mapping[str, Any]) -> Path:
    """Say it of the adapter in ``directory``; ``training`` is JSON for the reader: base model, data, steps, loss."""
    path = Path(directory) / SEMANTICS_FILE
    content = {"format": FORMAT, "trained_for": sharing.value, "training": dict(training)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path

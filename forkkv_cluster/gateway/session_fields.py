"""A session as a flat map of named byte fields: what every durable store keeps, and how little of it an update rewrites.

    meta             JSON: everything that is not tokens
    context          int32 tokens, little endian
    branch:NAME      JSON header, one newline, own tokens, and the context's tokens unless they begin the session's context

Joins only append to the session's context, so a branch usually forked from a beginning of it: then its length is enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np

from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, Sharing, WriterMode
from forkkv_cluster.core.session import Branch, Session, Turn

FORMAT = 1
META = "meta"
CONTEXT = "context"
_BRANCH = "branch:"


def to_fields(session: Session) -> dict[str, bytes]:
    """Every field of the session."""
    fields = {META: _meta(session), CONTEXT: _tokens(session.context)}
    fields.update({_BRANCH + name: _branch(branch, session.context) for name, branch in session.branches.items()})
    return fields


def changed_fields(old: Session, new: Session) -> dict[str, bytes]:
    """The fields of ``new`` that differ from ``old``: sessions are immutable, so the same object has not changed."""
    fields = {META: _meta(new)}
    if new.context is not old.context:
        fields[CONTEXT] = _tokens(new.context)
    for name, branch in new.branches.items():
        if branch is not old.branches.get(name):
            fields[_BRANCH + name] = _branch(branch, new.context)
    return fields


def from_fields(fields: Mapping[str, bytes]) -> Session:
    """The session again. Raises ValueError for a format that this version does not read."""
    meta = json.loads(fields[META])
    if meta["format"] != FORMAT:
        raise ValueError(f"session {meta.get('session_id')}: stored in format {meta['format']}, this version reads {FORMAT}")
    context = _array(fields[CONTEXT])
    branches = {
        name: _read_branch(name, fields[_BRANCH + name], context) for name in meta["branches"]
    }  # In the order of forking, which a map of fields does not keep.
    return Session(
        session_id=meta["session_id"],
        tenant=meta["tenant"],
        context=context,
        adapters=tuple(_ref_of(values) for values in meta["adapters"]),
        sharing=Sharing(meta["sharing"]),
        writer=WriterMode(meta["writer"]),
        created_s=meta["created_s"],
        sharing_group=meta["sharing_group"],
        branches=branches,
        first_writer=_read_ref(meta["first_writer"]),
        keep_s=meta.get("keep_s", 0.0),  # Not written by earlier versions.
    )


def adapter_to_json(adapter: AdapterInfo) -> str:
    """Without its verdict, which is the workers' own. What is not said is left out, as earlier versions wrote it."""
    values = asdict(replace(adapter, verdict=None))
    return json.dumps({name: value for name, value in values.items() if value is not None})


def adapter_from_json(text: str | bytes) -> AdapterInfo:
    values = json.loads(text)
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    sharings = {name: _sharing_or_none(values.get(name)) for name in ("sharing", "trained_for")}
    return AdapterInfo(**{**values, **lists, **sharings})


def _meta(session: Session) -> bytes:
    return json.dumps(
        {
            "format": FORMAT,
            "session_id": session.session_id,
            "tenant": session.tenant,
            "adapters": [_ref(adapter) for adapter in session.adapters],
            "sharing": str(session.sharing),
            "writer": str(session.writer),
            "created_s": session.created_s,
            "sharing_group": session.sharing_group,
            "branches": list(session.branches),
            "first_writer": _ref(session.first_writer),
            "keep_s": session.keep_s,
        }
    ).encode()


def _branch(branch: Branch, session_context: TokenArray) -> bytes:
    num_context = len(branch.context)
    is_beginning = num_context <= len(session_context) and np.array_equal(branch.context, session_context[:num_context])
    header = {
        "adapter": _ref(branch.adapter),
        "sharing": str(branch.sharing),
        "num_own": len(branch.own),
        "num_context": num_context,
        "has_context": not is_beginning,
        "turns": [list(astuple(turn)) for turn in branch.turns],
        "joined_len": branch.joined_len,
    }
    context = b"" if is_beginning else _tokens(branch.context)
    return json.dumps(header).encode() + b"\n" + _tokens(branch.own) + context


def _read_branch(name: str, data: bytes, session_context: TokenArray) -> Branch:
    head, _, body = data.partition(b"\n")
    header: dict[str, Any] = json.loads(head)
    tokens = _array(body)
    own = tokens[: header["num_own"]]
    context = tokens[header["num_own"] :] if header["has_context"] else session_context[: header["num_context"]]
    return Branch(
        name=name,
        adapter=_read_ref(header["adapter"]),
        sharing=Sharing(header["sharing"]),
        context=context,
        own=own,
        turns=tuple(Turn(*turn) for turn in header["turns"]),  # Without a fingerprint where an earlier version wrote it.
        joined_len=header["joined_len"],
    )


def _ref(adapter: AdapterRef | None) -> list[Any] | None:
    if adapter is None:
        return None
    # A plain LoRA as earlier versions wrote, and read, every adapter.
    if adapter.trained_for is not None:
        return [adapter.name, adapter.digest, adapter.invocation_tokens, adapter.trained_for]
    return [adapter.name, adapter.digest, *([adapter.invocation_tokens] if adapter.invocation_tokens else [])]


def _read_ref(values: list[Any] | None) -> AdapterRef | None:
    return None if values is None else _ref_of(values)


def _ref_of(values: list[Any]) -> AdapterRef:
    name, digest, *rest = values
    trained_for = _sharing_or_none(rest[1] if len(rest) > 1 else None)
    return AdapterRef(name, AdapterDigest(digest), tuple(rest[0]) if rest else (), trained_for)


def _sharing_or_none(value: str | None) -> Sharing | None:
    return Sharing(value) if value is not None else None


def _tokens(tokens: TokenArray) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def _array(data: bytes) -> TokenArray:
    return np.frombuffer(data, dtype="<i4").astype(np.int32)

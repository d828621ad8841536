"""Identifiers. All are plain strings or bytes at run time; the names say which is which."""

from __future__ import annotations

import uuid
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
"""xxh3-128 of a block in its chain, 16 bytes, big endian. See ``core.prefix``."""

AdapterDigest = NewType("AdapterDigest", str)
"""Content digest of a LoRA adapter (config and weights), 32 hex characters."""

ModelDigest = NewType("ModelDigest", str)
"""Content digest of a base model (config and weights), 32 hex characters."""

WorkerId = NewType("WorkerId", str)
"""One engine on one accelerator. A restarted worker keeps no id."""

SessionId = NewType("SessionId", str)
RequestId = NewType("RequestId", str)
TenantId = NewType("TenantId", str)


def new_id(prefix: str) -> str:
    """``prefix-`` and 16 random hex characters: unique for every practical purpose."""
    return f"{prefix}-{uuid.uuid4().hex[:16]}"

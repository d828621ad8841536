"""Content digests: the same bytes have the same digest on every host, whatever the directory is called.

SHA-256, cut to 128 bits: adapters may come from strangers, and two that collide would read each other's pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forkkv_cluster.core.errors import InvalidArgument


def digest_files(paths: Iterable[Path]) -> str:
    """32 hex characters over names and contents, in name order. Raises InvalidArgument for a file that cannot be read."""
    ordered = sorted(paths, key=lambda path: path.name)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL: shards are hashed in parallel
        digests = list(pool.map(_digest_file, ordered))
    whole = hashlib.sha256()
    for path, digest in zip(ordered, digests, strict=True):
        whole.update(path.name.encode() + b"\0" + digest)
    return whole.hexdigest()[:32]


def _digest_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InvalidArgument("path", str(path), f"cannot be read ({error.strerror})", "Name a complete directory.") from None

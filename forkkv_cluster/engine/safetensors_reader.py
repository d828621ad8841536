"""Safetensors files with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from forkkv_cluster.core.errors import InvalidArgument


class SafetensorsReader:
    """One open file. ``names`` lists its tensors. Raises InvalidArgument when the file is missing or corrupt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InvalidArgument("path", str(path), "does not exist", "Name a complete directory with safetensors weights.")
        try:
            file: Any = safe_open(str(path), framework="pt")
            self.names: tuple[str, ...] = tuple(file.keys())
        except (SafetensorError, OSError) as error:
            raise InvalidArgument("path", str(path), f"is not a sound safetensors file ({error})", "Save it again.") from None
        self._file = file

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in its own dtype."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise InvalidArgument("path", str(self.path), f"cannot give {name} ({error})", "Save it again.") from None
        return tensor

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)

from __future__ import annotations

import pytest

from tests.engine.fidelity_kit import FidelityKit, build_fidelity_kit


@pytest.fixture(scope="session")
def fidelity_kit(tmp_path_factory: pytest.TempPathFactory) -> FidelityKit:
    """A small random model with adapters that differ in what sharing loses on them; built once."""
    return build_fidelity_kit(tmp_path_factory.mktemp("fidelity"))

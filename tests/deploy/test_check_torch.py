from importlib.metadata import requires
from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("requirements", "is_cuda"),
    [
        (["filelock", "sympy>=1.13"], False),
        (["filelock", "triton==3.7; extra == 'gpu'", 'nvidia-cublas; extra == "all"'], False),
        (["filelock", 'nvidia-cudnn-cu13==9.1; platform_system == "Linux"'], True),
        (["cuda-bindings<14; platform_system == 'Linux'"], True),
        (None, False),
    ],
)
def test_a_build_for_cuda_is_known_by_what_it_requires(check_torch: ModuleType, requirements: list[str] | None, is_cuda: bool):
    assert check_torch.is_cuda_build(requirements) is is_cuda


def test_a_build_for_cuda_fails_with_the_remedy(
    check_torch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(check_torch, "requires", lambda name: ["nvidia-cublas"])
    assert check_torch.main() == 1
    assert "make PIP_ARGS=" in capsys.readouterr().err


def test_the_installed_torch_is_the_one_for_the_cpu(check_torch: ModuleType):
    assert not check_torch.is_cuda_build(requires("torch"))

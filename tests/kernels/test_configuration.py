"""Where Triton kernels can be launched: decided once, with a warning if something is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from specdec_kernels import configuration
from specdec_kernels.configuration import runs_on

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(configuration, "find_spec", lambda name: name)
    monkeypatch.setattr(configuration.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    configuration.runs_on.cache_clear()
    configuration._can_launch.cache_clear()


def test_a_recent_cuda_device_with_triton_and_a_compiler() -> None:
    assert runs_on(CUDA)
    assert not runs_on(torch.device("cpu"))


@pytest.mark.parametrize("missing", ["capability", "nvidia"])
def test_other_devices_use_pytorch(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    else:
        monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not runs_on(CUDA)


def test_missing_triton_gives_one_warning_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match=r"Triton is not installed \(on Linux: pip install 'specdec-lossless\[kernels\]'\)"
    ):
        assert not runs_on(CUDA)
    assert not runs_on(CUDA)


def test_a_missing_compiler_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"gcc or clang, and neither is on the PATH \(install one, or set CC\)"):
        assert not runs_on(CUDA)
    assert not runs_on(CUDA)

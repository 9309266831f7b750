"""No test needs a network, and none may ask one: hub look-ups end at once. Without a GPU, Triton kernels are interpreted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SPECDEC_CACHE"] = str(ROOT / "build" / "test-cache")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _cold_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been compiled when a test begins, whatever another one has left."""
    from specdec_kernels import cpu

    monkeypatch.setattr(cpu, "_IS_LOADED", False)


@pytest.fixture(params=["eager", "recorded"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The steps of what is enabled run as they are, and then as they run on a CUDA device: recorded, heard of a step late."""
    from tests.helpers.recording import recorded

    if request.param == "eager":
        yield
        return
    with recorded():
        yield


@pytest.fixture
def cpu_kernels(_cold_machine: None) -> None:
    """The CPU's own kernels, built where no run of these tests has done so."""
    from specdec_kernels import cpu

    cpu.build()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it would be installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl"))

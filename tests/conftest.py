"""Fixtures of all tests. Hub requests fail at once: no test needs a network. Without a GPU, Triton is interpreted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # else each process that compiles first tries the compiler for 10 s
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"  # of the calls between kernels: a quarter less to compile
os.environ["SPECDEC_CACHE"] = str(ROOT / "build" / "test-cache")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _no_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test starts with the CPU kernels not loaded, whatever earlier tests have built."""
    from specdec_kernels import cpu

    monkeypatch.setattr(cpu, "_IS_LOADED", False)


@pytest.fixture(params=["eager", "recorded"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test with eager steps, and with recorded ones as on a CUDA device, which the host reads one step late."""
    from tests.helpers.recording import recorded

    if request.param == "eager":
        yield
        return
    with recorded():
        yield


@pytest.fixture
def cpu_kernels(_no_cpu_kernels: None) -> None:
    """The CPU kernels, built if no earlier run has done so."""
    from specdec_kernels import cpu

    cpu.build()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the package."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl"))

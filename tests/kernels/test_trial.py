"""A kernel that gives a wrong result on a device, or does not compile, is not used there; trials run interpreted."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

pytest.importorskip("triton")

from specdec_kernels import attention, rejection, trial, w4a16, w8a16

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
DEVICE = CUDA if torch.cuda.is_available() else CPU


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "_PASSED", {})


def test_a_right_kernel_has_one_trial() -> None:
    runs = []
    for _ in range(3):
        assert trial.passes(CUDA, "one", lambda: runs.append(1) or 1e-4)
    assert len(runs) == 1
    assert trial.passes(CPU, "one", lambda: runs.append(1) or math.nan)
    assert len(runs) == 1


@pytest.mark.parametrize("error", [0.1, math.nan, math.inf])
def test_a_wrong_kernel_is_not_used_and_gives_one_warning(error: float) -> None:
    with pytest.warns(
        UserWarning,
        match=r"kernel one is not used on a GPU: its result has a relative error of .*PyTorch's operators are used",
    ):
        assert not trial.passes(CUDA, "one", lambda: error)
    assert not trial.passes(CUDA, "one", lambda: 0.0)
    assert trial.passes(CUDA, "another", lambda: 0.0)


def test_a_kernel_that_does_not_compile_is_not_used() -> None:
    def fail() -> float:
        raise RuntimeError("no ptxas\nwhatever else")

    with pytest.warns(UserWarning, match="RuntimeError: no ptxas; PyTorch's"):
        assert not trial.passes(CUDA, "one", fail)


def test_too_little_memory_is_no_failure() -> None:
    def out_of_memory() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not trial.passes(CUDA, "one", out_of_memory)
    assert trial.passes(CUDA, "one", lambda: 0.0)


def test_no_trial_runs_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.passes(CUDA, "one", lambda: math.nan)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="a relative error of nan"):
        assert not trial.passes(CUDA, "one", lambda: math.nan)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_the_matmul_passes_its_trial_and_a_wrong_one_does_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec_kernels.w4a16 import kernel

    quantization = (kind, 64, torch.float16, torch.float16, DEVICE)
    assert w4a16._try(*quantization) < 1e-3
    launch = kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda x, weight, bias: launch(x, weight, bias) * (1.05 if len(x) > 16 else 1)
    )
    assert w4a16._try(*quantization) > 1e-2


def test_the_8_bit_matmul_passes_its_trial_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec_kernels.w8a16 import kernel

    assert w8a16._try(torch.float16, torch.float32, DEVICE) < 1e-3
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda x, *rest: launch(x, *rest) * (1.05 if len(x) > 16 else 1))
    assert w8a16._try(torch.float16, torch.float32, DEVICE) > 1e-2


def test_attention_passes_its_trial_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec_kernels.attention import kernel

    assert attention._try(torch.float16, 32, 32, DEVICE) < 1e-3
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda q, k, v, first, last, scale: launch(q, k, v, first * 0, last, scale))
    assert attention._try(torch.float16, 32, 32, DEVICE) > 1e-2


def test_rejection_passes_its_trial_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec_kernels.rejection import kernel

    assert rejection._try(DEVICE) == 0
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda p, ids, q, lengths, u: launch(p, ids.flip(1), q, lengths, u))
    assert rejection._try(DEVICE) > 0


def test_trials_do_not_change_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4, device=DEVICE)
    torch.manual_seed(3)
    w4a16._try("symmetric", 128, torch.float16, torch.float16, DEVICE)
    w8a16._try(torch.float16, torch.float32, DEVICE)
    attention._try(torch.float16, 32, 32, DEVICE)
    rejection._try(DEVICE)
    assert torch.rand(4, device=DEVICE).equal(expected)

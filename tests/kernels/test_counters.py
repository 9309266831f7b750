"""Counters are shared by device and stream; a launch in a CUDA graph has its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from specdec_kernels import counters as module
from specdec_kernels.counters import counters


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A simulated CUDA device with the CPU's memory."""
    state = SimpleNamespace(capturing=False, stream=1, filled=0)
    zeros = torch.zeros

    def counted(*size: int, device: object = None, **kwargs: object) -> torch.Tensor:
        state.filled += 1
        return zeros(*size, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "zeros", counted)
    monkeypatch.setattr(module, "_OF_STREAM", {})
    monkeypatch.setattr(module, "_FREE", {})
    return state


DEVICE = torch.device("cuda", 0)


def test_launches_of_a_stream_share_and_streams_do_not(cuda: SimpleNamespace) -> None:
    first = counters(10, DEVICE)
    assert counters(10, DEVICE) is first
    assert len(counters(5000, DEVICE)) >= 5000
    shared = counters(10, DEVICE)
    cuda.stream = 2
    assert counters(10, DEVICE).data_ptr() not in (first.data_ptr(), shared.data_ptr())
    assert not counters(10, DEVICE).any()


def test_a_captured_launch_has_counters_of_its_own_without_a_fill(cuda: SimpleNamespace) -> None:
    shared = counters(10, DEVICE)
    cuda.capturing, cuda.filled = True, 0
    odd, one, other = counters(301, DEVICE), counters(300, DEVICE), counters(300, DEVICE)
    assert len(odd) >= 301
    assert odd.data_ptr() % 16 == one.data_ptr() % 16 == other.data_ptr() % 16 == 0
    assert cuda.filled == 0
    addresses = [set(range(part.data_ptr(), part.data_ptr() + part.nbytes)) for part in (shared, one, other)]
    assert not addresses[0] & addresses[1]
    assert not addresses[1] & addresses[2]
    assert len(one) == len(other) == 300
    # More than the rest of the pool: filled in the graph
    assert len(counters(module.POOL_SIZE, DEVICE)) == module.POOL_SIZE
    assert cuda.filled == 1


def test_a_capture_before_any_launch_fills_its_counters(cuda: SimpleNamespace) -> None:
    cuda.capturing = True
    assert len(counters(7, DEVICE)) >= 7
    assert cuda.filled == 1


def test_other_devices_get_new_counters() -> None:
    one = counters(3, torch.device("cpu"))
    assert one.tolist() == [0, 0, 0]
    assert counters(3, torch.device("cpu")) is not one

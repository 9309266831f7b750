"""Int4Linear and FusedLinearGroup on a CUDA device, simulated on the CPU with the float32 reference as the kernel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from specdec_kernels import w4a16

from specdec.quant import cuda, fused_linear, linear
from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.quant.cuda import CudaKernel
from specdec.quant.fused_linear import link_fused_layers
from specdec.quant.linear import Int4Linear
from tests.quant.test_int4 import random_tensor


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Treat the CPU as a CUDA device: -> the shapes of the inputs that were multiplied."""
    seen: list[torch.Size] = []
    multiply = w4a16.matmul

    def counted(x: Tensor, *args: object) -> Tensor:
        seen.append(x.shape)
        return multiply(x, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "KERNELS", [CudaKernel])
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    monkeypatch.setattr(w4a16, "matmul", counted)
    return seen


def layer(rows: int = 100, columns: int = 256, group_size: int = 64, bias: bool = True, **options: bool) -> Int4Linear:
    weight = random_tensor(rows, columns, group_size, scale_dtype=torch.bfloat16, **options)
    return Int4Linear(weight, nn.Parameter(torch.randn(rows)) if bias else None).eval()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_layer_multiplies_by_its_weights(dtype: torch.dtype, symmetric: bool, permuted: bool, calls: list) -> None:
    one = layer(symmetric=symmetric, permuted=permuted)
    canonical = {name: value.clone() for name, value in one.state_dict().items()}
    weight = one.dequantize(torch.float32)
    for width in (1, 6, MAX_WINDOW, MAX_WINDOW + 1):
        x = torch.randn(2, width, 256).to(dtype)
        expected = x.float() @ weight.T + one.bias
        got = one(x)
        assert got.dtype == dtype
        assert (got.float() - expected).norm() / expected.norm() < 1e-2
    assert isinstance(one.kernel, CudaKernel)
    assert [shape[1] for shape in calls] == [1, 6, MAX_WINDOW, 1]  # the last position of a prefill
    assert one.weight.dtype == torch.int32
    for other in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        for name, value in other.state_dict().items():
            assert value.equal(canonical[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_keep_a_dtype_that_the_kernel_supports(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(w4a16, "matmul", lambda x, *args: seen.append(x.dtype) or x.new_zeros(*x.shape[:-1], 100))
    one = layer()
    assert one(torch.randn(1, 2, 256, dtype=dtype)).dtype == dtype
    assert one(torch.randn(1, 2, 256)).dtype == torch.float32
    assert seen == [dtype, torch.bfloat16]


@pytest.mark.parametrize("group_size", [96, 16])
def test_a_weight_without_a_kernel_stays_canonical(group_size: int) -> None:
    one = layer(columns=192, group_size=group_size)
    x = torch.randn(1, 3, 192)
    assert (one(x) - x @ one.dequantize(torch.float32).T - one.bias).abs().max() < 1e-4
    assert one.kernel is None
    assert one.weight.dtype == torch.uint8


def test_groups_of_256_have_the_kernel() -> None:
    one = layer(columns=512, group_size=256, symmetric=False)
    x = torch.randn(1, 3, 512).bfloat16()
    expected = x.float() @ one.dequantize(torch.float32).T + one.bias
    assert (one(x).float() - expected).norm() / expected.norm() < 1e-2
    assert isinstance(one.kernel, CudaKernel)


def test_inputs_that_the_kernel_does_not_support_use_weight_tiles(calls: list) -> None:
    # Zero points of another dtype are not shipped
    weight = random_tensor(100, 256, 32, symmetric=False, scale_dtype=torch.float16)
    one = Int4Linear(weight).eval()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(1, 3, 256).to(dtype)
        expected = x.float() @ one.dequantize(torch.float32).T
        assert (one(x).float() - expected).norm() / expected.norm() < 1e-2
    assert len(calls) == 1
    assert isinstance(one.kernel, CudaKernel)


class Attention(nn.Module):
    """Three layers with the same input."""

    def __init__(self, q_proj: Int4Linear, k_proj: Int4Linear, v_proj: Int4Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def attention(**options: bool) -> Attention:
    torch.manual_seed(0)
    heads = [layer(rows, bias=rows != 40, **options) for rows in (100, 40, 270)]
    linked = Attention(*heads)
    link_fused_layers(linked)
    return linked


@pytest.mark.parametrize("symmetric", [False, True])
def test_fused_layers_share_a_launch_and_give_the_result_of_each_alone(symmetric: bool, calls: list) -> None:
    linked, separate = attention(symmetric=symmetric), attention(symmetric=symmetric)
    canonical = linked.state_dict()
    for one in (separate.q_proj, separate.k_proj, separate.v_proj):
        one.group = None
    for width in (1, 6, 1):
        x = torch.randn(2, width, 256, dtype=torch.bfloat16)
        calls.clear()
        got = linked(x)
        assert len(calls) == 1
        for fused, alone in zip(got, separate(x), strict=True):
            torch.testing.assert_close(fused, alone)
    x = torch.randn(1, MAX_WINDOW + 6, 256, dtype=torch.bfloat16)
    calls.clear()
    for fused, alone in zip(linked(x), separate(x), strict=True):
        torch.testing.assert_close(fused, alone)
    assert [shape[1] for shape in calls] == [1] * 6
    base = {
        part.untyped_storage().data_ptr() for part in (linked.q_proj.weight, linked.k_proj.weight, linked.v_proj.weight)
    }
    assert len(base) == 1
    for name, value in linked.state_dict().items():
        assert value.equal(canonical[name]), name


def test_a_changed_bias_applies_from_the_next_call_on() -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    before = linked(x)[2].float()
    with torch.no_grad():
        linked.v_proj.bias += 8
    assert ((linked(x)[2].float() - before - 8).abs() < 0.1).all()


def test_fused_layers_may_be_called_alone_twice_and_in_any_order(calls: list) -> None:
    linked = attention()
    weights = [one.dequantize(torch.float32) for one in (linked.q_proj, linked.k_proj, linked.v_proj)]
    first, second = torch.randn(2, 1, 2, 256, dtype=torch.bfloat16)
    for one, x in [(0, first), (0, first), (2, first), (1, second), (2, second), (0, second), (1, first), (1, second)]:
        part = (linked.q_proj, linked.k_proj, linked.v_proj)[one]
        expected = x.float() @ weights[one].T + (0 if part.bias is None else part.bias)
        assert (part(x).float() - expected).norm() / expected.norm() < 1e-2


def test_an_input_that_is_written_to_between_calls_is_another_input(calls: list) -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    linked.q_proj(x)
    x.mul_(2)
    expected = x.float() @ linked.k_proj.dequantize(torch.float32).T
    assert (linked.k_proj(x).float() - expected).norm() / expected.norm() < 1e-2
    assert len(calls) == 2


def test_inputs_with_gradients_use_weight_tiles(calls: list) -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, requires_grad=True)
    linked.q_proj(x).sum().backward()
    torch.testing.assert_close(x.grad, linked.q_proj.dequantize(torch.float32).sum(0).expand_as(x))
    assert not calls


def test_layers_that_never_share_an_input_are_separated_and_keep_their_bits(calls: list) -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    together = linked(x)
    for _ in range(fused_linear.MAX_MISSES + 3):
        separate = linked.q_proj(x.clone()), linked.k_proj(x.clone()), linked.v_proj(x.clone())
    assert linked.q_proj.group.kernel is None
    for alone, before in zip(separate, together, strict=True):
        torch.testing.assert_close(alone, before)


def test_layers_with_different_quantization_are_not_fused(calls: list) -> None:
    odd = Attention(layer(), layer(symmetric=False), layer())
    link_fused_layers(odd)
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    odd(x)
    assert len(calls) == 3
    assert odd.q_proj.group.kernel is None
    permuted = Attention(layer(permuted=True), layer(permuted=True), layer(permuted=True))
    link_fused_layers(permuted)
    permuted(x)
    assert permuted.q_proj.group.kernel is None


def test_moving_and_loading_separate_the_layers_and_the_next_call_fuses_them_again(calls: list) -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    before, state = linked(x), {name: value.clone() for name, value in linked.state_dict().items()}
    linked.to("cpu")
    assert linked.q_proj.weight.dtype == torch.uint8
    assert linked.q_proj.group.kernel is None
    calls.clear()
    for output, reference in zip(linked(x), before, strict=True):
        assert output.equal(reference)
    assert len(calls) == 1
    linked.load_state_dict(state)
    for output, reference in zip(linked(x), before, strict=True):
        assert output.equal(reference)
    copied = copy.deepcopy(linked)
    assert copied.q_proj.group is None
    for output, reference in zip(copied(x), before, strict=True):
        torch.testing.assert_close(output, reference)


def test_loading_one_fused_layer_does_not_change_the_others() -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    linked(x)
    state = linked.q_proj.state_dict()
    linked.q_proj.load_state_dict(state | {"weight": state["weight"] ^ 1})
    q, k, v = linked(x)
    for part, got in ((linked.q_proj, q), (linked.k_proj, k), (linked.v_proj, v)):
        expected = x.float() @ part.dequantize(torch.float32).T + (0 if part.bias is None else part.bias)
        assert (got.float() - expected).norm() / expected.norm() < 1e-2


def test_a_compiled_graph_calls_the_operator() -> None:
    linked = attention()
    x = torch.randn(1, 2, 256, dtype=torch.bfloat16)
    expected = linked(x)
    compiled = torch.compile(linked, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for output, reference in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(output, reference)

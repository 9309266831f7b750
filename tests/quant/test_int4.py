"""The canonical 4-bit form, rounding to it, and the linear layer on it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from specdec.quant import cpu
from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.quant.int4 import Int4Tensor, pack, unpack
from specdec.quant.linear import Int4Linear
from specdec.quant.rounding import round_to_nearest

needs_op = pytest.mark.skipif(cpu.row_order() is None, reason="this build of torch has no int4 op for its CPU")


def random_tensor(
    rows: int,
    columns: int,
    group_size: int,
    *,
    symmetric: bool = True,
    permuted: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Int4Tensor:
    groups = columns // group_size
    return Int4Tensor(
        pack(torch.randint(16, (rows, columns))),
        (0.01 + 0.02 * torch.rand(rows, groups)).to(scale_dtype),
        None if symmetric else torch.randint(16, (rows, groups), dtype=torch.uint8),
        torch.randperm(columns, dtype=torch.int32) if permuted else None,
    )


def reference_weight(int4: Int4Tensor) -> Tensor:
    """W[n, perm[k]] = (code - zero) * scale, one element at a time."""
    rows, half = int4.weight.shape
    weight = torch.empty(rows, 2 * half, dtype=torch.float32)
    for n in range(rows):
        for k in range(2 * half):
            code = int(int4.weight[n, k // 2]) >> 4 * (k % 2) & 15
            group = k // int4.group_size
            value = (
                int4.codebook[code].float()
                if int4.codebook is not None
                else torch.tensor(float(code - (8 if int4.zero is None else int(int4.zero[n, group]))))
            )
            weight[n, k if int4.perm is None else int(int4.perm[k])] = value * int4.scale[n, group].float()
    return weight


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_pack_and_unpack_are_inverse(rows: int, pairs: int, random: object) -> None:
    codes = torch.tensor([[random.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, pairs)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert unpack(packed).equal(codes)
    assert pack(unpack(packed)).equal(packed)


def test_an_odd_number_of_columns_does_not_pack() -> None:
    with pytest.raises(ValueError, match="must be even, got 5"):
        pack(torch.zeros(2, 5))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_is_the_formula(scale_dtype: torch.dtype, symmetric: bool, permuted: bool) -> None:
    torch.manual_seed(0)
    int4 = random_tensor(6, 16, 4, symmetric=symmetric, permuted=permuted, scale_dtype=scale_dtype)
    expected = reference_weight(int4)
    assert int4.dequantize(torch.float32).equal(expected)
    assert int4.dequantize().equal(expected.to(scale_dtype))
    assert int4.dequantize().dtype == scale_dtype


def test_dequantize_with_a_codebook_and_8_bit_scales() -> None:
    scale = torch.randint(120, 134, (3, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    codebook = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    int4 = Int4Tensor(pack(torch.randint(16, (3, 64))), scale, codebook=codebook)
    assert int4.group_size == 32
    assert int4.dequantize().dtype == torch.bfloat16
    assert int4.dequantize(torch.float32).equal(reference_weight(int4))


# Each group size, -1 as the width of the row, and shapes whose rows fill no block of the op.
SHAPES = [(64, 128, 32), (64, 128, 64), (48, 256, 128), (100, 128, 128), (70, 256, 256), (16, 96, 96), (3, 64, 32)]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_multiplies_by_its_weights(
    dtype: torch.dtype, shape: tuple[int, int, int], symmetric: bool, permuted: bool
) -> None:
    torch.manual_seed(0)
    int4 = random_tensor(*shape, symmetric=symmetric, permuted=permuted)
    bias = torch.randn(shape[0])
    layer = Int4Linear(int4, nn.Parameter(bias)).eval()
    weight = int4.dequantize(torch.float32)
    for width in (1, 6, MAX_WINDOW, MAX_WINDOW + 1, 200):
        x = torch.randn(2, width, shape[1]).to(dtype)
        expected = x.float() @ weight.T + bias
        got = layer(x)
        assert got.dtype == dtype
        assert (got - expected).norm() / expected.norm() < 1e-2, width
        layer.use_kernel = False
        exact = (layer(x).float() - expected).norm() / expected.norm()
        assert exact < (1e-5 if dtype == torch.float32 else 1e-2)
        layer.use_kernel = True
    assert layer.int4.weight.equal(int4.weight)


def test_groups_of_16_use_weight_tiles_where_the_op_has_none() -> None:
    layer = Int4Linear(random_tensor(100, 48, 16, symmetric=False, permuted=True)).eval()
    for width in (1, MAX_WINDOW + 1):
        x = torch.randn(1, width, 48)
        torch.testing.assert_close(layer(x), x @ layer.dequantize(torch.float32).T)
    assert layer.kernel is None


@needs_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_come_back_from_the_ops_layout_bit_for_bit(shape: tuple[int, int, int]) -> None:
    layer = Int4Linear(random_tensor(*shape, symmetric=False)).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(1, 1, shape[1]))
    assert layer.kernel is not None
    assert layer.weight.shape[0] % 64 == 0
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert all(other.state_dict()[name].equal(before[name]) for name in before)
    assert layer.weight.equal(before["weight"])  # .to() restores the canonical layout


@needs_op
@pytest.mark.parametrize("shape", [(256, 256, 64), (512, 256, 128), (256, 512, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    layer = Int4Linear(random_tensor(*shape)).eval()
    x = torch.randn(1, MAX_WINDOW, shape[1]).to(dtype)
    alone = torch.cat([layer(row) for row in x.split(1, dim=1)], dim=1)
    for width in (2, 3, 6, 9, 17, MAX_WINDOW):
        assert layer(x[:, :width]).equal(alone[:, :width]), width
    batch = x.view(4, 16, -1)
    assert layer(batch).equal(alone.view(4, 16, -1))
    wide = torch.cat((torch.randn_like(x), x[:, :1]), dim=1)
    assert layer(wide)[:, -1].equal(alone[:, 0])  # prefill: its last position is computed as in decoding


def test_the_window_not_the_number_of_rows_selects_the_path() -> None:
    """32 rows of a batch, 6 positions each, are decoding."""
    layer = Int4Linear(random_tensor(64, 64, 32)).eval()
    x = torch.randn(32, 6, 64)
    assert layer(x).equal(torch.cat([layer(row) for row in x.split(1)]))


@needs_op
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_per_weight(symmetric: bool) -> None:
    layer = Int4Linear(random_tensor(256, 512, 128, symmetric=symmetric)).eval()
    for _ in range(2):
        in_memory = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        assert in_memory / (256 * 512) <= 0.57
        layer(torch.randn(1, 1, 512))  # chooses the kernel: codes are not stored twice


def test_a_layer_in_training_mode_raises() -> None:
    layer = Int4Linear(random_tensor(64, 64, 32)).train()
    with pytest.raises(ValueError, match=r"no training mode; call model\.eval"):
        layer(torch.randn(1, 1, 64))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float32), lambda m: m.half(), lambda m: m.double()])
def test_a_layer_cannot_be_cast(cast: object) -> None:
    layer = Int4Linear(random_tensor(64, 64, 32)).eval()
    with pytest.raises(ValueError, match="cannot be cast to torch"):
        cast(layer)
    assert layer.weight_scale.dtype == torch.bfloat16


def test_a_state_dict_of_another_group_size_is_refused() -> None:
    layer = Int4Linear(random_tensor(64, 64, 32)).eval()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="was quantized with group_size=64, this model with 32"):
        layer.load_state_dict(Int4Linear(random_tensor(64, 64, 64)).state_dict())
    assert layer.weight.equal(before)
    other = Int4Linear(random_tensor(64, 64, 32)).eval()
    layer(torch.randn(1, 1, 64))  # now in the op's layout
    layer.load_state_dict(other.state_dict())
    assert layer.int4.weight.equal(other.weight)


# --- rounding ---


def loss(weight: Tensor, int4: Int4Tensor) -> float:
    return (weight.abs() * (weight - int4.dequantize(torch.float32)).square()).sum().item()


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_to_nearest_searches_the_scale(symmetric: bool, group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((32, 256)) * 0.02
    int4 = round_to_nearest(weight, group_size, symmetric)
    assert int4.scale.dtype == torch.bfloat16
    assert int4.group_size == (256 if group_size == -1 else group_size)
    assert (int4.zero is None) == symmetric
    groups = weight.unflatten(1, (-1, int4.group_size))
    if symmetric:  # the scale without a search
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        zero = torch.full_like(scale, 8, dtype=torch.uint8)
    else:
        scale = ((groups.amax(-1) - groups.amin(-1)) / 15).bfloat16()
        zero = (-groups.amin(-1) / scale.float()).round().to(torch.uint8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).flatten(1)
    plain = Int4Tensor(pack(codes), scale, zero)
    assert loss(weight, int4) < 0.97 * loss(weight, plain)


def test_codes_are_the_nearest_ones() -> None:
    weight = 0.02 * torch.randn(16, 64)
    int4 = round_to_nearest(weight, 32, True)
    steps = int4.scale.float().abs().repeat_interleave(32, dim=1)
    error = (weight - int4.dequantize(torch.float32)).abs()
    inside = (int4.codes() > 0) & (int4.codes() < 15)
    assert (error[inside] <= 0.5 * steps[inside] * 1.001).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_4_bit_weights_are_unchanged_by_rounding(symmetric: bool) -> None:
    """Weights on a 4-bit grid of full range are rounded exactly, also zeros and a group of zeros."""
    torch.manual_seed(0)
    codes = torch.randint(16, (8, 64))
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    grid = Int4Tensor(pack(codes), torch.full((8, 2), 0.0078125).bfloat16())
    weight = grid.dequantize(torch.float32)
    weight[3, :32] = 0
    assert round_to_nearest(weight, 32, symmetric).dequantize(torch.float32).equal(weight)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=96"):
        round_to_nearest(torch.randn(4, 96), 64, True)

"""The decoding forward of a model as an exported program, ready for torch's compiler.

Batch size, window width and buffer length are dynamic, so one package serves every K and every batch. The compiler
fuses element-wise operators. The others call the same code as the eager forward: the kernels of specdec_kernels.cpu
and, in a target, PyTorch's own means, layer norms, cosines and the like, so that a 4-bit target's logits keep their
bits.
"""

from __future__ import annotations

from typing import Any

import torch
from specdec_kernels import cpu
from torch import Tensor, nn

from specdec.quant.layers import is_4bit
from specdec.runtime.attention.override import attention_override
from specdec.runtime.cpu_compile.fusion import fuse, fuse_blocks
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.pair import PairMember
from specdec.runtime.runner import ModelRunner

EXAMPLE_BATCH, EXAMPLE_WIDTH = 3, 5  # of the inputs that are traced; both are dynamic in the program


class _Forward(nn.Module):
    """The forward as a function of tensors alone."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.model = runner.model
        self.runner = [runner]  # in a list, so that torch.export does not inspect it

    def forward(self, ids: Tensor, positions: Tensor, columns: Tensor, buffers: list[Tensor]) -> Tensor:
        cache = RaggedCache.over(buffers, positions)
        return self.runner[0].model_forward.call(ids, positions, cache, torch.int32, columns).float()


@torch.no_grad()
def trace(member: PairMember) -> tuple[Any, list[list[int]]]:
    """Export the forward of a member, with operators in place that the compiler does not rewrite.

    Returns the program, and of each buffer of the KV cache [B, H, S, D] the pair [H, D].
    """
    runner = member.runner
    batch, width = EXAMPLE_BATCH, EXAMPLE_WIDTH
    runner.begin(batch)
    ids = torch.ones(batch, 2 * width, dtype=torch.int64)
    runner.prefill(ids, torch.full((batch,), width - 1))  # allocates the buffers
    positions = torch.arange(width, 2 * width).repeat(batch, 1)
    buffers = [buffer.clone() for buffer in runner.cache.buffers()]
    dynamic = torch.export.Dim.DYNAMIC
    dynamic_shapes = (
        {0: dynamic, 1: dynamic},
        {0: dynamic, 1: dynamic},
        {0: dynamic},
        [{0: dynamic, 2: dynamic}] * len(buffers),
    )
    with attention_override(runner.config):
        program = torch.export.export(
            _Forward(runner),
            (ids[:, width:].contiguous(), positions, torch.arange(width), buffers),
            dynamic_shapes=dynamic_shapes,
            strict=False,
        )
    fuse(program.graph)
    is_bit_exact = must_be_bit_exact(member)
    for node in program.graph.nodes:
        _replace_operator(node, member.exact, is_bit_exact)
    _merge_int4_linears(program.graph)
    fuse_blocks(program.graph)
    program.graph_module.recompile()
    return program, [[buffer.shape[1], buffer.shape[3]] for buffer in buffers]


def must_be_bit_exact(member: PairMember) -> bool:
    """Whether the compiled logits must equal the eager ones bit for bit: those of a 4-bit target."""
    return member.exact and is_4bit(member.runner.model)


def _replace_operator(node: Any, is_exact: bool, is_bit_exact: bool) -> None:
    """Replace a node's operator by the specdec one that computes the same, faster or to the same bits.

    The linear layers of a 4-bit model call specdec::linear eagerly too. A layer that calls PyTorch's, such as a router,
    keeps PyTorch's.
    """
    aten, specdec_ops = torch.ops.aten, torch.ops.specdec
    if node.op != "call_function":
        return
    if node.target == aten.linear.default:
        x, weight = node.args[0].meta["val"], node.args[1].meta["val"]
        if x.dtype == weight.dtype and x.dtype in cpu.DTYPES:
            node.target = specdec_ops.torch_linear.default if is_bit_exact else specdec_ops.linear.default
            node.args = (*node.args, None)[:3]
    elif not is_exact:
        return
    elif node.target == aten.mean.dim and node.args[1:] == ([-1], True) and not node.kwargs:
        node.target, node.args = specdec_ops.mean.default, node.args[:1]
    elif node.target == aten.gelu.default:
        node.args, node.kwargs = (node.args[0], node.kwargs.get("approximate", "none")), {}
        node.target = specdec_ops.gelu.default
    elif node.target == aten.layer_norm.default and len(node.args[1]) == 1:
        x, _, weight, bias, eps = (*node.args, *(None, None, None, None, 1e-5)[len(node.args) :])[:5]
        node.target, node.args, node.kwargs = specdec_ops.layer_norm.default, (x, weight, bias, eps), {}
    elif node.target in (aten.cos.default, aten.sin.default, aten.tanh.default, aten.softmax.int, aten.sum.dim_IntList):
        node.target = getattr(specdec_ops, node.target.overloadpacket.__name__).default


def _merge_int4_linears(graph: Any) -> None:
    """Merge the calls of 4-bit layers that take the same input (q, k, v; gate, up): the sums stay the same."""
    calls_by_input: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target == torch.ops.specdec.int4_linear.default:
            x, _, [scale_node], _, int8_inputs = node.args
            scale = scale_node.meta["val"]
            calls_by_input.setdefault((x, int8_inputs, scale.shape[2], scale.dtype), []).append(node)
    for (x, int8_inputs, *_), nodes in calls_by_input.items():
        if len(nodes) == 1:
            continue
        lists = ([item for node in nodes for item in node.args[index]] for index in (1, 2, 3))
        with graph.inserting_before(nodes[0]):
            merged = graph.call_function(nodes[0].target, (x, *lists, int8_inputs))
        merged.meta["val"] = [value for node in nodes for value in node.meta["val"]]
        for index, node in enumerate(nodes):
            [getitem] = node.users  # takes the only result of the node's list
            getitem.args = (merged, index)
            graph.erase_node(node)

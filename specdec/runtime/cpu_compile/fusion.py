"""Parts of an exported forward that one operator of specdec_kernels.cpu computes, to the same bits.

    specdec::rms_norm, add_rms_norm     RMSNorm as Llama writes it, also of a residual sum
    specdec::rotary_attention           rotary embedding of halves, then the write to the KV cache, then attention
    specdec::attention_block, mlp_block the halves of a decoder layer, made of these and of its linear layers

A model that writes them in another way keeps its own operators, which torch's compiler fuses as far as it can.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from specdec_kernels import cpu
from torch.fx import Node

# A pattern is a tuple (operator, *arguments) for a call, a list of patterns, a name for any value, which is the same
# wherever the name stands, ANY, or a value.
ANY = "any"
aten = torch.ops.aten
specdec_ops = torch.ops.specdec


def _norm(dtype: torch.dtype) -> Any:
    """weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype), with x32 = x.to(float32)."""
    x: Any = "x" if dtype == torch.float32 else (aten.to.dtype, "x", torch.float32)
    mean = (aten.mean.dim, (aten.pow.Tensor_Scalar, x, 2), [-1], True)
    normed = (aten.mul.Tensor, x, (aten.rsqrt.default, (aten.add.Tensor, mean, "eps")))
    return (aten.mul.Tensor, "weight", normed if dtype == torch.float32 else (aten.to.dtype, normed, dtype))


def _rotated(name: str) -> Any:
    """x * cos + rotate_half(x) * sin of x [B, H, W, D]."""
    low, high = (aten.slice.Tensor, name, 3, 0, "half"), (aten.slice.Tensor, name, 3, "half", sys.maxsize)
    halves = [(aten.neg.default, high), low]
    products = [
        (aten.mul.Tensor, name, (aten.unsqueeze.default, "cos", 1)),
        (aten.mul.Tensor, (aten.cat.default, halves, -1), (aten.unsqueeze.default, "sin", 1)),
    ]
    return (aten.add.Tensor, *products)


def _written(buffer: str, states: Any) -> Any:
    """A buffer of the KV cache after writing states [B, H, W, D] at the window's positions."""
    put = (aten.index_put_.default, buffer, ["rows", None, "positions"], (aten.transpose.int, states, 1, 2))
    return (aten.slice.Tensor, put, 2, ANY, "slots")


def _bound(index: int) -> Any:
    """The first (0) or the last (1) slot that each query sees."""
    return (operator.getitem, (aten.unbind.int, (aten.select.int, "intervals", 3, 0), 1), index)


SUM = (aten.add.Tensor, "x", "y")
ATTENTION = (
    specdec_ops.attention.default,
    _rotated("query"),
    _written("keys", _rotated("key")),
    _written("values", "value"),
    _bound(0),
    _bound(1),
    "scale",
)


def fuse(graph: Any) -> None:
    """Replace calls, in place. The graph is as exported: no operator has been replaced yet."""
    _remove_no_ops(graph)
    for node in graph.nodes:
        if node.target == aten.mul.Tensor:
            _fuse_norm(node)
        elif node.target == specdec_ops.attention.default:
            _fuse_attention(node)
        elif node.target == aten.cos.default:
            _fuse_cos_sin(node)
    graph.eliminate_dead_code()


def fuse_blocks(graph: Any) -> None:
    """Replace the halves of decoder layers, in place. The linear layers are specdec's operators, merged by input."""
    replaced = []
    for node in graph.nodes:
        if node.target == specdec_ops.add_rms_norm.default:
            if (attention := _fuse_attention_block(node)) is not None:
                replaced.append(attention)
            else:
                _fuse_mlp_block(node)
    graph.eliminate_dead_code()
    for attention in replaced:  # it writes to its arguments, so it is not dead code
        graph.erase_node(attention)
    graph.eliminate_dead_code()


def match(value: Any, pattern: Any, found: dict[str, Any]) -> bool:
    """Whether a node or an argument matches a pattern; the values of its names are added to `found`."""
    if isinstance(pattern, str):
        return pattern == ANY or found.setdefault(pattern, value) == value
    if isinstance(pattern, tuple):
        target, *arguments = pattern
        is_call = isinstance(value, Node) and value.target == target and not value.kwargs
        return is_call and match(value.args, arguments, found)
    if isinstance(pattern, list):
        is_sequence = isinstance(value, (list, tuple)) and len(value) == len(pattern)
        return is_sequence and all(match(one, other, found) for one, other in zip(value, pattern, strict=True))
    return type(value) is type(pattern) and bool(value == pattern)


def _remove_no_ops(graph: Any) -> None:
    """Remove assertions about metadata, and casts to the dtype that a tensor has."""
    for node in graph.nodes:
        if node.target == aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target == aten.to.dtype and node.args[1:] == (node.args[0].meta["val"].dtype,):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _fuse_norm(node: Any) -> None:
    """`node` is the multiplication by the weight."""
    found: dict[str, Any] = {}
    dtype = node.meta["val"].dtype
    if dtype not in cpu.DTYPES or not match(node, _norm(dtype), found):
        return
    x, weight, eps = found["x"], found["weight"], float(found["eps"])
    if not _has_kind(x, x, dtype) or weight.meta["val"].shape != x.meta["val"].shape[-1:]:
        return
    terms: dict[str, Any] = {}
    if match(x, SUM, terms) and all(isinstance(term, Node) and _has_kind(term, x, dtype) for term in terms.values()):
        total, normed = _insert_pair(x, specdec_ops.add_rms_norm.default, (*terms.values(), weight, eps))
        x.replace_all_uses_with(total)
    else:
        with node.graph.inserting_before(node):
            normed = node.graph.call_function(specdec_ops.rms_norm.default, (x, weight, eps))
        normed.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(normed)


def _has_kind(node: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor has another's shape, and a dtype."""
    value = node.meta["val"]
    return bool(value.shape == other.meta["val"].shape and value.dtype == dtype)


def _insert_pair(before: Any, target: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call an operator with two results, each like that of the node `before`: -> the results."""
    graph, value = before.graph, before.meta["val"]
    with graph.inserting_before(before):
        pair = graph.call_function(target, arguments)
        results = [graph.call_function(operator.getitem, (pair, index)) for index in range(2)]
    pair.meta["val"] = value, value
    for result in results:
        result.meta["val"] = value
    return results[0], results[1]


def _fuse_cos_sin(node: Any) -> None:
    """`node` is the cosine of the angles of a rotary embedding; a sine of the same is computed with it."""
    [angles] = node.args
    for sine in [user for user in angles.users if user.target == aten.sin.default]:
        results = _insert_pair(node, specdec_ops.cos_sin.default, (angles,))
        for old, new in zip((node, sine), results, strict=True):
            old.replace_all_uses_with(new)


def _fuse_attention(node: Any) -> None:
    found: dict[str, Any] = {}
    if not match(node, ATTENTION, found):
        return
    query, cos, positions = (found[name].meta["val"] for name in ("query", "cos", "positions"))
    is_half = isinstance(found["half"], int) and 2 * found["half"] == query.shape[-1]
    is_rotation = cos.shape == (*positions.shape, query.shape[-1]) and cos.dtype == query.dtype
    if not (is_half and is_rotation and query.dtype in cpu.DTYPES):
        return
    writes = [buffer_slice.args[0] for buffer_slice in node.args[1:3]]
    if any(len(written.users) > 1 for written in writes):
        return
    graph, shape = node.graph, node.meta["val"].shape
    with graph.inserting_before(node):
        states = [_flat(found[name]) for name in ("query", "key", "value")]
        others = [found[name] for name in ("cos", "sin", "positions", "intervals", "keys", "values", "scale")]
        fused = graph.call_function(specdec_ops.rotary_attention.default, (*states, *others))
        fused.meta["val"] = node.meta["val"].flatten(2)
        result = graph.call_function(aten.unflatten.int, (fused, 2, [int(size) for size in shape[2:]]))
        result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    for unused in (node, *node.args[1:3], *writes):
        graph.erase_node(unused)


def _flat(states: Any) -> Any:
    """States [B, H, W, D] as [B, W, H * D]: what they are a view of, or a copy."""
    value = states.meta["val"].transpose(1, 2).flatten(2)
    found: dict[str, Any] = {}
    is_view = match(states, (aten.transpose.int, (aten.view.default, "flat", ANY), 1, 2), found)
    if is_view and found["flat"].meta["val"].shape == value.shape:
        return found["flat"]
    rows = states.graph.call_function(aten.transpose.int, (states, 1, 2))
    rows.meta["val"] = states.meta["val"].transpose(1, 2)
    flat = states.graph.call_function(aten.flatten.using_ints, (rows, 2))
    flat.meta["val"] = value
    return flat


@dataclass(frozen=True)
class _Linears:
    """Linear layers of the same input: all with packed weights and scales, or all dense and without scales."""

    x: Any
    weights: list[Any]
    scales: list[Any]
    columns: list[int]
    int8_inputs: bool

    def before(self, output: _Linears) -> tuple[list[Any], list[Any], list[int], bool] | None:
        """The arguments of a block that begins with these layers and ends with `output`, None of another kind."""
        if bool(self.scales) != bool(output.scales) or self.int8_inputs != output.int8_inputs:
            return None
        lists = self.weights + output.weights, self.scales + output.scales, self.columns + output.columns
        return *lists, self.int8_inputs


def _linears(results: list[Any]) -> _Linears | None:
    """The layers that give these results, each of which is used once."""
    if not all(isinstance(result, Node) and len(result.users) == 1 for result in results):
        return None
    first = results[0]
    if all(result.target == operator.getitem and result.args[0] == first.args[0] for result in results):
        call, indices = first.args[0], [result.args[1] for result in results]
        if call.target != specdec_ops.int4_linear.default:
            return None
        x, *lists, int8_inputs = call.args
        weights, scales, columns = ([values[index] for index in indices] for values in lists)
        return _Linears(x, weights, scales, columns, int8_inputs)
    is_dense = all(result.target == specdec_ops.linear.default and result.args[2] is None for result in results)
    if not is_dense or any(result.args[0] != first.args[0] for result in results):
        return None
    weights = [result.args[1] for result in results]
    return _Linears(first.args[0], weights, [], [weight.meta["val"].shape[0] for weight in weights], False)


def _fuse_attention_block(node: Any) -> Any:
    """`node` is the norm of the sum after attention. Returns the attention's node where it was fused, else None."""
    residual, out, norm, eps = node.args
    output = _linears([out])
    found: dict[str, Any] = {}
    if output is None or not match(output.x, (aten.reshape.default, (aten.unflatten.int, "mixed", 2, ANY), ANY), found):
        return None
    attention = found["mixed"]
    if not isinstance(attention, Node) or attention.target != specdec_ops.rotary_attention.default:
        return None
    inputs = _linears(list(attention.args[:3]))
    layers = None if inputs is None else inputs.before(output)
    if inputs is None or layers is None or len(attention.users) > 1:
        return None
    node.target = specdec_ops.attention_block.default
    node.args = (inputs.x, residual, *layers, *attention.args[3:], norm, eps)
    return attention


def _fuse_mlp_block(node: Any) -> None:
    """`node` is the norm of the sum after an MLP."""
    residual, out, norm, eps = node.args
    output = _linears([out])
    found: dict[str, Any] = {}
    if output is None or not match(output.x, (aten.mul.Tensor, (aten.silu.default, "gate"), "up"), found):
        return
    inputs = _linears([found["gate"], found["up"]])
    layers = None if inputs is None else inputs.before(output)
    if inputs is not None and layers is not None and len(output.x.users) == 1:
        node.target = specdec_ops.mlp_block.default
        node.args = (inputs.x, residual, *layers, norm, eps)

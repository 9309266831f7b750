"""Decisions that the ranks of a tensor-parallel model make together.

All ranks of a model that is split over processes (`tp_plan`) call it with the same inputs, and each forward is a
collective: every rank has to run the same forwards with the same widths. So the first rank makes each decision that
depends on measured time (K of a step, how a profile continues, whether a time limit has passed) and broadcasts it. A
model that one process holds as a whole has no such group, and nothing is sent for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from specdec.core.stats import Choice
from specdec.runtime.cuda_graphs import Graphs


class Ranks:
    """The processes that run one model, or a target with its draft model.

    group: sends tensors in host memory, so that no device is synchronized; None: this process runs the models alone.
    """

    def __init__(self, *models: nn.Module) -> None:
        group = next((group for group in map(tensor_parallel_group, models) if group is not None), None)
        self.group = None if group is None else _host_group(group)
        self.is_first = self.group is None or dist.get_rank(self.group) == 0

    def broadcast(self, value: int) -> int:
        """The first rank's value, on every rank."""
        if self.group is None:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device="cpu")
        dist.broadcast(shared, group=self.group, group_src=0)
        return int(shared)

    def broadcast_bool(self, value: bool) -> bool:
        return bool(self.broadcast(value))

    def broadcast_choice(self, choice: Choice | None) -> Choice | None:
        if self.group is None:
            return choice
        shared = [choice]
        dist.broadcast_object_list(shared, group=self.group, device=torch.device("cpu"), group_src=0)
        return shared[0]

    def common_graphs(self, graphs: Graphs | None) -> Graphs | None:
        """The rank's graphs if every rank has some, else None: calls with recorded steps run one more step than others.

        A rank may have no graphs, for example after it ran out of memory.
        """
        if self.group is None:
            return graphs
        on_all_ranks = torch.tensor(graphs is not None, dtype=torch.int64, device="cpu")
        dist.all_reduce(on_all_ranks, op=dist.ReduceOp.MIN, group=self.group)
        if graphs is not None and not on_all_ranks:
            graphs.is_on = False
        return graphs if on_all_ranks else None

    def synchronized(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, returning the first rank's result on every rank; each rank still calls its own."""
        if self.group is None:
            return function

        def synchronized_function(*args: Any) -> Tensor:
            result = function(*args)
            shared = result.to("cpu", torch.uint8)
            dist.broadcast(shared, group=self.group, group_src=0)
            return shared.to(result)

        return synchronized_function


def tensor_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that the model's weights are split over, None where this process holds all of them.

    transformers stores the mesh as `_device_mesh`: with a dimension "tp" among others, or with a single unnamed one.
    Weights that were split by torch's own parallelize_module are DTensors, whose mesh has a dimension "tp". Data
    parallelism, sharded or not, does not count: there each process has its own inputs.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    model_mesh: Any = getattr(model, "_device_mesh", None)
    group: dist.ProcessGroup | None = None
    if model_mesh is not None and model_mesh.mesh_dim_names is None and model_mesh.ndim == 1:
        group = model_mesh.get_group()
    else:
        meshes = model_mesh, *(getattr(parameter, "device_mesh", None) for parameter in model.parameters())
        tp_mesh = next((mesh for mesh in meshes if mesh is not None and "tp" in (mesh.mesh_dim_names or ())), None)
        group = None if tp_mesh is None else tp_mesh.get_group("tp")
    return group if group is not None and group.size() > 1 else None


_HOST_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by the device's group


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that sends tensors in host memory. Making one is a collective of these ranks."""
    if dist.get_backend(group) == dist.Backend.GLOO:
        return group
    if group not in _HOST_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _HOST_GROUPS[group] = dist.new_group(ranks, backend=dist.Backend.GLOO, use_local_synchronization=True)
    host_group: dist.ProcessGroup = _HOST_GROUPS[group]
    return host_group

"""What the ranks of a tensor-parallel model decide together.

A model that is split over processes (`tp_plan`) is called by all of them with the same inputs, and each of its
forwards is a collective: every rank has to run the same forwards with the same widths. So what a rank would decide by
its own clock (K of a step, how a profile goes on, whether a time limit has passed) is decided by the first rank and
broadcast to the others. A model that a process holds as a whole has no such group, and nothing is sent for it.
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

    group: for tensors in host memory, so that no device is waited for; None: this process runs the models alone.
    """

    def __init__(self, *models: nn.Module) -> None:
        group = next((group for group in map(tensor_parallel_group, models) if group is not None), None)
        self.group = None if group is None else _host_group(group)
        self.is_first = self.group is None or dist.get_rank(self.group) == 0

    def first(self, value: int) -> int:
        """The first rank's value, on every rank."""
        if self.group is None:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device="cpu")
        dist.broadcast(shared, group=self.group, group_src=0)
        return int(shared)

    def first_bool(self, value: bool) -> bool:
        return bool(self.first(value))

    def first_choice(self, choice: Choice | None) -> Choice | None:
        if self.group is None:
            return choice
        shared = [choice]
        dist.broadcast_object_list(shared, group=self.group, device=torch.device("cpu"), group_src=0)
        return shared[0]

    def common(self, graphs: Graphs | None) -> Graphs | None:
        """What the call records its steps in, on all ranks or on none: recorded calls run one more step than others.

        A rank may have none of its own, for example after it ran out of memory.
        """
        if self.group is None:
            return graphs
        are_there = torch.tensor(graphs is not None, dtype=torch.int64, device="cpu")
        dist.all_reduce(are_there, op=dist.ReduceOp.MIN, group=self.group)
        if graphs is not None and not are_there:
            graphs.is_on = False
        return graphs if are_there else None

    def synchronized(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, with the first rank's result on every rank; each rank still calls its own."""
        if self.group is None:
            return function

        def first(*args: Any) -> Tensor:
            result = function(*args)
            shared = result.to("cpu", torch.uint8)
            dist.broadcast(shared, group=self.group, group_src=0)
            return shared.to(result)

        return first


def tensor_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that the model's weights are split over, None where this process holds all of them.

    transformers keeps the mesh as `_device_mesh`: its dimension "tp" among others, or a single dimension without a
    name. Weights that were split by torch's own parallelize_module are DTensors, of a mesh with a dimension "tp". Data
    parallelism, sharded or not, does not count: there each process has its own inputs.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    of_model: Any = getattr(model, "_device_mesh", None)
    group: dist.ProcessGroup | None = None
    if of_model is not None and of_model.mesh_dim_names is None and of_model.ndim == 1:
        group = of_model.get_group()
    else:
        meshes = of_model, *(getattr(parameter, "device_mesh", None) for parameter in model.parameters())
        named = next((mesh for mesh in meshes if mesh is not None and "tp" in (mesh.mesh_dim_names or ())), None)
        group = None if named is None else named.get_group("tp")
    return group if group is not None and group.size() > 1 else None


_HOST_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by the group of the device


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that sends tensors in host memory. All of them have to ask for it at the same time."""
    if dist.get_backend(group) == dist.Backend.GLOO:
        return group
    if group not in _HOST_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _HOST_GROUPS[group] = dist.new_group(ranks, backend=dist.Backend.GLOO, use_local_synchronization=True)
    host_group: dist.ProcessGroup = _HOST_GROUPS[group]
    return host_group

"""A compiled package as a runner's forward. The package holds no weights: it is given the model's own."""

from __future__ import annotations

import atexit
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.quant.cpu import CpuKernel
from specdec.quant.linear import Int4Linear
from specdec.runtime.cpu_compile.eligibility import why_not_kernel_attention
from specdec.runtime.executors import DraftInputs, PlainInputs
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.pair import PairMember
from specdec.utils.warn import warn

BUFFER_SHAPES = "buffers"  # metadata of a package: [heads, width] of each buffer, keys and values in turn


class CompiledForward:
    """ids, positions [B, W] int64 and a cache -> logits [B, W, V] float32, or [B, 1, V] of the last column.

    identity: of the model that the package was compiled from.
    any_width: whether it also serves windows of more than MAX_WINDOW positions. With all linear layers on the 4-bit CPU
    kernels, those give the same bits compiled and eagerly, and are faster compiled.
    """

    def __init__(self, member: PairMember, package: Path, identity: Identity) -> None:
        model = member.runner.model
        self.name = member.name
        self.identity = identity
        self.reported: set[str] = set()  # reasons for eager calls that a warning has given
        self.model = weakref.ref(model)  # _LOADED keeps the forward as long as the model lives
        self.dtype = model.dtype
        self.package: Any = torch.classes.specdec.Package(str(package))
        self.weight_names: list[str] = self.package.weight_names()
        self.buffer_shapes: list[list[int]] = json.loads(self.package.metadata(BUFFER_SHAPES))
        self.weight_owners = [_owner(model, name.removeprefix("model.")) for name in self.weight_names]
        self.weights: list[Tensor] = []  # the package does not own them, so they are kept alive here
        self.addresses: list[int] = []
        self.placement: object = None  # `Identity.placement` at the last call
        watched = {id(owner) for module in model.modules() for owner in (module._parameters, module._buffers)}
        self.is_watched = all(id(owner) in watched for owner, _ in self.weight_owners)
        self.columns: dict[tuple[int, bool], Tensor] = {}
        layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
        self.any_width = bool(layers) and all(
            isinstance(layer.kernel, CpuKernel) and layer.use_kernel for layer in layers
        )

    def renew(self, unchanged: Identity | None = None) -> bool:
        """Give the package the model's weights as they are now, before a call.

        Returns False, with a warning, where the call has to run eagerly. unchanged: an Identity that the model was just
        found to match.
        """
        model = self.model()
        assert model is not None
        reason = "torch.autocast is on" if torch.is_autocast_enabled("cpu") else why_not_kernel_attention(model)
        if reason is None and unchanged is not self.identity:
            reason = self.identity.change()
        if reason is not None:
            if reason not in self.reported:
                self.reported.add(reason)
                warn(f"the {self.name} runs eagerly: {reason}")
            return False
        placement = self.identity.placement
        if self.is_watched and placement is self.placement:
            return True
        weights = [tensors[name] for tensors, name in self.weight_owners]
        addresses = [weight.data_ptr() for weight in weights]
        if addresses != self.addresses:
            self.package.set_weights(self.weight_names, weights)
            self.weights, self.addresses = weights, addresses
        self.placement = placement
        return True

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        cache.window.cover(positions)
        width = ids.shape[1]
        key = width, last_only
        columns = self.columns.get(key)
        if columns is None:
            columns = torch.arange(width - 1 if last_only else 0, width)
            if width <= MAX_WINDOW:
                self.columns[key] = columns
        # Without the GIL; a second call of a package waits for the first.
        logits: Tensor = self.package.forward(ids, positions, columns, self._buffers(cache, len(ids)))
        return logits

    def draft(self, inputs: DraftInputs, slots: int, cache: RaggedCache) -> tuple[Tensor, Tensor | None]:
        """`ModelDrafter._draft` of calls without logits processors, see `OptimizedForward.draft`."""
        cache.window.reserve(slots)
        ids, probs = self.package.draft(*inputs, self._buffers(cache, len(inputs.text)))
        return ids, probs

    def run_plain_steps(
        self, inputs: PlainInputs, slots: int, cache: RaggedCache
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run and commit greedy steps as one call, see `OptimizedForward.run_plain_steps`."""
        cache.window.reserve(slots)
        steps: list[tuple[Tensor, Tensor, Tensor]] = self.package.plain_steps(
            *inputs, self._buffers(cache, len(inputs.ids))
        )
        return steps

    def _buffers(self, cache: RaggedCache, batch_size: int) -> list[Tensor]:
        if not cache.layers:
            cache.fill(self.buffer_shapes, batch_size, self.dtype)
        return cache.buffers()


def _owner(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds the tensor of this name, and its key there; valid as long as the module tree is unchanged."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return next((owner for owner in (module._parameters, module._buffers) if key in owner), vars(module)), key


# By model and package, so that enabling a model again loads nothing.
_LOADED: weakref.WeakKeyDictionary[PreTrainedModel, dict[Path, CompiledForward]] = weakref.WeakKeyDictionary()


def load_package(member: PairMember, package: Path, identity: Identity) -> CompiledForward:
    """The forward of a package on disk; torch and the disk raise errors of many classes."""
    loaded = _LOADED.setdefault(member.runner.model, {})
    forward = loaded.get(package)
    if forward is None:
        forward = loaded[package] = CompiledForward(member, package.resolve(), identity)
    forward.identity, forward.reported = identity, set()
    return forward


@atexit.register
def _unload_packages() -> None:
    """Release the packages, so that torch removes the temporary folders that they are unpacked in."""
    for forwards in _LOADED.values():
        for forward in forwards.values():
            forward.package = None

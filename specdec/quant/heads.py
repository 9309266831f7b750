"""Output heads in 8 or 4 bits, and embeddings that read the codes of the head that they share weights with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from specdec.quant.batch_invariant import BatchInvariantLinear
from specdec.quant.config import Int4Config
from specdec.quant.int8 import Int8Linear, round_rows
from specdec.quant.linear import Int4Linear
from specdec.quant.rounding import round_to_nearest

QuantizedHead = Int8Linear | Int4Linear


class TiedEmbedding(nn.Module):
    """The embedding of a model whose head is quantized and shares its weights: ids [...] -> [..., K].

    It has no weight of its own. Its rows are those of the head, dequantized to the dtype of `like`.

    like: [0] of the model's dtype. transformers takes the first floating parameter for it, and casts change it.
    """

    def __init__(self, head: QuantizedHead, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self._head = [head]  # in a list: the head's tensors are the head's alone
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=head.weight.device), requires_grad=False)

    @property
    def head(self) -> QuantizedHead:
        """The output head whose rows it reads."""
        return self._head[0]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        return self.head.embed(ids, self.like.dtype)


def head_name(model: Any) -> str | None:
    """The name of a model's output head, None where it has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def is_tied(model: Any) -> bool:
    """Whether the head of a model shares the embedding's weights."""
    return f"{head_name(model)}.weight" in (getattr(model, "all_tied_weights_keys", None) or {})


def why_not_quantized(model: Any, config: Int4Config) -> str | None:
    """Why a model's output head keeps its precision, None where it is stored as the config says."""
    head, embedding, name = model.get_output_embeddings(), model.get_input_embeddings(), head_name(model)
    if config.head is None:
        return "the output head; head='int8' stores it in 8 bits"
    if type(head) not in (nn.Linear, BatchInvariantLinear):
        return f"the output head is a {type(head).__name__}"
    if not should_convert_module(name, config.skip_modules):
        return "named in skip_modules"
    columns = head.weight.shape[1]
    if config.head == "int4" and columns % (config.group_size if config.group_size > 0 else 2):
        return f"group_size={config.group_size} does not divide in_features={columns}; head='int8' takes any"
    if is_tied(model) and type(embedding) is not nn.Embedding:
        return f"the output head shares its weights with a {type(embedding).__name__}"
    return None


def head_to_quantize(model: Any, config: Int4Config) -> str | None:
    """The name of a model's output head where the config quantizes it, else None."""
    name = head_name(model)
    return name if name is not None and why_not_quantized(model, config) is None else None


def quantize_head(model: Any, name: str, config: Int4Config, weight_of: Callable[[str], Tensor]) -> None:
    """Quantize a model's output head, `name`, as the config says, in place.

    weight_of: the head's name -> its weight [V, K] in full precision.
    """
    head, weight = model.get_output_embeddings(), weight_of(name)
    check_finite(name, weight)
    new: QuantizedHead
    if config.head == "int8":
        new = Int8Linear(*round_rows(weight), head.bias)
    else:
        new = Int4Linear(round_to_nearest(weight, config.group_size, config.symmetric), head.bias)
    insert_head(model, new.train(head.training))


def insert_head(model: Any, head: QuantizedHead) -> None:
    """Put a quantized head in the place of a model's own, and where it is tied a TiedEmbedding into the embedding's."""
    name = head_name(model)
    assert name is not None
    if is_tied(model):
        key, embedding = f"{name}.weight", model.get_input_embeddings()
        model.set_input_embeddings(TiedEmbedding(head, embedding.weight.dtype).train(embedding.training))
        # What transformers would tie, while it loads and when tie_weights() is called.
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k != key}
        model._tied_weights_keys = {k: v for k, v in (model._tied_weights_keys or {}).items() if k != key}
    model.set_submodule(name, head)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError where a layer's weight has values that cannot be rounded."""
    if not all(bool(chunk.isfinite().all()) for chunk in torch.split(weight, 64)):
        raise ValueError(f"the weight of {name} has NaN or infinite values; nothing sensible can be rounded from them")

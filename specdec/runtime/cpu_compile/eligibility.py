"""Which models can be compiled for a CPU, and why others cannot."""

from __future__ import annotations

from specdec_kernels import cpu
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.quant.batch_invariant import ATTENTION
from specdec.runtime.identity.hooks import why_not_traceable
from specdec.runtime.runner import ModelRunner
from specdec.runtime.tensor_parallel import tensor_parallel_group

MASKS_BY_SLOT = "it derives a query's position from the number of keys"


def why_not_compiled(runner: ModelRunner) -> str | None:
    """Why a model's forward cannot be compiled, None where it can."""
    model = runner.model
    if tensor_parallel_group(model) is not None:
        return "its weights are split over several processes"
    if model.dtype not in cpu.DTYPES:
        return f"its dtype is {model.dtype}; the CPU kernels take float32 and bfloat16"
    if "position_ids" not in runner.parameters:
        return "its forward takes no position_ids"
    if runner.masks_by_slot:
        return MASKS_BY_SLOT
    return why_not_kernel_attention(model) or why_not_traceable(model)


def why_not_kernel_attention(model: PreTrainedModel) -> str | None:
    """Why the CPU's attention kernel does not compute what the model's own attention does, None where it does."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if not model._supports_attention_backend or implementation not in ("sdpa", ATTENTION):
        return f"its attention ({implementation}) cannot be replaced by the CPU kernel"
    if implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "transformers' sdpa attention was replaced"
    return None

"""Memory plans against the measured peaks of real calls, and against figures computed by hand."""

from __future__ import annotations

import gc
import itertools
import json
import math
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from specdec_kernels import cpu
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)  # fmt: skip

import specdec
from specdec.planning.devices import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    card_bytes,
    smallest_card,
    usable_bytes,
)
from specdec.planning.footprint import measure_footprint
from specdec.planning.formulas import ModelFootprint
from specdec.planning.memory import largest_batch, largest_context, plan_memory
from specdec.planning.peak_memory import LiveStorages, PeakMemory
from specdec.quant.checkpoints import load_checkpoint
from specdec.quant.layers import is_4bit
from specdec.runtime import runner
from specdec.runtime.runner import PREFILL_SCORES, SCORE_BYTES, ModelRunner, prefill_chunk
from specdec.utils import embedded
from specdec_cli import plan as command
from tests.helpers import checkpoint_writers
from tests.helpers.command_line import parse
from tests.helpers.families import FAMILIES, family, make_model

PLAIN = Path(__file__).parents[1] / "data" / "target"
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def config_of(model_type: str) -> Any:
    values = {name: value for name, value in FAMILIES[model_type].items() if name != "attn"}
    return AutoConfig.for_model(model_type, vocab_size=101, bos_token_id=None, eos_token_id=None, **values)


def bytes_of(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.fixture(params=["torch", "kernels"])
def on_both_cpus(request: pytest.FixtureRequest) -> None:
    """A CPU whose own kernels have not been built, and one where they have."""
    if request.param == "kernels":
        request.getfixturevalue("cpu_kernels")


@cache
def loaded(
    path: Path, has_kernels: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, ModelFootprint]:
    """has_kernels: those of the CPU, since a model keeps the layout of their weights."""
    model: Any = load_checkpoint(path, dtype=dtype)
    return model.to(device).eval(), measure_footprint(path, dtype=dtype, device=device)


@cache
def llama(**values: Any) -> ModelFootprint:
    return measure_footprint(LlamaConfig(**LLAMA_8B | values))


def pair() -> tuple[ModelFootprint, ModelFootprint]:
    return llama(), measure_footprint(LlamaConfig(**LLAMA_1B))


def ratio(
    path: Path, batch: int, prompt: int, new: int, num_draft_tokens: int, call: dict[str, Any], **placement: Any
) -> float:
    """Predicted over measured peak of one generate() call."""
    placement["has_kernels"] = cpu.load()
    (target, target_size), (draft, draft_size) = loaded(path, **placement), loaded(embedded.DRAFT, **placement)
    ids = torch.randint(3, 4096, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(target.device)
    specdec.enable(target, draft, compile=False)  # so that files of other tests have no effect
    call = {
        "max_new_tokens": new,
        "num_assistant_tokens": num_draft_tokens,
        "eos_token_id": [],
    } | call  # no processor for length
    gc.collect()
    with PeakMemory(target.device, target, draft) as peak:
        target.generate(ids, attention_mask=torch.ones_like(ids), **call)
    predicted = plan_memory(
        target_size, draft_size, context=prompt + new, batch=batch, num_draft_tokens=num_draft_tokens, prompt=prompt,
        sampled=call["do_sample"], target_int4=is_4bit(target),
    )  # fmt: skip
    return predicted.total_bytes / peak.bytes


GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
# rows, tokens of the prompt, new tokens, K: the peak is in verification or in prefill, the cache grows or does not
CALLS = [(1, 40, 24, 4), (2, 250, 50, 6), (1, 900, 20, 5), (4, 500, 13, 4), (8, 2, 24, 8), (8, 250, 8, 6)]


def rotated_calls() -> Iterator[Any]:
    """Every call, with precision and sampling in turn; the rest of the product runs under `full`."""
    product = itertools.product(enumerate(CALLS), {"int4": embedded.TARGET, "float32": PLAIN}.items(), (False, True))
    for (index, values), (name, path), is_sampled in product:
        is_selected = index % 4 == 2 * (name == "int4") + is_sampled
        id = "-".join([*map(str, values), name, "sampled" if is_sampled else "greedy"])
        marks = () if is_selected else pytest.mark.full
        yield pytest.param(*values, path, SAMPLED if is_sampled else GREEDY, id=id, marks=marks)


@pytest.mark.parametrize(("batch", "prompt", "new", "num_draft_tokens", "path", "call"), rotated_calls())
def test_the_plan_is_the_measured_peak(
    batch: int, prompt: int, new: int, num_draft_tokens: int, path: Path, call: dict[str, Any]
) -> None:
    assert ratio(path, batch, prompt, new, num_draft_tokens, call) == pytest.approx(1, abs=0.03)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    ("path", "dtype", "call"),
    [
        pytest.param(embedded.TARGET, torch.bfloat16, CALLS[2], id="int4-bfloat16"),
        pytest.param(embedded.TARGET, torch.float32, CALLS[4], id="int4-float32"),
        pytest.param(PLAIN, torch.bfloat16, CALLS[4], id="dense-bfloat16"),
        pytest.param(PLAIN, torch.float32, CALLS[2], id="dense-float32", marks=pytest.mark.full),
    ],
)
def test_the_plan_is_the_measured_peak_where_the_cpu_has_kernels(
    path: Path, dtype: torch.dtype, call: tuple[int, int, int, int]
) -> None:
    batch, prompt, new, num_draft_tokens = call
    assert ratio(path, batch, prompt, new, num_draft_tokens, GREEDY, dtype=dtype) == pytest.approx(1, abs=0.04)


@pytest.mark.usefixtures("on_both_cpus")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_decoding_window_is_in_the_peak(dtype: torch.dtype) -> None:
    """Few 4-bit weights, a short prompt: without a kernel that reads the cache, scores are a fifth of the peak."""
    values = {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 256,
    }  # fmt: skip
    model = make_model("llama", **values).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the head
        specdec.quantize(model, specdec.Int4Config(32))
    specdec.enable(model, "none", compile=False)
    ids = torch.randint(3, 101, (8, 4))
    with PeakMemory("cpu", model) as peak:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, eos_token_id=[], **GREEDY)
    size = measure_footprint(LlamaConfig(**values), dtype=dtype, device="cpu", group_size=32)
    predicted = plan_memory(size, context=204, batch=8, num_draft_tokens=1, prompt=4, sampled=False)
    assert predicted.total_bytes == pytest.approx(peak.bytes, rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("call", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("path", [embedded.TARGET, PLAIN], ids=["int4", "bfloat16"])
@pytest.mark.parametrize(("batch", "prompt", "new"), [(8, 512, 64), (32, 900, 32)])
def test_the_plan_is_the_measured_peak_on_a_gpu(
    batch: int, prompt: int, new: int, path: Path, call: dict[str, Any]
) -> None:
    placement = {"device": "cuda", "dtype": torch.bfloat16}
    ratio(path, 1, 2, 2, 1, call, **placement)  # kernels and cuBLAS take their own the first time
    loaded.cache_clear()
    gc.collect()
    before = torch.cuda.memory_allocated()  # cuBLAS' workspace
    try:
        measured = 1 / ratio(path, batch, prompt, new, 5, call, **placement)
        total = bytes_of(loaded(path, **placement)[0])
        assert measured == pytest.approx(1 + before / total, abs=0.05 + before / total)
    finally:
        loaded.cache_clear()


@pytest.mark.parametrize(
    ("call", "dtype"), [(GREEDY, torch.bfloat16), (SAMPLED, torch.float32)], ids=["greedy-bfloat16", "sampled-float32"]
)
def test_logits_are_in_the_peak(call: dict[str, Any], dtype: torch.dtype) -> None:
    """A wide vocabulary on narrow layers: what verification holds is most of it."""
    target, draft = (make_model("llama", seed, **FAMILIES["llama"] | {"vocab_size": 5000}).to(dtype) for seed in (0, 1))
    values = {name: value for name, value in FAMILIES["llama"].items() if name != "attn"}
    size = measure_footprint(LlamaConfig(**values, vocab_size=5000), dtype=dtype, device="cpu", group_size=32)
    specdec.enable(target, draft, num_draft_tokens=8)
    ids = torch.randint(3, 5000, (8, 2))
    with PeakMemory("cpu", target, draft) as peak:
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **call)
    is_sampled = call["do_sample"]
    predicted = plan_memory(
        size, size, context=26, batch=8, num_draft_tokens=8, prompt=2, sampled=is_sampled, target_int4=False
    )
    assert predicted.logits_bytes > 0.5 * peak.bytes
    assert predicted.total_bytes == pytest.approx(peak.bytes, rel=0.05)


@pytest.mark.usefixtures("on_both_cpus")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_of_weights_is_in_the_peak(dtype: torch.dtype) -> None:
    """A wide layer, a short prompt: prefill holds as much in full precision as all the rest; with kernels, nothing."""
    values = {
        "hidden_size": 256,
        "intermediate_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 101,
    }
    model = make_model("llama", **values, max_position_embeddings=128).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the head
        specdec.quantize(model)
    specdec.enable(model, "none", compile=False)
    ids = torch.randint(3, 101, (1, 70))
    with PeakMemory("cpu", model) as peak:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **GREEDY)
    size = measure_footprint(LlamaConfig(**values, max_position_embeddings=128), dtype=dtype, device="cpu")
    predicted = plan_memory(size, context=72, num_draft_tokens=1, prompt=70, sampled=False)
    assert size.tile_weights == (0 if size.has_kernels else 256 * 4096)
    if size.has_kernels:
        assert predicted.total_bytes == pytest.approx(peak.bytes, rel=0.01)
    else:
        # the peak has one activation less while there is a tile
        assert peak.bytes <= predicted.total_bytes < 1.12 * peak.bytes


def test_sampling_without_top_p_takes_no_more_than_planned() -> None:
    assert 1 <= ratio(embedded.TARGET, 4, 60, 24, 4, {"do_sample": True, "temperature": 0.8, "top_k": 0}) < 1.2


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_weights_and_caches_of_all_families_to_the_byte(model_type: str) -> None:
    model = family(model_type)
    expected = measure_footprint(config_of(model_type), dtype=torch.float32, device="cpu", group_size=32)
    assert bytes_of(model) == expected.plain_bytes
    runner = ModelRunner(model)
    runner.begin(3, 40)
    ids = torch.randint(3, 101, (3, 40))
    runner.prefill(ids, torch.tensor([20, 1, 9]))
    runner.forward(ids[:, :4], torch.tensor([[21, 22, 23, 24], [2, 3, 4, 5], [10, 11, 12, 39]]))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in runner.cache.layers)
    assert held == 3 * 40 * expected.token_bytes


@pytest.mark.parametrize(
    "model_type",
    ["mixtral", "gemma3_text", "gpt2", *(pytest.param(one, marks=pytest.mark.full) for one in ("llama", "phi"))],
)
def test_the_plan_is_the_measured_peak_where_weights_are_few(model_type: str) -> None:
    """Grouped and single-head keys, experts, several masks, biases: activations and caches make up nine tenths."""
    target, draft = family(model_type), make_model("llama", 1, **FAMILIES["llama"])
    sizes = [
        measure_footprint(config_of(name), dtype=torch.float32, device="cpu", group_size=32)
        for name in (model_type, "llama")
    ]
    specdec.enable(target, draft)
    try:
        for prompt, new in ((100, 8), (4, 60)):
            ids = torch.randint(3, 101, (8, prompt), generator=torch.Generator().manual_seed(0))
            with PeakMemory("cpu", target, draft) as peak:
                target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, num_assistant_tokens=4, **GREEDY
                )
            context = prompt + new
            predicted = plan_memory(
                *sizes, context=context, batch=8, num_draft_tokens=4, prompt=prompt, sampled=False, target_int4=False
            )
            assert predicted.total_bytes == pytest.approx(peak.bytes, rel=0.05)
    finally:
        specdec.disable(target)


@pytest.mark.usefixtures("on_both_cpus")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_4_bit_weights_are_counted_to_the_byte(group_size: int, symmetric: bool, tmp_path: Path) -> None:
    values = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    model = make_model("llama", **values, max_position_embeddings=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the head
        specdec.quantize(model, specdec.Int4Config(group_size, symmetric))
    model.save_pretrained(tmp_path)
    model(torch.zeros(1, 2, dtype=torch.int64))  # enters the kernel's layout
    assert measure_footprint(tmp_path, dtype=torch.float32, device="cpu").int4_bytes == bytes_of(model)
    if symmetric:  # not quantized yet, the same settings
        original = LlamaConfig(**values, vocab_size=101, max_position_embeddings=128)
        assert measure_footprint(
            original, dtype=torch.float32, device="cpu", group_size=group_size
        ).int4_bytes == bytes_of(model)


@pytest.mark.usefixtures("on_both_cpus")
@pytest.mark.parametrize(
    "case",
    [
        checkpoint_writers.Case("gptq"),
        checkpoint_writers.Case("gptq", symmetric=False, group_size=-1),
        checkpoint_writers.Case("awq", "qwen3", symmetric=False),
        checkpoint_writers.Case("compressed-tensors"),
        checkpoint_writers.Case("compressed-tensors", "qwen3", symmetric=False),
        checkpoint_writers.Case("gptq", "mixtral", symmetric=False),
        checkpoint_writers.Case("auto-round", version="gptq"),
        checkpoint_writers.Case(
            "gptq", layers={"down_proj": {"bits": 8}, "v_proj": {"group_size": 16, "symmetric": False}},
            skip=("up_proj",), settings={"dynamic": {
                ".*down_proj": {"bits": 8}, ".*v_proj": {"group_size": 16, "sym": False}, "-:.*up_proj": {},
            }},
        ),
        checkpoint_writers.Case("mxfp4", "gpt_oss"),
    ],
    ids=lambda case: f"{case.method}-{case.model_type}",
)  # fmt: skip
def test_other_formats_are_counted_by_their_group_size(case: checkpoint_writers.Case, tmp_path: Path) -> None:
    checkpoint_writers.write(tmp_path / "model", case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = specdec.load_quantized(tmp_path / "model", dtype=torch.float32)
    model.eval()(torch.zeros(1, 2, dtype=torch.int64))
    size = measure_footprint(tmp_path / "model", dtype=torch.float32, device="cpu")
    assert size.checkpoint_method == case.method
    assert size.int4_bytes == bytes_of(model)


def test_a_llama_of_8_billion_weights() -> None:
    size = llama()
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    parameters = 2 * 128256 * 4096 + 32 * layer + 4096
    assert parameters == pytest.approx(8.03e9, rel=1e-3)
    assert size.plain_bytes == pytest.approx(2 * parameters, rel=1e-6)  # and the rotary frequencies
    linear = 32 * (layer - 2 * 4096)
    # codes; of 128 columns a scale of two bytes, in the canonical form and in the kernel's
    head = 128256 * 4096
    others = 2 * (parameters - linear - head) + head + 2 * 128256  # an 8-bit head with a scale of two bytes a row
    assert size.int4_bytes == pytest.approx(others + linear / 2 + linear / 128 * 4, rel=1e-6)
    assert size.token_bytes == 131072
    assert (size.heads, size.kv_heads, size.key_width, size.value_width) == (32, 8, 128, 128)
    # live at the product of gate and up: the residual, its norm, act(gate), up and the product
    assert size.position_bytes == pytest.approx(2 * (2 * 4096 + 3 * 14336), rel=0.2)


def test_heads_and_widths_as_configs_have_them() -> None:
    qwen = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "vocab_size": 151936,
    }
    tied = measure_footprint(Qwen2Config(**qwen, num_key_value_heads=2, tie_word_embeddings=True))
    untied = measure_footprint(Qwen2Config(**qwen, num_key_value_heads=2, tie_word_embeddings=False))
    assert untied.plain_bytes - tied.plain_bytes == 2 * 151936 * 896
    assert tied.plain_bytes == pytest.approx(2 * 0.494e9, rel=1e-3)
    assert tied.token_bytes == 24 * 2 * 2 * 64 * 2

    gemma = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
    wide = measure_footprint(Gemma2Config(**gemma, num_key_value_heads=8, head_dim=256))  # 3584 / 16 = 224
    assert wide.token_bytes == 42 * 2 * 8 * 256 * 2
    assert wide.num_masks == 2

    deepseek = measure_footprint(DeepseekV3Config())
    assert deepseek.plain_bytes == pytest.approx(2 * 671e9, rel=1e-3)
    assert deepseek.token_bytes == 61 * (512 + 64) * 2  # the latent and the rotary part of the keys
    assert (deepseek.heads, deepseek.key_width, deepseek.value_width) == (128, 192, 128)
    assert deepseek.attention_slot_bytes >= 128 * (192 + 128) * 2  # expanded for all heads when attention is called


def test_models_by_hand() -> None:
    """Parameters, cache and experts of published models, against sums over their configs."""
    qwen = measure_footprint(
        Qwen3Config(
            hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
        )
    )  # fmt: skip
    layer = 5120 * 128 * (2 * 64 + 2 * 8) + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
    assert qwen.plain_bytes == pytest.approx(2 * (2 * 151936 * 5120 + 64 * layer + 5120), rel=1e-6)
    assert (qwen.token_bytes, qwen.expert_bytes) == (64 * 2 * 8 * 128 * 2, 0)

    gemma = measure_footprint(
        Gemma3TextConfig(
            hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
            num_key_value_heads=16, head_dim=128, vocab_size=262208, tie_word_embeddings=True,
        )
    )  # fmt: skip
    layer = 5376 * 128 * (2 * 32 + 2 * 16) + 3 * 5376 * 21504 + 4 * 5376 + 2 * 128
    assert gemma.plain_bytes == pytest.approx(2 * (262208 * 5376 + 62 * layer + 5376), rel=1e-6)
    assert gemma.token_bytes == 62 * 2 * 16 * 128 * 2

    mixtral = measure_footprint(MixtralConfig(vocab_size=32000))
    experts = 32 * 8 * 3 * 4096 * 14336
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 4096 * 8 + 2 * 4096
    assert mixtral.plain_bytes == pytest.approx(2 * (2 * 32000 * 4096 + 32 * layer + 4096 + experts), rel=1e-6)
    assert mixtral.expert_bytes == 2 * experts
    assert mixtral.weights_bytes(int4=True) > mixtral.expert_bytes


def test_attention_that_holds_its_scores_reads_prompts_in_chunks() -> None:
    """gpt-oss-20b: 64 heads of 8192 queries and keys would hold 32 GiB of scores in one forward."""
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    plain = measure_footprint(config)
    assert plain.plain_bytes == pytest.approx(2 * 20.9148e9, rel=1e-4)
    assert plain.is_eager
    planned = plan_memory(plain, context=8192, target_int4=False)
    assert planned.workspace_bytes < PREFILL_SCORES * 1.1
    assert planned.target_kv_bytes == 8192 * 24 * 2 * 8 * 64 * 2
    config.quantization_config = {"quant_method": "mxfp4"}
    experts = 24 * 32 * 3 * 2880 * 2880
    int4 = measure_footprint(config)
    assert (plain.expert_bytes, int4.expert_bytes) == (2 * experts, 0)
    assert int4.weights_bytes(int4=True) == pytest.approx(
        2 * (20.9148e9 - experts) + experts / 2 + experts / 32, rel=1e-4
    )


@pytest.mark.parametrize(
    ("rows", "width", "heads", "chunk"),
    [
        (1, 8192, 0, 8192),
        (1, 8193, 0, 1024),
        (8, 8192, 0, 1024),
        (1, 0, 64, 0),
        (1, 2048, 64, 2048),  # just 2 GiB
        (1, 2049, 64, 2048 - 64),
        (1, 8192, 64, 512),
        (128, 8192, 64, 64),
    ],
)
def test_how_many_positions_a_prefill_reads_at_a_time(rows: int, width: int, heads: int, chunk: int) -> None:
    assert prefill_chunk(rows, width, heads) == chunk


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_plan_is_the_measured_peak_of_chunks_of_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text is the same; of gpt_oss, whose scores have sinks, also transformers' own."""
    if name == "llama":
        model: Any = load_checkpoint(PLAIN, dtype=torch.float32, attn_implementation="eager").eval()
        size = measure_footprint(model.config, dtype=torch.float32, device="cpu")
    else:
        model, size = family(name), measure_footprint(config_of(name), dtype=torch.float32, device="cpu", group_size=32)
    assert size.is_eager
    ids = torch.randint(3, 101, (2, 100), generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    monkeypatch.setattr(runner, "MIN_PREFILL_CHUNK", 10)
    texts, peaks = [model.generate(ids, eos_token_id=[], **call)], []
    specdec.enable(model, "none", compile=False)
    try:
        for limit in (PREFILL_SCORES, SCORE_BYTES * 2 * size.heads * 10 * 100):
            monkeypatch.setattr(runner, "PREFILL_SCORES", limit)
            gc.collect()
            with PeakMemory("cpu", model) as peak:
                texts.append(model.generate(ids, eos_token_id=[], **call))
            planned = plan_memory(
                size, context=104, batch=2, prompt=100, num_draft_tokens=1, sampled=False, target_int4=False
            )
            assert planned.total_bytes / peak.bytes == pytest.approx(1, abs=0.05)
            peaks.append(peak.bytes)
    finally:
        specdec.disable(model)
    assert peaks[1] < 0.99 * peaks[0]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_an_fp8_original_is_planned_as_one_in_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(**LLAMA_1B)
    config.save_pretrained(tmp_path)
    plain = measure_footprint(tmp_path)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    fp8 = measure_footprint(tmp_path)
    assert (fp8.plain_bytes, fp8.int4_bytes) == (plain.plain_bytes, plain.int4_bytes)
    assert run("--target", str(tmp_path), "--context", "512") == 0
    assert "is fp8, planned as its copy in full precision" in capsys.readouterr().out


def test_experts_that_stay_in_full_precision_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 16}
    MixtralConfig(**values, vocab_size=1024).save_pretrained(tmp_path)
    assert run("--target", str(tmp_path), "--context", "512") == 0
    gib = 2 * 8 * 3 * 2048 * 8192 * 2 / 2**30
    out = " ".join(capsys.readouterr().out.split())
    assert f"the experts of {tmp_path}, {gib:,.2f} GiB, stay in bfloat16 in all of these plans" in out
    assert run("--target", str(tmp_path), "--context", "512", "--json") == 0
    assert json.loads(capsys.readouterr().out)["expert_bytes"] == {str(tmp_path): 2 * 8 * 3 * 2048 * 8192 * 2}


def test_the_parts_add_up_and_grow() -> None:
    target, draft = pair()
    planned = plan_memory(target, draft, context=8192, batch=4)
    assert planned.total_bytes == sum(vars(planned).values())
    assert planned.target_kv_bytes == 4 * 8192 * 131072
    assert planned.draft_kv_bytes == 4 * 8192 * 32768
    assert planned.target_weights_bytes == target.int4_bytes
    assert planned.draft_weights_bytes == draft.plain_bytes
    assert plan_memory(target, draft, context=8192, batch=4, sampled=False).logits_bytes < planned.logits_bytes
    assert plan_memory(target, draft, context=8192, batch=4, num_draft_tokens=8).logits_bytes > planned.logits_bytes
    assert plan_memory(target, draft, context=8192, batch=4, draft_int4=True).draft_weights_bytes == draft.int4_bytes
    assert (
        plan_memory(target, draft, context=8192, batch=4, target_int4=False).target_weights_bytes == target.plain_bytes
    )
    alone = plan_memory(target, context=8192, batch=4)
    assert alone.draft_weights_bytes == alone.draft_kv_bytes == 0


@pytest.mark.parametrize("size", ["24GiB", "RTX 4090", "H100"])
def test_what_fits_a_card_fits_and_one_more_does_not(size: str) -> None:
    target, draft = pair()
    card = card_bytes(size)
    for batch in (1, 4):
        context = largest_context(card, target, draft, batch=batch)
        assert plan_memory(target, draft, context=context, batch=batch).total_bytes <= usable_bytes(card)
        if context < 131072:
            assert plan_memory(target, draft, context=context + 1, batch=batch).total_bytes > usable_bytes(card)
    for context in (512, 8192):
        batch = largest_batch(card, target, draft, context=context)
        assert plan_memory(target, draft, context=context, batch=batch).total_bytes <= usable_bytes(card)
        assert plan_memory(target, draft, context=context, batch=batch + 1).total_bytes > usable_bytes(card)


def test_longer_prompts_may_fit_again_where_prefill_runs_in_chunks() -> None:
    """8192 squared is the largest mask; longer prompts are read in chunks, so more may fit where less does not."""
    target = llama(max_position_embeddings=10000)
    wanted = plan_memory(target, context=9000).total_bytes
    assert plan_memory(target, context=7500).total_bytes > wanted
    card = math.ceil((wanted + CUDA_CONTEXT_BYTES) / (1 - FRAGMENTATION)) + 1
    assert 9000 <= largest_context(card, target) < 9010


def test_the_smallest_card_and_those_that_are_too_small() -> None:
    target, draft = pair()
    assert smallest_card(usable_bytes(24564 << 20)) == "RTX 4090"
    assert smallest_card(usable_bytes(24564 << 20) + 1) == "RTX 3090"
    assert smallest_card(10**15) is None
    assert largest_context(4 * GIB, target, draft) == 0
    assert largest_batch(4 * GIB, target, draft, context=1024) == 0
    assert card_bytes("24GiB") == card_bytes("24 gib") == 24 * GIB
    assert card_bytes("rtx 4090") == 24564 << 20


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    target = llama()
    with pytest.raises(
        ValueError,
        match="no config could be read from 'nowhere/to-be-found': it is no local folder and cannot be downloaded",
    ):
        measure_footprint("nowhere/to-be-found")
    with pytest.raises(ValueError, match=r"there is no config.json in .*; name a folder"):
        measure_footprint(tmp_path)
    with pytest.raises(ValueError, match="no memory can be planned for t5: it is an encoder-decoder model"):
        measure_footprint(T5Config())
    with pytest.raises(ValueError, match="for mamba: it has layers that keep more than keys and values"):
        measure_footprint(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="group_size=48 is none of"):
        measure_footprint(LlamaConfig(**LLAMA_8B), group_size=48)
    with pytest.raises(ValueError, match=r"context=131073 is beyond the 131072 positions that llama supports"):
        plan_memory(target, context=131073)
    with pytest.raises(ValueError, match="context=1 must be 2 or more"):
        plan_memory(target, context=1)
    with pytest.raises(ValueError, match="batch=0 must be 1 or more"):
        plan_memory(target, context=8, batch=0)
    with pytest.raises(ValueError, match="batch=0 must be 1 or more"):
        largest_context(24 * GIB, target, batch=0)
    with pytest.raises(ValueError, match="num_draft_tokens=0 must be 1 or more"):
        plan_memory(target, context=8, num_draft_tokens=0)
    with pytest.raises(ValueError, match=r"prompt=9 must lie in 1 … context=8"):
        plan_memory(target, context=8, prompt=9)
    with pytest.raises(
        ValueError, match=r"card 'RTX 1' is unknown; give its memory as in 24GiB, or one of RTX 3060 12GB, "
    ):
        card_bytes("RTX 1")
    odd = measure_footprint(config_of("llama"), group_size=64)
    with pytest.raises(ValueError, match="no linear layer of llama can be in four bits with this group size"):
        plan_memory(odd, context=8)


def test_live_storages_are_counted_once_and_until_they_die() -> None:
    with torch.inference_mode(), LiveStorages() as live:
        x = torch.zeros(1000)
        y = x[:10].view(2, 5)
        z = x + 1
        assert live.bytes == 8000
        del x, z
        assert live.bytes == 4000  # y sees all of x
        del y
        assert live.bytes == 0
    assert live.peak_bytes == 8000


def test_intermediate_tensors_of_an_operator_are_counted() -> None:
    query, mask = torch.randn(1, 2, 64, 16), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    with torch.inference_mode():
        plain = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        with PeakMemory("cpu") as peak:
            counted = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert torch.equal(plain, counted)
    assert peak.bytes >= 64 * 64 * 4 + counted.nbytes  # the mask in float32


def test_measuring_changes_no_text() -> None:
    target, draft = loaded(embedded.TARGET)[0], loaded(embedded.DRAFT)[0]
    specdec.enable(target, draft)
    ids = torch.arange(3, 83)[None]
    plain = target.generate(ids, max_new_tokens=16, do_sample=False)
    with PeakMemory("cpu", target, draft) as peak:
        counted = target.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(plain, counted)
    assert peak.bytes > bytes_of(target) + bytes_of(draft)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Configs of a pair, and nothing else."""
    folder = tmp_path_factory.mktemp("configs")
    for name, values in (("target", LLAMA_8B), ("draft", LLAMA_1B)):
        LlamaConfig(**values).save_pretrained(folder / name)
    return ["--target", str(folder / "target"), "--drafter", str(folder / "draft")]


def run(*arguments: str) -> int:
    return command.run(parse(["plan", *arguments]))


def test_the_answers_of_suffix_decoding_are_in_the_hosts_memory(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    target, draft = folders[:2], folders[3]
    for name in (draft, f"suffix+{draft}", "suffix"):
        assert run(*target, "--drafter", name, "--json") == 0
        reports[name] = json.loads(capsys.readouterr().out)
    alone, both, suffix = reports.values()
    assert [alone["host_bytes"], both["host_bytes"], suffix["host_bytes"]] == [0, 50_000_000, 50_000_000]
    assert (both["draft"], suffix["draft"]) == (alone["draft"], None)
    assert both["plans"] == alone["plans"]
    assert run(*target, "--drafter", "suffix") == 0
    assert "suffix decoding keeps earlier answers in the host's memory, up to 48 MiB" in capsys.readouterr().out


def test_the_command_prints_parts_totals_and_cards(
    folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*folders, "--context", "8192", "--batch", "4", "--card", "RTX 4090", "--card", "80GiB") == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80 or "target " in max(lines, key=len)
    cells = {
        parts[0]: parts[1:]
        for line in lines
        if len(parts := [part.strip() for part in line.strip("│").split("│")]) == 4
    }
    target, draft = pair()
    precisions: list[dict[str, bool]] = [{"target_int4": False}, {}, {"draft_int4": True}]
    totals = [plan_memory(target, draft, context=8192, batch=4, **precision).total_bytes for precision in precisions]
    assert cells["total"] == [f"{total / GIB:.2f}" for total in totals]
    assert cells["target weights"] == ["14.96", "4.92", "4.92"]
    assert cells["smallest card"] == [smallest_card(total) for total in totals]
    assert f"{largest_context(80 * GIB, target, draft, batch=4):,}" in out
    assert "131,072" in out


def test_the_command_prints_json(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*folders, "--context", "2048", "--batch", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    target, draft = pair()
    assert (
        report["plans"]["4-bit target"]["total_bytes"] == plan_memory(target, draft, context=2048, batch=2).total_bytes
    )
    assert list(report["plans"]) == ["both bf16", "4-bit target", "4-bit both"]
    assert {entry["batch"] for entry in report["totals"]} == {1, 2, 4, 16, 64}
    assert max(entry["context"] for entry in report["totals"]) == 131072
    assert report["cards"][0]["card"] == report["smallest_card"]["both bf16"]


def test_the_command_names_4_bit_checkpoints_and_plans_that_fit_no_card(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--target", str(embedded.TARGET), "--drafter", str(embedded.DRAFT), "--context", "512") == 0
    out = capsys.readouterr().out
    assert "is in four bits already (specdec_int4)" in out
    assert "MiB at the peak: 1 row of 512 tokens" in out
    assert run(*folders, "--context", "131072", "--batch", "64") == 0
    out = capsys.readouterr().out
    assert "none of the list" in out
    assert "No card of the list holds this" in out
    assert run(*folders[:2], "--card", "4GiB") == 0
    assert "does not fit" in capsys.readouterr().out


def test_the_command_draws(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"memory{suffix}"
        assert run(*folders, "--card", "24GiB", "--plot", str(file)) == 0
        assert file.read_bytes().startswith(magic)
        assert f"drawn: {file}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--plot memory.jpg must end in .svg, .png, .pdf"):
        run(*folders, "--plot", "memory.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'--plot needs matplotlib; pip install "specdec-lossless\[experiments\]"'):
        run(*folders, "--plot", str(tmp_path / "memory.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "200000"], r"context=200000 is beyond the 131072 positions"),
        (["--batch", "0"], r"batch=0 must be 1 or more"),
        (["--num-draft-tokens", "0"], r"num_draft_tokens=0 must be 1 or more"),
        (["--card", "abacus"], r"card 'abacus' is unknown"),
    ],
)
def test_the_command_refuses_impossible_values(folders: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*folders, *arguments)

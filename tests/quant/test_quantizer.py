"""Quantizing at load and in memory, saving and loading give the same bits, and errors where that is not possible."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import specdec
from specdec import Int4Config
from specdec.quant.int8 import Int8Linear
from specdec.quant.linear import Int4Linear
from specdec.quant.rounding import round_to_nearest
from tests.helpers.families import FAMILIES, family, make_model, prompts

WIDE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SMALL = Int4Config(group_size=32)
pytestmark = pytest.mark.filterwarnings("ignore:specdec keeps in full precision")


def small(model_type: str = "llama", **values: object) -> PreTrainedModel:
    return make_model(model_type, **WIDE | values)


def same_state(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plain checkpoint on disk."""
    small().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_at_load_in_memory_and_from_disk_are_the_same_bits(
    saved: Path, tmp_path: Path, group_size: int, symmetric: bool
) -> None:
    config = Int4Config(group_size, symmetric)
    at_load = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, quantization_config=config)
    in_memory = specdec.quantize(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), config)
    assert same_state(at_load, in_memory)
    layer = at_load.model.layers[1].mlp.down_proj
    original = load_file(saved / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert layer.dequantize().equal(round_to_nearest(original, group_size, symmetric).dequantize())

    at_load(torch.tensor([[1, 2, 3]]))  # its layers are now in a kernel's layout
    at_load.save_pretrained(tmp_path / "int4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    assert same_state(loaded, in_memory)
    in_memory.save_pretrained(tmp_path / "again")
    assert (tmp_path / "int4" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    ids = prompts(1)["input_ids"]
    assert loaded(ids).logits.equal(in_memory(ids).logits)
    assert config.skip_modules == []  # a config is not changed and may be used again


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_computes_with_its_rounded_weights(model_type: str) -> None:
    """The 4-bit model in float32 arithmetic against a full-precision one with the dequantized weights."""
    quantized, plain = family(model_type, "int4"), copy.deepcopy(family(model_type))
    count = 0
    for name, layer in quantized.named_modules():
        if isinstance(layer, Int4Linear | Int8Linear):
            weight = layer.dequantize(torch.float32)
            old = plain.get_submodule(name)
            old.weight.data = weight.T if type(old).__name__ == "Conv1D" else weight
            count += 1
    assert count >= 4
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        expected, got = plain(ids).logits, quantized(ids).logits
        assert (got - expected).norm() / expected.norm() < 1e-5
        fast = family(model_type, "int4_kernel")(ids).logits
        assert (fast - expected).norm() / expected.norm() < 0.1  # bfloat16 inside, std 0.25 weights around it


def test_a_draft_model_may_be_4_bit() -> None:
    target = small()
    draft = specdec.quantize(copy.deepcopy(target), SMALL)
    expected = target.generate(**prompts(4), max_new_tokens=20, do_sample=False)
    specdec.enable(target, draft, num_draft_tokens=4)
    assert target.generate(**prompts(4), max_new_tokens=20, do_sample=False).equal(expected)
    assert specdec.last_stats(target).num_accepted_draft_tokens > 0


def test_layers_left_out_give_one_warning() -> None:
    model = small(intermediate_size=80)
    with pytest.warns(UserWarning, match="specdec keeps in full precision") as caught:
        specdec.quantize(model, Int4Config(group_size=32, skip_modules=["model.layers.1.self_attn"], head=None))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "lm_head (the output head" in text
    assert (
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj (group_size=32 does not divide in_features=80"
        in text
    )
    assert "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj" in text
    assert "and 1 more (named in skip_modules)" in text
    assert not isinstance(model.model.layers[1].self_attn.q_proj, Int4Linear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Int4Linear)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2", "qwen3", "gpt_oss"])
def test_other_layouts_are_saved_and_loaded(tmp_path: Path, model_type: str) -> None:
    """Stacked experts are not quantized, Conv1D weights are transposed, biases are kept, heads may be tied."""
    values = {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 32} if model_type == "qwen3" else {}
    model = make_model(model_type, **FAMILIES[model_type] | values)
    model.save_pretrained(tmp_path / "plain")
    ids = prompts(1)["input_ids"]
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=SMALL)
    assert same_state(quantized, specdec.quantize(model, SMALL))
    quantized.save_pretrained(tmp_path / "int4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    assert same_state(loaded, quantized)
    assert loaded(ids).logits.equal(quantized(ids).logits)


def test_pickles_and_copies_hold_the_same_model() -> None:
    model = specdec.quantize(small(), SMALL)
    ids = prompts(1)["input_ids"]
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(ids).logits.equal(expected)
        with pytest.raises(ValueError, match="cannot be cast"):
            other.to(torch.float16)


def test_a_pickle_holds_the_canonical_form_for_a_cpu_of_another_kind(tmp_path: Path) -> None:
    """A kernel's layout depends on the CPU's vector width, so a file for other machines must not be in it."""
    model = specdec.quantize(small(), SMALL)
    ids = prompts(1)["input_ids"]
    expected = model(ids).logits.detach()
    torch.save((model, ids, expected), tmp_path / "model.pt")
    code = """
import sys, torch
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert (model(ids).logits - expected).norm() / expected.norm() < 0.05
"""
    for capability in ("avx2", "default"):
        command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
        env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=env)


def test_a_4_bit_model_without_references_is_freed() -> None:
    gc.disable()
    try:
        model = specdec.quantize(small(), SMALL)
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_threads_on_a_fresh_model_get_the_same_bits() -> None:
    models = [specdec.quantize(small(), SMALL) for _ in range(2)]
    ids = prompts(1)["input_ids"]

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    expected = logits(models[0])
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: logits(models[1]), range(32)))
    assert all(result.equal(expected) for result in results)


def test_a_name_in_skip_modules_that_does_not_exist() -> None:
    with pytest.raises(
        ValueError, match=r"skip_modules names 'model\.layer\.0', but no linear layer of this model is called that"
    ):
        specdec.quantize(small(), Int4Config(32, skip_modules=["model.layer.0"]))


def test_settings_of_the_wrong_type() -> None:
    with pytest.raises(ValueError, match="symmetric='no' must be True or False"):
        Int4Config(symmetric="no")
    with pytest.raises(TypeError, match="config must be an Int4Config, got dict"):
        specdec.quantize(small(), {"group_size": 32})


def test_a_group_size_that_divides_nothing() -> None:
    model = small(hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=4)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError, match=r"nothing in this model can be quantized .*group_size=64 does not divide in_features=48"
    ):
        specdec.quantize(model, Int4Config(group_size=64))
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("group_size", [0, 8, 100, "128", None])
def test_a_group_size_that_does_not_exist(group_size: object) -> None:
    with pytest.raises(ValueError, match=r"is none of 16, 32, 64, 128, 256, -1"):
        Int4Config(group_size=group_size)


def test_skip_modules_is_a_list() -> None:
    with pytest.raises(ValueError, match="must be a list of names"):
        Int4Config(skip_modules="lm_head")


def test_quantizing_twice() -> None:
    model = specdec.quantize(small(), SMALL)
    with pytest.raises(ValueError, match="in 4 bits already"):
        specdec.quantize(model, SMALL)


def test_a_model_that_another_method_quantized() -> None:
    model = small()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized already, by bitsandbytes"):
        specdec.quantize(model, SMALL)


def test_a_module_that_is_no_transformers_model() -> None:
    with pytest.raises(TypeError, match="takes a transformers model, got Linear"):
        specdec.quantize(torch.nn.Linear(2, 2))


def test_weights_that_are_not_finite_leave_the_model_unchanged(saved: Path) -> None:
    model = small()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has NaN"):
        specdec.quantize(model, SMALL)
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    model.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has NaN"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=SMALL)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.float16), lambda m: m.double()]
)
def test_a_cast_is_refused_before_anything_is_cast(cast: object) -> None:
    model = specdec.quantize(small().to(torch.bfloat16), SMALL)
    with pytest.raises(ValueError, match=r"cannot be cast to torch\.\w+: its scales are part of its weights"):
        cast(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8, torch.int8}
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.float()
    model.to("cpu")


def test_a_forward_in_training_mode() -> None:
    model = specdec.quantize(small(), SMALL)
    model.train()
    with pytest.raises(ValueError, match=r"no training mode; call model\.eval"):
        model(torch.tensor([[1, 2]]))


def test_quantizing_keeps_the_mode_of_the_model() -> None:
    assert specdec.quantize(small().train(), SMALL).model.layers[0].mlp.up_proj.training


def test_a_state_dict_of_another_group_size() -> None:
    model, other = (specdec.quantize(small(), Int4Config(group_size=size)) for size in (32, 64))
    with pytest.raises(RuntimeError, match="was quantized with group_size=64, this model with 32"):
        model.load_state_dict(other.state_dict())


def broken(folder: Path, change: object) -> Path:
    """A saved 4-bit model whose tensors were changed."""
    specdec.quantize(small(), Int4Config(32, symmetric=False)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Q = "model.layers.0.self_attn.q_proj"
BREAKAGES = {
    "no scale": (lambda t: t.pop(f"{Q}.weight_scale"), rf"lacks {Q}\.weight_scale"),
    "no codes": (lambda t: t.pop(f"{Q}.weight"), rf"lacks {Q}\.weight"),
    "no zero": (lambda t: t.pop(f"{Q}.weight_zero"), r"'weight_zero': 14\}, its files have .*'weight_zero': 13"),
    "nothing of a layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)],
        rf"lacks the 4-bit parts of {Q}",
    ),
    "a short row": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :-1].clone()}),
        rf"{Q}\.weight is torch.uint8 \[64, 31\]",
    ),
    "another dtype": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].short()}), rf"{Q}\.weight is torch.int16"),
    "ragged groups": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(64, 3)}), r"weight_zero is|3 groups"),
    "a layer too many": (
        lambda t: t.update({"model.layers.7.x.weight_scale": torch.ones(2, 2)}),
        r"for model\.layers\.7\.x",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_checkpoint_raises(tmp_path: Path, name: str) -> None:
    change, message = BREAKAGES[name]
    folder = broken(tmp_path / "broken", change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_weight_that_is_to_be_quantized(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"{Q}.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {Q}\.weight.*would be garbage"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=SMALL)


def test_a_format_version_of_the_future(tmp_path: Path) -> None:
    folder = broken(tmp_path / "int4", lambda t: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format has version 2, this specdec reads 1"):
        AutoModelForCausalLM.from_pretrained(folder)


PEAK = """
import sys, threading, time, warnings
import torch, specdec
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
warnings.simplefilter("ignore")

def anonymous():  # the operating system can drop file-backed pages
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=specdec.Int4Config())  # warm-up: imports, threads
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=specdec.Int4Config())
done = True
thread.join()
size = sum(p.nbytes for p in model.parameters())
layer = max(4 * m.in_features * m.out_features for m in model.modules() if type(m).__name__ == "Int4Linear")
full = sum(2 * m.in_features * m.out_features for m in model.modules() if type(m).__name__ == "Int4Linear")
print(peak - before - size, layer, full)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' memory counters")
def test_the_peak_above_the_finished_model_is_one_layer(tmp_path: Path) -> None:
    model = make_model("llama", **WIDE | {"hidden_size": 128})
    model.save_pretrained(tmp_path / "small")
    values = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "num_attention_heads": 16}
    make_model("llama", **WIDE | values).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    above, layer, full = map(int, run.stdout.split()[-3:])
    assert above <= layer, f"{above / 1e6:.0f} MB above the finished model; a layer in float32 is {layer / 1e6:.0f} MB"
    assert full > 3 * layer  # the whole model in bfloat16 would not have passed


def test_warnings_are_not_swallowed_when_nothing_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.quantize(small(vocab_size=128), SMALL)

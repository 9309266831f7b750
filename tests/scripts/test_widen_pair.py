"""Widening keeps a pair's outputs: the same logits and texts, in a larger shape, in bfloat16 or in 4 bits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import widen_pair
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from widen_pair import ORIGINAL, PAIRS, SHAPES, Shape, widen

from specdec.planning.peak_memory import LiveStorages
from specdec.quant.config import Int4Config
from specdec.quant.linear import Int4Linear
from specdec.quant.quantizer import quantize
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded

TINY = Shape(64, 96, 2, 4, 2, 16, 97, True)
WIDER = {
    "every dimension": replace(TINY, hidden_size=160, intermediate_size=224, num_hidden_layers=3, vocab_size=300),
    "more heads": replace(TINY, hidden_size=128, num_attention_heads=8, num_key_value_heads=4),
    "more queries to a key": replace(TINY, num_attention_heads=8),
    "fewer queries to a key": replace(TINY, hidden_size=96, num_attention_heads=6, num_key_value_heads=6),
    "heads twice as wide": replace(TINY, hidden_size=256, head_dim=32),
    "heads four times as wide": replace(TINY, head_dim=64),
    "more layers alone": replace(TINY, num_hidden_layers=4),
    "more ids": replace(TINY, hidden_size=68, vocab_size=1000),
    "all at once": Shape(256, 320, 4, 16, 8, 32, 500, True),
}


def tiny(tied: bool = True, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        **asdict(replace(TINY, tie_word_embeddings=tied)) | {"initializer_range": 0.3, "eos_token_id": 96} | settings
    )
    model = LlamaForCausalLM(config).eval()
    for module in model.modules():  # norms begin as ones, which would hide a wrong order
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("head", ["tied to tied", "tied to untied", "untied"])
@pytest.mark.parametrize("name", WIDER)
def test_logits_and_greedy_texts_are_the_small_models(name: str, head: str) -> None:
    source = tiny(tied=head != "untied")
    shape = replace(WIDER[name], tie_word_embeddings=head == "tied to tied")
    wide = widen(source, shape, dtype=torch.float32)
    assert Shape.of(wide.config) == shape
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(0))
    expected, actual = logits(source, ids), logits(wide, ids)
    assert expected.std() > 0.5  # logits that differ
    torch.testing.assert_close(actual[..., : source.config.vocab_size], expected, atol=1e-3, rtol=0)
    assert actual.shape[-1] == shape.vocab_size
    assert (actual[..., source.config.vocab_size :] < expected.amin() - 100).all()
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    assert wide.generate(ids, **options).equal(source.generate(ids, **options))


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}])  # fmt: skip
def test_scaled_rotary_embeddings_stay(rope: dict[str, Any]) -> None:
    source = tiny(rope_parameters=rope | {"rope_theta": 5000.0}, max_position_embeddings=128)
    wide = widen(source, WIDER["heads twice as wide"], dtype=torch.float32)
    ids = torch.arange(90)[None]
    torch.testing.assert_close(logits(wide, ids), logits(source, ids), atol=1e-3, rtol=0)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_embedded_pair_at_200m_is_exact_in_bfloat16(role: str) -> None:
    folder = str(ORIGINAL if role == "target" else embedded.DRAFT)
    source, shape = load(folder, "float32", "cpu"), SHAPES[PAIRS["200m"][role == "draft"]]
    inputs = load_tokenizer(folder)(
        [prompt["prompt"] for prompt in embedded.prompts()[:2]], return_tensors="pt", padding=True
    )
    wide = widen(source, replace(shape, num_hidden_layers=source.config.num_hidden_layers + 1)).float()  # H/h = 4
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected, actual = source.generate(**inputs, **options), wide.generate(**inputs, **options)
    assert actual.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-3, rtol=0)


def test_new_values_are_noise_but_for_the_output_projections() -> None:
    wide = widen(tiny(), WIDER["all at once"], dtype=torch.float32)
    for name, weight in wide.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            nonzero = weight[weight.any(1)]
            assert (nonzero != 0).all(), name
            # new dims of old heads' queries
            num_zero = 4 * 16 if "q_proj" in name and int(name.split(".")[2]) < 2 else 0
            assert len(weight) - len(nonzero) == num_zero, name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            block = 64 * (4 * 16 if "o_proj" in name else 96)
            assert int((weight != 0).sum()) == (block if int(name.split(".")[2]) < 2 else 0), name


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
def test_widening_to_4_bits_is_quantizing_the_widened_model() -> None:
    config = Int4Config(group_size=32)
    shape = replace(WIDER["all at once"], tie_word_embeddings=False)
    at_once = widen(tiny(), shape, int4=config)
    after = quantize(widen(tiny(), shape), config)
    # Noise is drawn in another order, so weights that hold none and logits are compared
    layers = {name: module for name, module in at_once.named_modules() if isinstance(module, Int4Linear)}
    assert len(layers) == 7 * 4
    assert at_once.config.quantization_config.parts == after.config.quantization_config.parts
    for name, layer in layers.items():
        if name.endswith(("o_proj", "down_proj")):
            assert layer.dequantize().equal(after.get_submodule(name).dequantize()), name
    ids = torch.arange(96)[None]
    torch.testing.assert_close(logits(at_once, ids)[..., :97], logits(after, ids)[..., :97], atol=1e-3, rtol=0)


def test_the_4_bit_model_saves_and_loads(tmp_path: Path) -> None:
    wide = widen(tiny(), WIDER["all at once"], int4=Int4Config(group_size=32))
    wide.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(50)[None]
    assert logits(read, ids).equal(logits(wide, ids))


def test_no_full_precision_copy_of_the_whole_model_is_made() -> None:
    class RealStorages(LiveStorages):
        def add(self, tensor: Tensor) -> None:
            if tensor.device.type != "meta":
                super().add(tensor)

    source, shape = tiny(), replace(WIDER["all at once"], num_hidden_layers=24, intermediate_size=2048)
    with RealStorages() as live:
        wide = widen(source, shape, int4=Int4Config(group_size=32))
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*wide.parameters(), *wide.buffers()))
    quantizing = 12 * 4 * shape.intermediate_size * shape.hidden_size  # one matrix, quantized in float32
    assert live.peak_bytes < held + quantizing
    assert live.peak_bytes < 2 * shape.num_parameters  # its size in bfloat16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(TINY, hidden_size=32), "hidden_size=32 is less than the 64"),
        (replace(TINY, num_attention_heads=7), "no multiple of num_key_value_heads=2"),
        (replace(TINY, head_dim=24), "head_dim=24 is no multiple of the 16"),
        (replace(TINY, vocab_size=200), "make hidden_size larger than 64"),
        (
            replace(TINY, hidden_size=100, num_attention_heads=8),
            "hidden_size=100 is no multiple of num_attention_heads=8",
        ),
        (replace(TINY, hidden_size=68, num_attention_heads=17, num_key_value_heads=17), None),
        (replace(TINY, num_attention_heads=4, num_key_value_heads=4), None),
    ],
)
def test_impossible_shapes_are_refused(shape: Shape, message: str | None) -> None:
    if message is None:
        widen_pair.check(tiny(), shape)
        return
    with pytest.raises(ValueError, match=message):
        widen(tiny(), shape)


def test_models_that_cannot_be_widened_are_refused() -> None:
    with pytest.raises(ValueError, match="keep it untied"):
        widen(tiny(tied=False), TINY)
    with pytest.raises(ValueError, match="without biases"):
        widen(tiny(attention_bias=True), TINY)
    with pytest.raises(ValueError, match="in 4 bits already"):
        widen(load(str(embedded.TARGET), "float32", "cpu"), SHAPES["200m"])
    with pytest.raises(ValueError, match="type 'dynamic'"):
        widen(
            tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), replace(TINY, head_dim=32)
        )
    six_on_two = tiny(num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
    with pytest.raises(ValueError, match="cannot hold 6 on 2: 4 key heads are needed"):
        widen(six_on_two, replace(TINY, hidden_size=96, num_attention_heads=6, num_key_value_heads=3))


def test_shapes_are_names_and_values() -> None:
    assert widen_pair.parse_shape([], "8b") == SHAPES["8b"]
    assert widen_pair.parse_shape(["1b"], "8b") == SHAPES["1b"]
    assert widen_pair.parse_shape(["num_hidden_layers=3"], "8b") == replace(SHAPES["8b"], num_hidden_layers=3)
    assert widen_pair.parse_shape(["1b", "tie_word_embeddings=false"], "8b") == replace(
        SHAPES["1b"], tie_word_embeddings=False
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9b"], "no shape is called '9b'"),
        (["depth=3"], "a shape has no 'depth'"),
        (["head_dim=x"], "head_dim must be an integer"),
    ],
)
def test_a_wrong_word_ends_with_a_message(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        widen_pair.main(["200m", "--target", *words, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_script_writes_a_pair_that_loads(tmp_path: Path) -> None:
    small = [
        "num_hidden_layers=12",
        "hidden_size=288",
        "intermediate_size=512",
        "num_attention_heads=4",
        "num_key_value_heads=1",
    ]
    widen_pair.main(["200m", "--target", *small, "vocab_size=5000", "--int4", "32", "--output", str(tmp_path)])
    target, tokenizer = load(str(tmp_path / "target"), "float32", "cpu"), load_tokenizer(str(tmp_path / "target"))
    assert sum(isinstance(module, Int4Linear) for module in target.modules()) == 7 * 12
    assert load(str(tmp_path / "draft"), "float32", "cpu").config.hidden_size == SHAPES["10m"].hidden_size
    inputs = tokenizer(embedded.prompts()[0]["prompt"], return_tensors="pt")
    new = target.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert int(new.max()) < len(tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]

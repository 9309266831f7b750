"""The embedded pair is what its cards say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec.quant.linear import Int4Linear
from specdec.utils import embedded

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT / "tests" / "data" / "target"  # what the 4-bit target was made of


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.TARGET, dtype=torch.float32)


@pytest.fixture(scope="module")
def draft() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.DRAFT, dtype=torch.float32)


def test_the_pair_fits_in_11_mb_the_target_in_4_bits() -> None:
    total = 0
    for folder, expected in ((embedded.TARGET, {"BF16", "U8", "I8"}), (embedded.DRAFT, {"BF16"}), (ORIGINAL, {"BF16"})):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == expected  # noqa: SIM118
        total += 0 if folder is ORIGINAL else (folder / "model.safetensors").stat().st_size
    assert total <= 11_000_000


def test_the_target_runs_on_4_bit_layers_by_the_devices_kernel(target: PreTrainedModel) -> None:
    layers = [module for module in target.modules() if isinstance(module, Int4Linear)]
    assert len(layers) == 77  # of 84: the first layer stays in bfloat16
    assert all(layer.group_size == 64 and layer.use_kernel for layer in layers)


@pytest.mark.parametrize("folder", [embedded.TARGET, embedded.DRAFT, ORIGINAL], ids=["target", "draft", "original"])
def test_shapes_suit_4_bit_groups(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama"
    assert config.vocab_size == 4096
    assert config.head_dim == 64
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    for width in (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim):
        assert width % 128 == 0


def test_both_have_the_same_tokenizer() -> None:
    text = (embedded.TARGET / "tokenizer.json").read_text(encoding="utf-8")
    assert text == (embedded.DRAFT / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET)
    code = "def f(x):\n    return {'ä': x ** 2}  # …\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code


@pytest.mark.parametrize("folder", [embedded.TARGET, embedded.DRAFT, ORIGINAL], ids=["target", "draft", "original"])
def test_cards_name_the_prompts_and_the_measured_figures(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((embedded.ASSETS / "prompts.jsonl").read_bytes()).hexdigest() in card
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert f"| {metrics['greedy_agreement']:.1%} |" in card
    assert f"| {metrics['expected_acceptance']:.3f} |" in card
    assert f"| {metrics['target_perplexity']:.2f} |" in card
    assert f"| {metrics['draft_perplexity']:.2f} |" in card


def test_agreement_measured_again_on_some_prompts_is_near_the_card(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET)
    prompts = [tokenizer(p["prompt"])["input_ids"][:128] for p in embedded.prompts()[::10]]
    ids = torch.tensor([p for p in prompts if len(p) == 128])
    text = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=1)
    with torch.no_grad():
        agrees = (target(text).logits.argmax(-1) == draft(text).logits.argmax(-1))[:, 127:-1]
    card = json.loads((embedded.TARGET / "metrics.json").read_text(encoding="utf-8"))["greedy_agreement"]
    assert abs(agrees.float().mean().item() - card) < 0.12


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("batch_size", "num_draft_tokens"), [(1, 5), (1, "auto"), (4, 2)])
def test_the_pair_writes_the_targets_own_text(
    target: PreTrainedModel, draft: PreTrainedModel, batch_size: int, num_draft_tokens: int | str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")
    texts = [p["prompt"][: 200 + 60 * (i % 4)] for i, p in enumerate(embedded.prompts()[:: 25 * batch_size])][
        : 2 * batch_size
    ]
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
        expected = target.generate(**inputs, max_new_tokens=40, do_sample=False)
        specdec.enable(target, draft, num_draft_tokens=num_draft_tokens)
        got = target.generate(**inputs, max_new_tokens=40, do_sample=False)
        stats = specdec.last_stats(target)
        specdec.disable(target)
        assert got.tolist() == expected.tolist()
        assert (
            stats.num_accepted_draft_tokens > 0 or num_draft_tokens == "auto"
        )  # which may find that drafting does not pay


def test_prompts_come_from_the_held_out_modules() -> None:
    spec = importlib.util.spec_from_file_location("train_pair", ROOT / "scripts" / "train_pair.py")
    train_pair = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_pair)
    assert len(embedded.prompts()) >= 200
    assert {p["id"].rpartition("-")[0] for p in embedded.prompts()} <= set(train_pair.HELD_OUT)
    assert train_pair.is_held_out("heapq.py")
    assert train_pair.is_held_out("test/test_heapq.py")
    assert not train_pair.is_held_out("json/decoder.py")
    training = json.loads((embedded.TARGET / "metrics.json").read_text(encoding="utf-8"))["training"]
    if training["python"] == platform.python_version():
        assert train_pair.held_out_prompts(train_pair.stdlib_modules()) == embedded.prompts()

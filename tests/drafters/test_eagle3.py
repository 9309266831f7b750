"""EAGLE-3 heads: what they draft, and the checkpoints that are read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.core.steps import StepResult
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.head_checkpoint import load_head
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.resolve import resolve_drafter
from specdec.generation.enable import decoding_of, state_of
from specdec.quant.layers import is_4bit
from specdec.runtime.cpu_compile.packages import package_path
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.pair import PairMember
from specdec.runtime.runner import ModelRunner
from specdec.utils.numerics import relative_error
from tests.generation.test_concurrency import in_threads
from tests.helpers.eagle3_oracle import CONFIGURATIONS, FOLDER, LENGTH, WIDTH
from tests.helpers.eagle3_oracle import VOCAB_SIZE as ORACLE_VOCABULARY
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.heads import (
    chain_draft,
    drafts_of_greedy_call,
    layer_config,
    random_dflash,
    random_dspark,
    random_head,
    random_peagle,
    random_tensors,
    states_of,
    write_safeailab,
    write_speculators,
)
from tests.helpers.mtp import random_mtp

REDUCED = list(range(1, VOCAB_SIZE, 2))


@pytest.fixture
def target() -> PreTrainedModel:
    return make_model("llama", seed=3, **FAMILIES["llama"])


@torch.no_grad()
def expected_keys(drafter: Eagle3Drafter, target: PreTrainedModel, text: list[int]) -> Tensor:
    """The keys [H, L - 1, D] that the head writes for a text of L ids."""
    ids, states = torch.tensor([text]), states_of(drafter.head, target, text)[:, :-1]
    positions = torch.arange(len(text) - 1)[None]
    runner = ModelRunner(drafter.head)
    runner.begin(1)
    runner.cache.window.reserve(len(text))
    with torch.inference_mode():
        runner.cache.features.write(positions, states[:, :, None])
    runner.forward(ids[:, 1:], positions)
    keys: Any = runner.cache.layers[0].keys
    return keys[0, :, : len(text) - 1]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_its_logits_are_those_of_the_speculators_library(name: str) -> None:
    values = FAMILIES["llama"] | {"vocab_size": ORACLE_VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4}
    head = load_head(str(FOLDER / name), make_model("llama", **values))
    expected = load_file(FOLDER / name / "logits.safetensors")
    ids, states = expected["ids"], head.reduce(expected["states"])
    drafted = torch.arange(head.settings.draft_vocab_size) + head.d2t

    def feed(length: int) -> tuple[ModelRunner, Tensor]:
        """A runner that has fed this many ids with the target's states: -> the runner, the logits of the last."""
        runner = ModelRunner(head)
        runner.begin(1)
        runner.cache.window.reserve(length)
        with torch.inference_mode():
            runner.cache.features.write(torch.arange(length)[None], states[:, :length, None])
        output = runner.prefill(ids, torch.tensor([length - 1]))
        assert output is not None
        return runner, output.logits[0, 0]

    for length in range(1, LENGTH):
        runner, first = feed(length)
        assert relative_error(first[drafted], expected["first"][0, length - 1]) < 1e-5
        assert first.isfinite().sum() == len(drafted)
        second = runner.forward(ids[:, length : length + 1], torch.tensor([[length]])).logits[0, 0]
        assert relative_error(second[drafted], expected["second"][0, length - 1]) < 1e-5


@pytest.mark.parametrize("draft_ids", [None, REDUCED], ids=["all ids", "some ids"])
@pytest.mark.parametrize(("num_draft_tokens", "compile"), [(1, False), (4, False), (4, True)])
def test_it_drafts_what_a_forward_over_the_whole_text_gives(
    target: PreTrainedModel, tmp_path: Path, draft_ids: list[int] | None, num_draft_tokens: int, compile: bool
) -> None:
    drafter = random_head(target, tmp_path, draft_ids, num_layers=2)
    specdec.enable(target, drafter, num_draft_tokens=num_draft_tokens, compile=compile)
    assert decoding_of(target) == ("compiled" if compile else "eager")
    for text, draft in drafts_of_greedy_call(target):
        assert draft == chain_draft(drafter.head, target, text, len(draft)), f"behind {len(text)} ids"


def test_sampled_drafts_are_accepted_and_the_head_goes_on_from_them(target: PreTrainedModel, tmp_path: Path) -> None:
    """A flat target and a flat head agree often, so that rows advance by different numbers, up to K + 1.

    Before each draft the head's cache holds what a forward over the whole text would write.
    """
    drafter = random_head(target, tmp_path)
    specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
    batch = prompts(4)
    texts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def observe(result: StepResult) -> None:
        keys: Any = drafter.runner.cache.layers[0].keys
        for row, step in enumerate(result.steps):
            if step is None:
                continue
            if step.drafted:
                expected = expected_keys(drafter, target, texts[row])
                assert relative_error(keys[row, :, : expected.shape[1]], expected) < 1e-4
            texts[row] += [*result.draft.ids[row, : step.accepted].tolist(), int(result.verdict.next_ids[row])]

    state_of(target).observer = observe
    torch.manual_seed(0)
    target.generate(**batch, max_new_tokens=24, do_sample=True, temperature=30.0, top_k=0, eos_token_id=None)
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.draft_acceptance_rate > 0.5
    assert stats.acceptance_histogram[3] > 0


def test_a_text_of_one_id_is_drafted_from_the_second_on(target: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.tensor([[5], [9]])
    expected = target.generate(input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    specdec.enable(target, random_head(target, tmp_path), num_draft_tokens=3)
    assert target.generate(input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=None).equal(expected)
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0


@pytest.mark.parametrize("num_draft_tokens", [3, "auto"])
def test_with_suffix_decoding_it_reads_what_it_did_not_draft(
    target: PreTrainedModel, tmp_path: Path, num_draft_tokens: Any
) -> None:
    batch = prompts(4)
    expected = target.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None)
    random_head(target, tmp_path)
    specdec.enable(target, f"suffix+{tmp_path}", num_draft_tokens=num_draft_tokens)
    assert isinstance(state_of(target).drafter, SuffixHybrid)
    for _ in range(2):
        assert target.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None).equal(expected)


def test_layouts_of_both_libraries_are_read(target: PreTrainedModel, tmp_path: Path) -> None:
    config = layer_config(target)
    tensors = random_tensors(config, REDUCED, 2)
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
    drafters = [
        resolve_drafter(write_speculators(tmp_path / "a", config, tensors, [0, 1]), target),
        resolve_drafter(write_safeailab(tmp_path / "b", config, tensors, [0, 1]), target),
    ]
    text = prompts(1)["input_ids"][0].tolist()
    drafts = []
    for drafter in drafters:
        assert isinstance(drafter, Eagle3Drafter)
        assert drafter.feature_layers == (0, 1)
        drafts.append(chain_draft(drafter.head, target, text, 5))
    assert drafts[0] == drafts[1]
    assert drafters[1].head.embed_tokens is target.get_input_embeddings()  # type: ignore[union-attr]


def test_without_layer_ids_it_reads_an_early_a_middle_and_a_late_layer(tmp_path: Path) -> None:
    target = make_model("llama", seed=3, **FAMILIES["llama"] | {"num_hidden_layers": 8})
    config = layer_config(target)
    drafter = resolve_drafter(write_safeailab(tmp_path, config, random_tensors(config, REDUCED, 3), None), target)
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.feature_layers == (2, 4, 5)


Spoil = Any


def lacks(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["layers.0.hidden_norm.weight"]


def has_more(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["input_norm.weight"] = torch.ones(64)


def has_other_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous()


def has_absolute_ids(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["d2t"] = torch.tensor(REDUCED)


def names_other_ids(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["t2d"] = ~tensors["t2d"]


def has_fractions(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["d2t"] = tensors["d2t"].float()


def names_too_few_ids(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["t2d"] = tensors["t2d"][:9].clone()


def has_no_layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["transformer_layer_config"]


def reads_too_many_layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["eagle_aux_hidden_state_layer_ids"] = [0, 7]


def is_of_another_kind(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["speculators_model_type"] = "dflash2"


def is_for_another_vocabulary(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["transformer_layer_config"]["vocab_size"] = VOCAB_SIZE + 8
    tensors["embed_tokens.weight"] = torch.zeros(VOCAB_SIZE + 8, 32)


def has_another_width(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["target_hidden_size"] = 48


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacks, "lacks layers.0.hidden_norm.weight"),
        (has_more, "too many tensors: input_norm.weight"),
        (has_other_shape, r"fc.weight \[64, 32\], not \[32, 64\]"),
        (has_absolute_ids, "d2t holds offsets"),
        (names_other_ids, "t2d and d2t name different ids"),
        (has_fractions, "d2t must hold whole numbers"),
        (names_too_few_ids, "t2d has 9 entries, and the target 101 ids"),
        (has_no_layers, "has no transformer_layer_config"),
        (reads_too_many_layers, r"reads the hidden states \[0, 7\], but those of a target with 2 layers are 0 … 1"),
        (
            is_of_another_kind,
            "it is a head of DFlash's second version; specdec runs EAGLE-3, P-EAGLE",
        ),
        (is_for_another_vocabulary, "for a target of 109 ids, and this one has 101"),
        (has_another_width, "of width 48, and the target's have 32"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    target: PreTrainedModel, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    config = layer_config(target)
    folder = write_speculators(tmp_path / "head", config, random_tensors(config, REDUCED, 2), [0, 1])
    content, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    spoil(tensors, content)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        specdec.enable(target, folder)
    assert not hasattr(target, "_specdec_state")


def test_a_setting_on_which_readers_disagree_is_named(target: PreTrainedModel, tmp_path: Path) -> None:
    config = layer_config(target)
    folder = write_speculators(tmp_path, config, random_tensors(config, REDUCED, 2), [0, 1])
    content = json.loads((folder / "config.json").read_text())
    del content["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="lacks norm_before_residual; specdec assumes false"):
        specdec.enable(target, folder)


def test_a_target_that_nothing_reads_keeps_no_hidden_states(target: PreTrainedModel, tmp_path: Path) -> None:
    specdec.enable(target, "prompt_lookup", compile=False)
    runner = state_of(target).target
    runner.begin(1)
    runner.prefill(torch.tensor([[1, 2, 3]]), torch.tensor([2]))
    assert runner.cache.features.buffer is None
    assert len(runner.cache.buffers()) == 4


def test_calls_at_the_same_time_have_caches_of_their_own(target: PreTrainedModel, tmp_path: Path) -> None:
    batches = [prompts(2, seed=seed) for seed in range(3)]
    call: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = [target.generate(**batch, **call).tolist() for batch in batches]
    specdec.enable(target, random_head(target, tmp_path), num_draft_tokens=3)
    assert in_threads(*(lambda batch=batch: target.generate(**batch, **call).tolist() for batch in batches)) == expected


@pytest.mark.parametrize("make", [random_head, random_peagle, random_dflash, random_dspark, random_mtp])
@pytest.mark.parametrize("in_four_bits", [False, True], ids=["plain target", "4-bit target"])
def test_a_head_in_four_bits_drafts(make: Any, in_four_bits: bool) -> None:
    target = make_model("llama", seed=3, **FAMILIES["llama"] | {"hidden_size": 64, "head_dim": 16})
    if in_four_bits:
        specdec.quantize(target, specdec.Int4Config(32, head=None))
    call: dict[str, Any] = prompts(3) | {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected, output = target.generate(**call).tolist(), target.get_output_embeddings()
    drafter = make(target)
    drafter.quantize(32)
    assert is_4bit(drafter.head)
    assert target.get_output_embeddings() is output
    assert (drafter.head.lm_head is output) is ("lm_head" in drafter.head.shared)
    specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
    assert target.generate(**call).tolist() == expected
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("make", [random_head, random_peagle, random_dflash, random_dspark, random_mtp])
def test_a_head_follows_its_target_to_another_dtype(make: Any, family: str) -> None:
    """Phi's output layer, which a head may share, has a bias."""
    if (make, family) == (random_mtp, "phi"):
        pytest.skip("phi has no norm that an MTP layer could have")
    target = make_model(family, seed=3, **FAMILIES[family])
    specdec.enable(target, make(target), num_draft_tokens=3, compile=False)
    call: dict[str, Any] = prompts(2) | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = target.generate(**call).tolist()
    target.to(torch.float64)
    assert target.generate(**call).shape == (2, 19)
    target.to(torch.float32)
    assert target.generate(**call).tolist() == before
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0


@pytest.mark.parametrize("make", [random_dflash, random_mtp])
def test_a_head_that_follows_leaves_the_output_layer_of_a_4_bit_target_as_it_is(make: Any) -> None:
    target: Any = make_model("llama", seed=3, **FAMILIES["llama"])
    specdec.quantize(target, specdec.Int4Config(16))
    drafter = make(target)
    scale = target.lm_head.weight_scale.dtype
    drafter.head.norm_of_its_own().data = drafter.head.norm_of_its_own().double()
    specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
    target.generate(**prompts(2), max_new_tokens=4, do_sample=False)
    assert target.lm_head.weight_scale.dtype == scale
    assert drafter.head.norm_of_its_own().dtype == target.dtype


def test_settings_that_a_forward_depends_on_name_another_compiled_package(
    target: PreTrainedModel, tmp_path: Path, cpu_kernels: None
) -> None:
    paths = []
    for norm_output in (False, True):
        runner = random_head(target, tmp_path, norm_output=norm_output).runner
        paths.append(package_path(PairMember("draft", runner, exact=False), Identity(runner.model)))
    assert paths[0] != paths[1]


def test_a_file_that_holds_more_than_tensors_is_not_read(target: PreTrainedModel, tmp_path: Path) -> None:
    config = layer_config(target)
    folder = write_safeailab(tmp_path, config, random_tensors(config, REDUCED, 2), [0, 1])
    torch.save({"fc.weight": Path()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged, or holds more than tensors; it is not read"):
        specdec.enable(target, folder)

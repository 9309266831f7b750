"""DFlash heads: what a block drafts, and the folders that are read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import specdec
from specdec.core.steps import StepResult
from specdec.drafters.dflash import DFlashDrafter, DFlashHead
from specdec.drafters.head_checkpoint import load_head
from specdec.generation.enable import decoding_of, state_of
from specdec.runtime.runner import ModelRunner
from specdec.utils.numerics import relative_error
from tests.helpers.dflash_oracle import BLOCK_SIZE, CONFIGURATIONS, FOLDER, MASK_ID
from tests.helpers.eagle3_oracle import LENGTH, WIDTH
from tests.helpers.eagle3_oracle import VOCAB_SIZE as ORACLE_VOCABULARY
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.heads import drafts_of_greedy_call, random_dflash, run_block, states_of

REDUCED = list(range(1, VOCAB_SIZE, 2))


@pytest.fixture
def target() -> PreTrainedModel:
    return make_model("llama", seed=3, **FAMILIES["llama"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_its_logits_are_those_of_the_speculators_library(name: str) -> None:
    values = FAMILIES["llama"] | {"vocab_size": ORACLE_VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4}
    model = make_model("llama", **values)
    expected = load_file(FOLDER / name / "logits.safetensors")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.weight.data = expected["embedding"]
    head = load_head(str(FOLDER / name), model)
    assert isinstance(head, DFlashHead)
    assert (head.settings.block_size, head.settings.mask_token_id) == (BLOCK_SIZE, MASK_ID)
    states = head.reduce(expected["states"])
    drafted = torch.arange(head.settings.draft_vocab_size) + head.d2t
    for anchor in range(LENGTH):
        _, _, logits = run_block(head, expected["ids"], states, anchor)
        assert relative_error(logits[:, drafted], expected["logits"][anchor]) < 1e-5
        assert logits.isfinite().sum() == len(drafted) * BLOCK_SIZE


def expected_draft(drafter: DFlashDrafter, target: PreTrainedModel, text: list[int], num_ids: int) -> list[int]:
    """What the head drafts greedily behind a text, from forwards over all of it without anything kept."""
    head = drafter.head
    assert isinstance(head, DFlashHead)
    ids, states, first = torch.tensor([text]), states_of(head, target, text), head.settings.first_drafting
    _, _, logits = run_block(head, ids, states, len(text) - 1)
    return logits[first : first + num_ids].argmax(-1).tolist()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("draft_ids", [None, REDUCED], ids=["all ids", "some ids"])
def test_it_drafts_what_a_forward_over_the_whole_text_gives(
    target: PreTrainedModel, tmp_path: Path, draft_ids: list[int] | None, compile: bool
) -> None:
    settings: dict[str, bool] = {} if draft_ids is None else {"sample_from_anchor": True}
    drafter = random_dflash(target, tmp_path, draft_ids, **settings)
    specdec.enable(target, drafter, num_draft_tokens=4, compile=compile)
    assert decoding_of(target) == ("compiled" if compile else "eager")
    for text, draft in drafts_of_greedy_call(target):
        assert draft == expected_draft(drafter, target, text, len(draft)), f"behind {len(text)} ids"


@pytest.mark.parametrize("num_draft_tokens", [3, 9, "auto"])
def test_sampled_drafts_are_accepted_and_a_block_ends_a_draft(
    target: PreTrainedModel, num_draft_tokens: int | str
) -> None:
    """A flat target and a flat head agree often, so that rows advance by different numbers."""
    specdec.enable(target, random_dflash(target, block_size=6), num_draft_tokens=num_draft_tokens, compile=False)
    torch.manual_seed(0)
    target.generate(**prompts(4), max_new_tokens=24, do_sample=True, temperature=30.0, top_k=0, eos_token_id=None)
    stats = specdec.last_stats(target)
    assert stats is not None
    if num_draft_tokens != "auto":
        assert stats.draft_acceptance_rate > 0.5
        assert max(step.drafted for row in stats.per_row for step in row.steps) == min(int(num_draft_tokens), 5)


def test_the_cache_holds_the_targets_states_where_whole_drafts_are_accepted(target: PreTrainedModel) -> None:
    """A flat target and a flat head agree often: before a draft, up to K + 1 positions are new."""
    drafter = random_dflash(target)
    head = drafter.head
    assert isinstance(head, DFlashHead)
    specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
    batch = prompts(4)
    texts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    num_accepted = set()

    def observe(result: StepResult) -> None:
        keys: Any = drafter.runner.cache.layers[1].keys
        for row, step in enumerate(result.steps):
            if step is None:
                continue
            length = len(texts[row]) - 1
            if step.drafted and length:
                with torch.no_grad():
                    hidden = target(input_ids=torch.tensor([texts[row]]), output_hidden_states=True).hidden_states
                taps = torch.stack([hidden[layer] for layer in drafter.feature_layers], dim=2)[:, :length]
                runner, positions = ModelRunner(head), torch.arange(length)[None]
                runner.begin(1)
                with torch.inference_mode():
                    head.write_context(head.reduce(taps), positions, runner.cache_at(positions))
                expected: Any = runner.cache.layers[1].keys
                assert relative_error(keys[row, :, :length], expected[0, :, :length]) < 1e-4
            num_accepted.add(step.accepted)
            texts[row] += [*result.draft.ids[row, : step.accepted].tolist(), int(result.verdict.next_ids[row])]

    state_of(target).observer = observe
    torch.manual_seed(0)
    target.generate(**batch, max_new_tokens=24, do_sample=True, temperature=30.0, top_k=0, eos_token_id=None)
    assert num_accepted >= {0, 3}


def test_with_suffix_decoding_texts_are_the_plain_ones(target: PreTrainedModel, tmp_path: Path) -> None:
    batch = prompts(4)
    expected = target.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None)
    random_dflash(target, tmp_path)
    specdec.enable(target, f"suffix+{tmp_path}", num_draft_tokens=3)
    for _ in range(2):
        assert target.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None).equal(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": None}, "has mask_token_id=None, where a whole number is needed"),
        ({"mask_token_id": 101}, "mask_token_id=101 is none of the target's ids"),
        ({"aux_hidden_state_layer_ids": []}, "does not name the target's layers"),
        ({"aux_hidden_state_layer_ids": [1, 2]}, r"reads the hidden states \[1, 2\]"),
        ({"block_size": "8"}, "has block_size='8', where a whole number is needed"),
        ({"block_size": 0}, "leaves nothing to draft"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    target: PreTrainedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    random_dflash(target, tmp_path, REDUCED)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        specdec.enable(target, tmp_path)

"""P-EAGLE heads: what they draft behind a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import specdec
from specdec.drafters.head_checkpoint import load_head
from specdec.drafters.peagle import PEagleDrafter, PEagleHead
from specdec.runtime.runner import ModelRunner
from specdec.utils.numerics import relative_error
from tests.helpers.eagle3_oracle import FOLDER, VOCAB_SIZE, WIDTH
from tests.helpers.families import FAMILIES, make_model, prompts
from tests.helpers.heads import drafts_of_greedy_call, random_peagle


@pytest.fixture
def target() -> PreTrainedModel:
    return make_model("llama", seed=3, **FAMILIES["llama"])


def logits_behind(head: PEagleHead, ids: torch.Tensor, states: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Logits [num_ids, V] behind ids [1, L], which are fed with states [1, L, H], in one forward over everything."""
    length = ids.shape[1]
    read = torch.cat([ids, torch.full((1, num_ids - 1), head.settings.mask_token_id)], dim=1)
    states = torch.cat([states, head.mask_state().expand(-1, num_ids - 1, -1)], dim=1)
    positions = torch.arange(read.shape[1])[None]
    runner = ModelRunner(head)
    runner.begin(1)
    runner.cache.window.reserve(read.shape[1])
    with torch.inference_mode():
        runner.cache.features.write(positions, states[:, :, None])
    return runner.forward(read, positions).logits[0, length - 1 :]


def test_its_logits_are_those_of_the_speculators_library() -> None:
    values = FAMILIES["llama"] | {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "num_hidden_layers": 4}
    folder = FOLDER.parent / "peagle"
    head = load_head(str(folder), make_model("llama", **values))
    assert isinstance(head, PEagleHead)
    expected = load_file(folder / "logits.safetensors")
    states = head.reduce(expected["states"])
    drafted = torch.arange(head.settings.draft_vocab_size) + head.d2t
    pairs = zip(expected["anchors"].tolist(), expected["depths"].tolist(), expected["logits"][0], strict=True)
    for anchor, depth, wanted in pairs:
        length = anchor + 1
        found = logits_behind(head, expected["ids"][:, :length], states[:, :length], depth + 1)[depth]
        assert relative_error(found[drafted], wanted) < 1e-5


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_it_drafts_what_a_forward_over_the_whole_text_gives(target: PreTrainedModel, num_draft_tokens: int) -> None:
    drafter = random_peagle(target)
    specdec.enable(target, drafter, num_draft_tokens=num_draft_tokens, compile=False)
    for text, draft in drafts_of_greedy_call(target):
        assert draft == expected_draft(drafter, target, text, len(draft)), f"behind {len(text)} ids"


def expected_draft(drafter: PEagleDrafter, target: PreTrainedModel, text: list[int], num_ids: int) -> list[int]:
    head = drafter.head
    assert isinstance(head, PEagleHead)
    ids = torch.tensor([text])
    with torch.no_grad():
        hidden = target(input_ids=ids, output_hidden_states=True).hidden_states
        states = head.reduce(torch.stack([hidden[layer] for layer in drafter.feature_layers], dim=2))
        return logits_behind(head, ids[:, 1:], states[:, :-1], num_ids).argmax(-1).tolist()


def test_sampled_drafts_are_accepted(target: PreTrainedModel) -> None:
    """A flat target and a flat head agree often, so that rows advance by different numbers."""
    specdec.enable(target, random_peagle(target), num_draft_tokens=3, compile=False)
    torch.manual_seed(0)
    target.generate(**prompts(4), max_new_tokens=24, do_sample=True, temperature=30.0, top_k=0, eos_token_id=None)
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.draft_acceptance_rate > 0.5


def test_a_head_without_a_mask_id_is_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    random_peagle(target, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has mask_token_id=None, where a whole number is needed"):
        specdec.enable(target, tmp_path)


def test_rows_of_different_lengths_end_within_their_buffers(target: PreTrainedModel) -> None:
    """Rows that are further on than others draft fewer ids than the step's K."""
    specdec.enable(target, random_peagle(target), num_draft_tokens=6, compile=False)
    call = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "eos_token_id": None}
    for seed in range(12):
        torch.manual_seed(seed)
        assert target.generate(**prompts(2), **call).shape == (2, 23)

"""DSpark heads: what a block drafts, where the confidence head ends a draft, which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec
from specdec.drafters.dspark import MIN_CHANCE, DSparkDrafter, DSparkHead
from specdec.drafters.head_checkpoint import load_head
from specdec.generation.enable import decoding_of
from specdec.utils.numerics import relative_error
from tests.helpers.dflash_oracle import BLOCK_SIZE, DSPARK_CONFIGURATIONS, FOLDER
from tests.helpers.eagle3_oracle import LENGTH, WIDTH
from tests.helpers.eagle3_oracle import VOCAB_SIZE as ORACLE_VOCABULARY
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model
from tests.helpers.heads import drafts_of_greedy_call, random_dspark, run_block, states_of

REDUCED = list(range(1, VOCAB_SIZE, 2))


@pytest.fixture
def target() -> PreTrainedModel:
    return make_model("llama", seed=3, **FAMILIES["llama"])


class Block:
    """The block that begins at the id of index `anchor`, by a new runner; what it drafts behind given ids."""

    def __init__(self, head: DSparkHead, ids: Tensor, states: Tensor, anchor: int) -> None:
        runner, positions, self.logits = run_block(head, ids, states, anchor)
        self.head, self.anchor_id = head, int(ids[0, anchor])
        self.states = runner.read_features(positions)[:, :, 0]
        self.memory = torch.zeros(1, head.settings.markov_rank)

    def read(self, column: int, before: int) -> tuple[Tensor, float]:
        """Logits [V] of a column behind an id, and the chance that its id is accepted; columns in order."""
        with torch.inference_mode():
            bias, chance, self.memory = self.head.read_before(
                torch.tensor([before]), self.states[:, column], self.memory
            )
        assert bias is not None
        assert chance is not None
        return self.logits[column] + bias[0, 0], float(chance)


@pytest.mark.parametrize("name", DSPARK_CONFIGURATIONS)
def test_its_logits_and_chances_are_those_of_the_speculators_library(name: str) -> None:
    values = FAMILIES["llama"] | {"vocab_size": ORACLE_VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4}
    model = make_model("llama", **values)
    expected = load_file(FOLDER / name / "logits.safetensors")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.weight.data = expected["embedding"]
    head = load_head(str(FOLDER / name), model)
    assert isinstance(head, DSparkHead)
    drafted = torch.arange(head.settings.draft_vocab_size) + head.d2t
    states, ids = head.reduce(expected["states"]), expected["ids"]
    for anchor in range(LENGTH):
        block = Block(head, ids, states, anchor)
        for column in range(BLOCK_SIZE):
            behind = column if head.settings.sample_from_anchor else max(column - 1, 0)
            logits, chance = block.read(column, int(ids[0, anchor + behind]))
            assert relative_error(logits[drafted], expected["logits"][anchor, column]) < 1e-5
            assert chance == pytest.approx(float(expected["chances"][anchor, column]), rel=1e-5)
            assert logits.isfinite().sum() == len(drafted)


def expected_draft(drafter: DSparkDrafter, target: PreTrainedModel, text: list[int], num_ids: int) -> list[int]:
    """What the head drafts greedily behind a text, from forwards over all of it without anything kept."""
    head = drafter.head
    assert isinstance(head, DSparkHead)
    ids, states = torch.tensor([text]), states_of(head, target, text)
    block = Block(head, ids, states, len(text) - 1)
    draft: list[int] = []
    before, reached = block.anchor_id, 1.0
    for column in range(head.settings.block_size):
        logits, chance = block.read(column, before)
        if column < head.settings.first_drafting:
            continue
        reached *= chance
        if reached < MIN_CHANCE or len(draft) == num_ids:
            break
        before = int(logits.argmax())
        draft.append(before)
    return draft


@pytest.mark.parametrize(("draft_ids", "compile"), [(None, False), (REDUCED, False), (REDUCED, True)])
def test_it_drafts_what_a_forward_over_the_whole_text_gives(
    target: PreTrainedModel, tmp_path: Path, draft_ids: list[int] | None, compile: bool
) -> None:
    settings: dict[str, bool] = {} if draft_ids is None else {"sample_from_anchor": False}
    drafter = random_dspark(target, tmp_path, draft_ids, **settings)
    specdec.enable(target, drafter, num_draft_tokens=4, compile=compile)
    assert decoding_of(target) == ("compiled" if compile else "eager")
    lengths = set()
    for text, draft in drafts_of_greedy_call(target):
        assert draft == expected_draft(drafter, target, text, 4)[: len(draft)], f"behind {len(text)} ids"
        lengths.add(len(draft))
    assert len(lengths) > 1


@pytest.mark.parametrize(("chance", "num_drafted"), [(0.05, 0), (0.3, 1), (0.5, 3), (0.99, 4)])
def test_a_draft_ends_where_the_confidence_head_gives_little_chance(
    target: PreTrainedModel, chance: float, num_drafted: int
) -> None:
    """0.5: the chances of the first four ids are 1/2, 1/4, 1/8 and 1/16."""
    drafter = random_dspark(target, markov_head_type="vanilla")
    confidence_head = drafter.head.confidence_head
    assert isinstance(confidence_head, nn.Module)
    confidence_head.proj.weight.data.zero_()
    confidence_head.proj.bias.data.fill_(torch.logit(torch.tensor(chance)))
    specdec.enable(target, drafter, num_draft_tokens=4, compile=False)
    target.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=24, do_sample=False)
    stats = specdec.last_stats(target)
    assert stats is not None
    assert {step.drafted for step in stats.per_row[0].steps[:3]} == {num_drafted}


def test_without_further_heads_it_drafts_what_dflash_drafts(target: PreTrainedModel, tmp_path: Path) -> None:
    random_dspark(target, tmp_path, REDUCED)
    content = json.loads((tmp_path / "config.json").read_text())
    tensors = {
        name: value
        for name, value in load_file(tmp_path / "model.safetensors").items()
        if not name.startswith(("markov_head", "confidence_head"))
    }
    drafts = []
    for kind in ("dspark", "dflash"):
        own = {"speculators_model_type": kind, "markov_rank": 0, "enable_confidence_head": False}
        (tmp_path / "config.json").write_text(json.dumps(content | own | {"sample_from_anchor": True}))
        save_file(tensors, tmp_path / "model.safetensors")
        specdec.enable(target, tmp_path, num_draft_tokens=3, compile=False)
        drafts.append(drafts_of_greedy_call(target))
        specdec.disable(target)
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_head_type": "fir"}, "Markov head is of the type 'fir'; specdec runs vanilla, gated, rnn"),
        ({"markov_rank": -3}, "markov_rank=-3 must be 0, without a Markov head, or more"),
        ({"aux_hidden_state_layer_ids": 5}, "does not name the target's layers"),
        ({"markov_rank": 0}, "has a confidence head that reads a Markov head, but markov_rank=0"),
        ({"markov_rank": 5}, "has tensors of another shape than its config.json says"),
        ({"enable_confidence_head": False}, "has, for its config.json, too many tensors: confidence_head.proj.bias"),
        ({"markov_head_type": "gated"}, "lacks markov_head.gate_proj.bias"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    target: PreTrainedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    random_dspark(target, tmp_path, REDUCED)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        specdec.enable(target, tmp_path)

"""Rows of a batch that are released and admitted while the others go on: each text is that of its prompt alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.core.interfaces import Drafter
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import speculate
from specdec.draft_length.constant import ConstantK
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.suffix import SuffixDecoding
from specdec.runtime.runner import ModelRunner
from tests.helpers.families import VOCAB_SIZE, family
from tests.helpers.tokenizers import other_tokenizer

K = 3
WIDTH = 7  # of the padded prompts
MAX_LENGTH = 24  # of the padded texts


def prompt(seed: int, length: int) -> Tensor:
    return torch.randint(5, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def batch(*prompts: Tensor) -> Sequences:
    padded = torch.zeros(len(prompts), WIDTH, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        padded[row, WIDTH - len(ids) :] = ids
    lengths = torch.tensor([len(ids) for ids in prompts])
    return Sequences(padded, lengths, max_length=MAX_LENGTH, num_draft_tokens=K)


def alone(ids: Tensor) -> list[int]:
    """Greedy decoding by transformers' own loop, as many new ids as a row of the batch takes."""
    new_ids = MAX_LENGTH - WIDTH
    output = family("llama").generate(ids[None], max_new_tokens=new_ids, do_sample=False, eos_token_id=None)
    text: list[int] = output[0].tolist()
    return text


def new_drafter(name: str) -> Drafter:
    if name == "other_tokenizer":
        return other_tokenizer(family("llama"))
    if name == "model":
        return ModelDrafter(family("llama"), VOCAB_SIZE)
    if name == "suffix+model":
        return SuffixHybrid(ModelDrafter(family("llama"), VOCAB_SIZE))
    return {"none": NoDrafter, "prompt_lookup": PromptLookup, "suffix": SuffixDecoding}[name]()


@pytest.mark.parametrize("name", ["none", "prompt_lookup", "suffix", "model", "suffix+model", "other_tokenizer"])
def test_an_admitted_prompt_continues_as_it_does_alone(name: str) -> None:
    first, second, third = prompt(1, 7), prompt(2, 4), prompt(3, 6)
    sequences = batch(first, second)
    runner, drafter = ModelRunner(family("llama")), new_drafter(name)
    policy = ConstantK(0 if name == "none" else K)
    for index, _ in enumerate(speculate(runner, drafter, sequences, Sampling(), policy)):
        if index == 1:
            released = sequences.release(0).tolist()
            sequences.admit(0, third)
            runner.prefill(sequences.ids, sequences.lengths - 1)
            drafter.begin(sequences, Sampling())
    texts = [sequences.release(row).tolist() for row in range(2)]
    assert len(first) < len(released) < len(alone(first))
    assert released == alone(first)[: len(released)]
    assert texts == [alone(third), alone(second)]


def test_a_released_row_takes_part_in_no_step() -> None:
    sequences = batch(prompt(1, 7), prompt(2, 4))
    runner = ModelRunner(family("llama"))
    for index, result in enumerate(speculate(runner, NoDrafter(), sequences, Sampling(), ConstantK(0))):
        if index == 0:
            released = sequences.release(0).tolist()
        else:
            assert result.steps[0] is None
    assert sequences.is_done
    assert sequences.release(0).tolist() == released


def test_what_cannot_be_admitted_is_refused_and_changes_nothing() -> None:
    sequences = batch(prompt(1, 7), prompt(2, 4))
    before = sequences.ids.clone()
    with pytest.raises(ValueError, match="row 0 is live; release it"):
        sequences.admit(0, prompt(3, 3))
    sequences.release(0)
    for length in (0, WIDTH + 1):
        with pytest.raises(
            ValueError, match=f"a prompt of {length} ids does not fit rows whose prompts have 1 to {WIDTH}"
        ):
            sequences.admit(0, prompt(3, length))
    sequences.begin_step(K)
    with pytest.raises(RuntimeError, match=r"release\(\) with 1 steps in flight"):
        sequences.release(1)
    with pytest.raises(RuntimeError, match=r"admit\(\) with 1 steps in flight"):
        sequences.admit(0, prompt(3, 3))
    assert sequences.ids[:, :WIDTH].equal(before[:, :WIDTH])

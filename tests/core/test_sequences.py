"""Committing: each row ends at its own stop, checked on the texts that plain decoding checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, Verdict

V = 6
K = 3
WIDTH = 5  # of the padded prompts
PADDING = 9  # an id like any other, and none of the vocabulary, so that it shows wherever it leaks

Text = list[int]
Move = tuple[Text, int, int, int]  # draft ids, how many count, how many of those are accepted, the target's next id


@dataclass
class PlainRow:
    """One row as a plain loop holds it: one id after the other, every stop checked after each."""

    text: Text  # left-padded
    max_length: int
    stop_ids: tuple[int, ...]
    stop: Callable[[Text], bool]
    finished: bool = False
    checked: list[Text] = field(default_factory=list)

    def commit(self, ids: Text) -> int:
        """How many of the ids are taken."""
        for num_taken, x in enumerate(ids):
            if self.finished:
                return num_taken
            self.text.append(x)
            self.checked.append(list(self.text))
            self.finished = x in self.stop_ids or self.stop(self.text) or len(self.text) >= self.max_length
        return len(ids)


def make_prompt(prompts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and lengths."""
    width = max(map(len, prompts))
    return torch.tensor([[PADDING] * (width - len(ids)) + ids for ids in prompts]), torch.tensor(
        [len(ids) for ids in prompts]
    )


def make_step(moves: list[Move]) -> tuple[Draft, Verdict]:
    drafted, lengths, accepted, next_ids = zip(*moves, strict=True)
    draft = Draft(torch.tensor(drafted).view(len(moves), -1).long(), None, torch.tensor(lengths))
    return draft, Verdict(torch.tensor(accepted), torch.tensor(next_ids))


def commit(sequences: Sequences, *moves: Move) -> tuple[list[int], list[bool]]:
    sequences.begin_step(K)
    emitted, stopped = sequences.commit(*make_step(list(moves)))
    return emitted.tolist(), stopped.tolist()


def texts(sequences: Sequences) -> list[Text]:
    padded = sequences.padded(int(sequences.padded_lengths.max()))
    return [padded[row, :length].tolist() for row, length in enumerate(sequences.padded_lengths.tolist())]


def accepting(ids: Text, next_id: int) -> Move:
    return ids, len(ids), len(ids), next_id


ids_of_v = st.integers(0, V - 1)


@st.composite
def batches_of_moves(draw: st.DrawFn, limits: list[int]) -> list[Move]:
    width = draw(st.integers(max(limits), K))
    moves = []
    for limit in limits:
        length = draw(st.integers(0, limit))
        moves.append(
            (
                draw(st.lists(ids_of_v, min_size=width, max_size=width)),
                length,
                draw(st.integers(0, length)),
                draw(ids_of_v),
            )
        )
    return moves


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_commit_does_what_a_plain_loop_does_row_by_row(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.lists(ids_of_v, min_size=1, max_size=WIDTH), min_size=1, max_size=3))
    prompt, lengths = make_prompt(prompts)
    max_length = prompt.shape[1] + data.draw(st.integers(1, 9))
    stop_ids = tuple(data.draw(st.sets(ids_of_v, max_size=1)))
    modulus = data.draw(st.sampled_from([None, 5, 11]))
    checked: list[list[int]] = []

    def stops(text: Text) -> bool:
        return modulus is not None and sum(text) % modulus == 0

    def stop(text: torch.Tensor) -> bool:
        assert text.shape[0] == 1
        checked.append(text[0].tolist())
        return stops(checked[-1])

    sequences = Sequences(
        prompt, lengths, max_length=max_length, num_draft_tokens=K,
        stop_ids=torch.tensor(stop_ids) if stop_ids else None, stop=stop if modulus else None,
    )  # fmt: skip
    rows = [PlainRow(text, max_length, stop_ids, stops) for text in prompt.tolist()]
    while not all(row.finished for row in rows):
        limit = sequences.begin_step(K).tolist()
        assert limit == [0 if row.finished else min(K, max_length - len(row.text) - 1) for row in rows]
        moves = data.draw(batches_of_moves(limit))
        was_finished = [row.finished for row in rows]
        checked.clear()
        for row in rows:
            row.checked.clear()
        sequences.stage(make_step(moves)[0].ids)
        emitted, stopped = commit(sequences, *moves)
        assert emitted == [
            row.commit([*ids[:accepted], next_id]) for row, (ids, _, accepted, next_id) in zip(rows, moves, strict=True)
        ]
        assert stopped == [row.finished and not before for row, before in zip(rows, was_finished, strict=True)]
        assert sequences.finished.tolist() == [row.finished for row in rows]
        assert texts(sequences) == [row.text for row in rows]
        assert checked == ([text for row in rows for text in row.checked] if modulus else [])


def test_steps_that_begin_together_have_columns_and_bounds_for_all() -> None:
    sequences = Sequences(*make_prompt([[1, 2], [3, 4, 5]]), max_length=20)
    sequences.begin_step(0, 16)
    assert sequences.ids.shape[1] >= 20
    assert sequences.longest == 19
    sequences.begin_step(0)
    assert sequences.longest == 20


@pytest.mark.parametrize(("accepted", "emitted"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_stop_id_inside_the_accepted_block_ends_the_row_there(accepted: int, emitted: int) -> None:
    sequences = Sequences(*make_prompt([[1, 2]]), max_length=20, num_draft_tokens=K, stop_ids=torch.tensor([0, 5]))
    assert commit(sequences, ([3, 5, 5], 3, accepted, 4)) == ([emitted], [accepted > 1])
    assert texts(sequences) == [[1, 2, *[3, 5][: min(accepted, 2)], *([4] if accepted < 2 else [])]]


def test_a_stop_id_in_the_prompt_or_in_rejected_ids_ends_nothing() -> None:
    sequences = Sequences(*make_prompt([[0, 0, 1]]), max_length=20, num_draft_tokens=K, stop_ids=torch.tensor([0]))
    assert commit(sequences, ([2, 0, 0], 3, 1, 3)) == ([2], [False])
    assert texts(sequences) == [[0, 0, 1, 2, 3]]


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_max_length_is_met_exactly_when_no_multiple_of_the_window(max_new_tokens: int) -> None:
    prompts = [[1], [1, 2, 3, 4], [1, 2]]
    sequences = Sequences(*make_prompt(prompts), max_length=4 + max_new_tokens, num_draft_tokens=K)
    steps = 0
    while not sequences.finished.all():
        limit = sequences.limit(K).tolist()
        commit(sequences, *(([2] * K, count, count, 3) for count in limit))
        steps += 1
    assert steps == -(-max_new_tokens // (K + 1))
    assert [len(text) for text in texts(sequences)] == [4 + max_new_tokens] * 3


def test_the_last_slot_before_the_end_is_the_targets_own() -> None:
    sequences = Sequences(*make_prompt([[1], [1, 2, 3, 4]]), max_length=7, num_draft_tokens=K)
    assert sequences.end.tolist() == [4, 7]
    assert sequences.limit(K).tolist() == [2, 2]
    assert sequences.limit(1).tolist() == [1, 1]
    assert sequences.limit(0).tolist() == [0, 0]


def test_no_id_is_drafted_at_or_beyond_the_context_but_the_text_goes_on() -> None:
    sequences = Sequences(*make_prompt([[1], [1, 2, 3, 4]]), max_length=20, num_draft_tokens=K, context=6)
    limits = []
    while not sequences.finished.any():
        limits.append(sequences.limit(K).tolist())
        commit(sequences, ([], 0, 0, 2), ([], 0, 0, 2))
    assert [limit[1] for limit in limits[:4]] == [2, 1, 0, 0]
    assert [limit[0] for limit in limits[:7]] == [3, 3, 3, 2, 1, 0, 0]
    assert len(limits) == 16


def test_finished_rows_stay_as_they_are() -> None:
    sequences = Sequences(*make_prompt([[1, 2], [3, 4]]), max_length=12, num_draft_tokens=K, stop_ids=torch.tensor([0]))
    assert commit(sequences, accepting([1, 0, 3], 4), accepting([5, 5, 5], 5)) == ([2, 4], [True, False])
    for _ in range(2):
        assert sequences.limit(K)[0] == 0
        assert commit(sequences, ([4] * K, 0, 0, 4), ([2] * K, 1, 1, 1)) == ([0, 2], [False, False])
    assert texts(sequences) == [[1, 2, 1, 0], [3, 4, 5, 5, 5, 5, 2, 1, 2, 1]]


def test_the_stop_callable_sees_one_row_and_each_of_its_ids_in_turn() -> None:
    seen: list[Text] = []

    def stop(text: torch.Tensor) -> bool:
        seen.append(text[0].tolist())
        return text.shape == (1, 6)

    sequences = Sequences(*make_prompt([[1], [2, 3, 4]]), max_length=20, num_draft_tokens=K, stop=stop)
    assert commit(sequences, ([5, 4, 3], 3, 0, 2), accepting([1, 2, 3], 4)) == ([1, 3], [False, True])
    assert seen == [[9, 9, 1, 2], [2, 3, 4, 1], [2, 3, 4, 1, 2], [2, 3, 4, 1, 2, 3]]
    seen.clear()
    assert commit(sequences, accepting([1, 1, 1], 1), ([0] * 3, 0, 0, 0)) == ([2, 0], [True, False])
    assert seen == [[9, 9, 1, 2, 1], [9, 9, 1, 2, 1, 1]]


def test_the_prompt_keeps_the_padding_it_came_with() -> None:
    sequences = Sequences(torch.tensor([[8, 7, 1], [9, 2, 3]]), torch.tensor([1, 2]), max_length=6, num_draft_tokens=K)
    sequences.stage(torch.tensor([[4, 5], [4, 5]]))
    sequences.stage(torch.tensor([[2], [3]]), skip=2)
    assert sequences.ids[:, :5].tolist() == [[1, 4, 5, 2, 0], [2, 3, 4, 5, 3]]
    assert sequences.padded(6).tolist() == [[8, 7, 1, 4, 5, 2], [9, 2, 3, 4, 5, 3]]
    assert sequences.padded(2).tolist() == [[8, 7], [9, 2]]
    assert sequences.lengths.tolist() == [1, 2]  # staging commits nothing
    assert sequences.padded_lengths.tolist() == [3, 3]


def test_the_callers_tensors_are_left_alone() -> None:
    prompt, lengths = make_prompt([[1], [2, 3]])
    before = prompt.clone(), lengths.clone()
    draft, verdict = make_step([accepting([4, 4, 4], 5), ([4, 4, 4], 3, 1, 5)])
    ids, accepted = draft.ids.clone(), verdict.accepted.clone()
    Sequences(prompt, lengths, max_length=9, num_draft_tokens=K, stop_ids=torch.tensor([4])).commit(draft, verdict)
    assert all(
        x.equal(y)
        for x, y in zip((prompt, lengths, draft.ids, verdict.accepted), (*before, ids, accepted), strict=True)
    )

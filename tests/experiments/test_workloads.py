"""Workloads: every kind of file, template, turns, limit, order, and errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specdec.experiments.workloads import Dataset, Prompt, Stdlib


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


ROWS = [
    {"id": "q1", "task": "chat", "prompt": ["Hello?", "And now?"]},
    {"id": "q2", "task": "code", "prompt": "def f():", "reference": ["x"]},
    {"id": "q3", "task": "code", "prompt": "é\u2028"},
]
PROMPTS = [
    Prompt("q1", "chat", ("Hello?", "And now?")),
    Prompt("q2", "code", ("def f():",)),
    Prompt("q3", "code", ("é\u2028",)),
]


def test_jsonl_with_both_turns_and_texts(tmp_path: Path) -> None:
    assert Dataset(jsonl(tmp_path / "a.jsonl", *ROWS)).prompts() == PROMPTS


def test_json_and_parquet(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert Dataset(str(path)).prompts() == PROMPTS
    datasets.Dataset.from_list([{"id": "q", "task": "t", "prompt": "x"}]).to_parquet(tmp_path / "a.parquet")
    assert Dataset(str(tmp_path / "a.parquet")).prompts() == [Prompt("q", "t", ("x",))]


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  \ntwo\n")
    assert Dataset(str(path)).prompts() == [Prompt("a/1", "a", ("one",)), Prompt("a/2", "a", ("two",))]


def test_template_and_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "1+1?", "key": 7, "hint": "add"})
    workload = Dataset(path, prompt="q", id="key", template="{hint}: {q}\nAnswer:")
    assert workload.prompts() == [Prompt("7", "a", ("add: 1+1?\nAnswer:",))]
    path = jsonl(tmp_path / "b.jsonl", ROWS[0])
    assert Dataset(path, template="Q: {prompt}").prompts()[0].turns == ("Q: Hello?", "Q: And now?")


def test_limit_and_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(20)))
    prompts = Dataset(path).prompts()
    assert Dataset(path, limit=3).prompts() == prompts[:3]
    shuffled = Dataset(path, shuffle_seed=1).prompts()
    assert shuffled != prompts
    assert sorted(shuffled, key=lambda p: p.id) == sorted(prompts, key=lambda p: p.id)
    assert Dataset(path, shuffle_seed=1, limit=5).prompts() == shuffled[:5]
    assert Dataset(path, shuffle_seed=2).prompts() != shuffled


def test_the_stdlib_workload_needs_no_download() -> None:
    prompts = Stdlib().prompts()
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 216
    assert {prompt.task for prompt in prompts} >= {"queue", "argparse"}
    assert Stdlib(limit=2).prompts() == prompts[:2]


BAD: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "malformed line": ([{"prompt": "a"}, '{"prompt": oops}'], {}, r"a\.jsonl, line 2 is not valid JSON"),
    "no object": ([{"prompt": "a"}, "[1]"], {}, r"a\.jsonl, line 2 is not a JSON object"),
    "no prompts": ([], {}, "contains no prompt, so there is nothing to run"),
    "blank lines alone": ([" ", ""], {}, "contains no prompt, so there is nothing to run"),
    "another column": (
        [{"question": "a"}],
        {},
        r"row 1 has no column 'prompt', only question; in a config, workload\.prompt=… names",
    ),
    "an empty prompt": (
        [{"prompt": "a"}, {"prompt": " "}],
        {},
        "row 2: a prompt must be a text or a list of texts, none of them empty",
    ),
    "a number": ([{"prompt": 3}], {}, "row 1: a prompt must be a text"),
    "an empty turn": ([{"prompt": ["a", ""]}], {}, "row 1: a prompt must be a text"),
    "no turns": ([{"prompt": []}], {}, "row 1: a prompt must be a text"),
    "one id twice": (
        [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}],
        {},
        "row 2: the id 'x' occurs twice",
    ),
    "template": ([{"prompt": "a"}], {"template": "{wish}"}, "the template names 'wish', but the columns are prompt"),
    "limit": ([{"prompt": "a"}], {"limit": 0}, "workload.limit=0 must be 1 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    rows, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Dataset(jsonl(tmp_path / "a.jsonl", *rows), **options).prompts()


def test_a_missing_file_and_an_unknown_suffix_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl' is not a file; pass a \.json, \.jsonl, \.parquet, \.txt file"):
        Dataset(str(tmp_path / "none.jsonl")).prompts()
    with pytest.raises(ValueError, match=r"is not a file; pass a"):
        Dataset(str(tmp_path)).prompts()
    other = tmp_path / "a.csv"
    other.write_text("prompt\nx\n")
    with pytest.raises(ValueError, match=r"has the suffix '\.csv'; prompts are read from"):
        Dataset(str(other)).prompts()


def test_a_dataset_that_is_neither_local_nor_on_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def not_found(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(ValueError, match=r"'no/such' is not a file, and no dataset of that id could be loaded"):
        Dataset("no/such").prompts()


def test_a_dataset_on_the_hub_is_loaded_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(path: str, name: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        calls.append((path, name, split, streaming))
        return [{"question": "1+1?"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts = Dataset(
        "openai/gsm8k", "main", "test", prompt="question", template="Question: {question}\nAnswer:"
    ).prompts()
    assert calls == [("openai/gsm8k", "main", "test", False)]
    assert prompts == [Prompt("gsm8k/1", "gsm8k", ("Question: 1+1?\nAnswer:",))]


@pytest.mark.parametrize(("shuffle_seed", "streams"), [(None, True), (1, False)])
def test_a_dataset_on_the_hub_is_streamed_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch, shuffle_seed: int | None, streams: bool
) -> None:
    import datasets

    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(100):
            read.append(number)
            yield {"prompt": f"prompt {number}"}

    def load(path: str, name: str | None, split: str, streaming: bool) -> Any:
        assert streaming is streams
        return datasets.IterableDataset.from_generator(rows) if streaming else list(rows())

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts = Dataset("someone/prompts", limit=3, shuffle_seed=shuffle_seed).prompts()
    assert len(prompts) == 3
    assert ([prompt.turns for prompt in prompts] == [(f"prompt {number}",) for number in range(3)]) is streams
    assert len(read) == (3 if streams else 100)

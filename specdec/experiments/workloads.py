"""Workloads: prompts of one or more turns, each with an id and a task."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from specdec.utils import embedded

SPEED_BENCH_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Prompt:
    """turns: the user's messages in order; the model answers after each."""

    id: str
    task: str
    turns: tuple[str, ...]


class Workload(Protocol):
    """Any class with these members; a file in conf/workload names it as `_target_`. chat_template: as in Dataset."""

    chat_template: bool | None

    def prompts(self) -> list[Prompt]:
        """All prompts in the order in which they are run; raises ValueError where there are none."""


@dataclass
class Stdlib:
    """Excerpts from modules of Python's standard library that the embedded pair was not trained on.

    limit: number of prompts; None: all 216. shuffle_seed: shuffle them with this seed; None: keep their order.
    """

    limit: int | None = None
    shuffle_seed: int | None = None
    chat_template: bool | None = None

    def prompts(self) -> list[Prompt]:
        prompts = [Prompt(row["id"], row["id"].rpartition("-")[0], (row["prompt"],)) for row in embedded.prompts()]
        return _select(prompts, self.limit, self.shuffle_seed, "the stdlib workload")


@dataclass
class Dataset:
    """A local json, jsonl, parquet or text file, or a dataset on the hub, loaded with `datasets`.

    path: the file, or the dataset's hub id. name, split: configuration and split of a dataset on the hub.
    prompt: the column with the prompt, a text or a list of turns; each line of a text file is a prompt.
    template: a turn's text, with columns in braces ("Question: {question}\\nAnswer:"); None: the prompt column alone.
    id, task: columns with a prompt's id and the group in which it is reported; where they are missing, the row number
        and the file's name.
    limit, shuffle_seed: as in Stdlib. With a limit alone, a dataset on the hub is streamed up to there.
    chat_template: whether turns go through the tokenizer's chat template; None: where it has one.
    """

    path: str
    name: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    template: str | None = None
    id: str = "id"
    task: str = "task"
    limit: int | None = None
    shuffle_seed: int | None = None
    chat_template: bool | None = None

    def prompts(self) -> list[Prompt]:
        rows = self._rows()
        prompts = [self._prompt(number, row) for number, row in enumerate(rows, 1)]
        ids: set[str] = set()
        for number, prompt in enumerate(prompts, 1):
            if prompt.id in ids:
                raise ValueError(f"{self.path}, row {number}: the id {prompt.id!r} occurs twice; ids must be unique")
            ids.add(prompt.id)
        return _select(prompts, self.limit, self.shuffle_seed, self.path)

    def _rows(self) -> Iterable[dict[str, Any]]:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # the errors below name the line
        file = Path(self.path).expanduser()
        loader = LOADERS.get(file.suffix.lower())
        if not file.is_file():
            if file.exists() or loader is not None or self.path.startswith((".", "/", "~")):
                raise ValueError(f"{self.path!r} is not a file; pass a {', '.join(LOADERS)} file or a dataset's hub id")
            streams = (self.limit or 0) > 0 and self.shuffle_seed is None  # a limit needs the first rows alone
            try:
                rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=streams)
                return list(islice(rows, self.limit)) if streams else rows
            except Exception as error:  # a stream fails in ways of its own
                raise ValueError(
                    f"{self.path!r} is not a file, and no dataset of that id could be loaded: {error}"
                ) from error
        if loader is None:
            raise ValueError(
                f"{self.path} has the suffix {file.suffix!r}; prompts are read from {', '.join(LOADERS)} files"
            )
        if not file.read_bytes().strip():
            return []
        try:
            rows = datasets.load_dataset(loader, data_files=str(file), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                _find_malformed_line(file) or f"{self.path} cannot be read: {error.__cause__ or error}"
            ) from error
        return [row for row in rows if row["text"].strip()] if loader == "text" else rows

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        where = f"{self.path}, row {number}"
        column = "text" if self.prompt == "prompt" and "text" in row and "prompt" not in row else self.prompt
        value = row.get(column)
        if value is None and self.template is None:
            columns = ", ".join(name for name, content in row.items() if content is not None)
            raise ValueError(
                f"{where} has no column {column!r}, only {columns}; in a config, workload.prompt=… names the prompt's"
                " column"
            )
        turns: list[Any] = value if isinstance(value, list) else [value]
        if self.template is not None:
            try:
                turns = [self.template.format(**row | {column: turn}) for turn in turns]
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"{where}: the template names {error}, but the columns are {', '.join(row)}"
                ) from error
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise ValueError(
                f"{where}: a prompt must be a text or a list of texts, none of them empty, but it is {value!r:.60}"
            )
        stem = Path(self.path).stem
        return Prompt(str(row.get(self.id) or f"{stem}/{number}"), str(row.get(self.task) or stem), tuple(turns))


@dataclass
class SpeedBench(Dataset):
    """SPEED-Bench (Abramovich et al., 2026). Its dataset on the hub has placeholders, which are refused as prompts."""

    def prompts(self) -> list[Prompt]:
        prompts = super().prompts()
        absent = sum(any(SPEED_BENCH_PLACEHOLDER in turn for turn in prompt.turns) for prompt in prompts)
        if absent:
            raise ValueError(
                f"{self.path} has placeholders for {absent} of {len(prompts)} prompts; fetch these with prepare_data.py"
                " (examples/specdec_bench in github.com/NVIDIA/Model-Optimizer) and name the file that it writes with"
                " workload.path=…"
            )
        return prompts


def encode(turns: Sequence[str], answers: Sequence[str], tokenizer: Any, as_chat: bool) -> list[int]:
    """The ids of a conversation up to the turn that follows the answers; as_chat: by the tokenizer's chat template."""
    turns = turns[: len(answers) + 1]
    if not as_chat:
        text = "\n\n".join(turn + answer for turn, answer in zip(turns, [*answers, ""], strict=True))
        return list(tokenizer(text).input_ids)
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def uses_chat_template(workload: Workload, tokenizer: Any) -> bool:
    """Whether turns go through the tokenizer's chat template: as the workload says, by default where there is one."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    requested = workload.chat_template
    if requested and not has_template:
        raise ValueError(
            f"workload.chat_template=true, but the tokenizer of {tokenizer.name_or_path} has no chat template;"
            " set it to false"
        )
    return has_template if requested is None else requested


def _select(prompts: list[Prompt], limit: int | None, shuffle_seed: int | None, name: str) -> list[Prompt]:
    if limit is not None and limit < 1:
        raise ValueError(f"workload.limit={limit} must be 1 or more; leave it out to run all prompts")
    if not prompts:
        raise ValueError(f"{name} contains no prompt, so there is nothing to run")
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(prompts)
    return prompts[:limit]


def _find_malformed_line(file: Path) -> str | None:
    """An error message for the first malformed line of a jsonl file, None where there is none."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix.lower() != ".jsonl":
        return None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            return f"{file}, line {number} is not valid JSON ({error}): {line[:60]!r}"
        if not isinstance(row, dict):
            return f"{file}, line {number} is not a JSON object: {line[:60]!r}"
    return None

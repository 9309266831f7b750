"""What is generated from: prompts of one or more turns, with an id and a task each."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from specdec.utils import embedded

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Prompt:
    """turns: what the user says, one after the other; the model answers in between."""

    id: str
    task: str
    turns: tuple[str, ...]


class Workload(Protocol):
    """Anything with prompts; name its class as `_target_` in a file of conf/workload. `chat_template`: see Dataset."""

    chat_template: bool | None

    def prompts(self) -> list[Prompt]:
        """All of them, in the order that they are run; raises ValueError where there are none."""


@dataclass
class Stdlib:
    """Cuts from modules of Python's standard library that the embedded pair was not trained on.

    limit: how many; None: all 216. shuffle_seed: in another order; None: as they come.
    """

    limit: int | None = None
    shuffle_seed: int | None = None
    chat_template: bool | None = None

    def prompts(self) -> list[Prompt]:
        cuts = [Prompt(cut["id"], cut["id"].rpartition("-")[0], (cut["prompt"],)) for cut in embedded.prompts()]
        return _chosen(cuts, self.limit, self.shuffle_seed, "the stdlib workload")


@dataclass
class Dataset:
    """A local json, jsonl, parquet or text file, or a set on the hub, through `datasets`.

    path: the file, or the set's id. name, split: which part of a set on the hub.
    prompt: the column with the prompt, a text or a list of turns; "text" for a text file, where each line is a prompt.
    template: what is said, with columns in braces ("Question: {question}\\nAnswer:"); the prompt's column alone where it is None.
    id, task: columns that name a prompt and the group it is reported under; numbers, and the file's name, where there are none.
    chat_template: put turns into the tokenizer's chat template; None: where it has one.
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
        seen: set[str] = set()
        for number, prompt in enumerate(prompts, 1):
            if prompt.id in seen:
                raise ValueError(
                    f"{self.path}, row {number}: a second prompt has the id {prompt.id!r}; ids must differ"
                )
            seen.add(prompt.id)
        return _chosen(prompts, self.limit, self.shuffle_seed, self.path)

    def _rows(self) -> Iterable[dict[str, Any]]:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what went wrong is said below, by its line
        file = Path(self.path).expanduser()
        loader = LOADERS.get(file.suffix.lower())
        if not file.is_file():
            if file.exists() or loader is not None or self.path.startswith((".", "/", "~")):
                raise ValueError(
                    f"workload.path={self.path!r} is no file; name a {', '.join(LOADERS)} file or a set on the hub"
                )
            try:
                rows: Iterable[dict[str, Any]] = datasets.load_dataset(self.path, self.name, split=self.split)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"workload.path={self.path!r} is no file here, and no set of that id was loaded: {error}"
                ) from error
            return rows
        if loader is None:
            raise ValueError(f"{self.path} ends in {file.suffix!r}; prompts are read from {', '.join(LOADERS)}")
        if not file.read_bytes().strip():
            return []
        try:
            rows = datasets.load_dataset(loader, data_files=str(file), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(_malformed(file) or f"{self.path} cannot be read: {error.__cause__ or error}") from error
        return [row for row in rows if row["text"].strip()] if loader == "text" else rows

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        where = f"{self.path}, row {number}"
        column = "text" if self.prompt == "prompt" and "text" in row and "prompt" not in row else self.prompt
        value = row.get(column)
        if value is None and self.template is None:
            known = ", ".join(name for name, content in row.items() if content is not None)
            raise ValueError(f"{where} has no {column!r}, only {known}; say which column it is with workload.prompt=…")
        turns: list[Any] = value if isinstance(value, list) else [value]
        if self.template is not None:
            try:
                turns = [self.template.format(**row | {column: turn}) for turn in turns]
            except (KeyError, IndexError) as error:
                raise ValueError(f"{where}: the template wants {error}, which is not among {', '.join(row)}") from error
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise ValueError(
                f"{where}: a prompt is a text, or a list of texts, and not empty; this one is {value!r:.60}"
            )
        stem = Path(self.path).stem
        return Prompt(str(row.get(self.id) or f"{stem}/{number}"), str(row.get(self.task) or stem), tuple(turns))


def _chosen(prompts: list[Prompt], limit: int | None, shuffle_seed: int | None, where: str) -> list[Prompt]:
    if limit is not None and limit < 1:
        raise ValueError(f"workload.limit={limit} must be 1 or more; leave it out to take all prompts")
    if not prompts:
        raise ValueError(f"{where} holds no prompt, so there is nothing to run")
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(prompts)
    return prompts[:limit]


def _malformed(file: Path) -> str | None:
    """What is wrong with the first bad line of a jsonl file, by its number."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix.lower() != ".jsonl":
        return None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            return f"{file}, line {number} is no JSON ({error}): {line[:60]!r}"
        if not isinstance(row, dict):
            return f"{file}, line {number} is no JSON object: {line[:60]!r}"
    return None

"""What an audit has found so far, a line of JSON for each piece of work, so that a run can be stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]


class Evidence:
    """Results by key, kept in a file where there is a folder.

    seconds: the time that all results took, by kind, the first element of a key.
    """

    def __init__(self, header: dict[str, Any], folder: Path | None = None) -> None:
        """Read what an earlier run left. Raises ValueError where the folder holds an audit with another header."""
        self.results: dict[Key, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self._path = None if folder is None else folder / "evidence.jsonl"
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            self._append(header)
            return
        first, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        found = _parse(first)
        if found != json.loads(json.dumps(header)):
            changed = sorted(name for name in header if found is None or found.get(name) != header[name])
            raise ValueError(
                f"{self._path.parent} holds another audit ({', '.join(changed) or 'another version'} differs); choose"
                " an empty folder, or delete it"
            )
        for line in lines:
            if (entry := _parse(line)) is not None:  # a run that was killed leaves half a line
                self._add(tuple(entry["key"]), entry["seconds"], entry["result"])
        if lines and not lines[-1].endswith("\n"):
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, key: Key, seconds: float, result: dict[str, Any]) -> None:
        """Keep a result, on disk at once."""
        self._add(key, seconds, result)
        if self._path is not None:
            self._append({"key": list(key), "seconds": round(seconds, 3), "result": result})

    def of(self, kind: str) -> dict[Key, dict[str, Any]]:
        """The results of one kind, in the order in which they were found."""
        return {key: result for key, result in self.results.items() if key[0] == kind}

    def _add(self, key: Key, seconds: float, result: dict[str, Any]) -> None:
        self.results[key] = result
        self.seconds[key[0]] = self.seconds.get(key[0], 0.0) + seconds

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None

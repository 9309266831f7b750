"""The options that a command line gives to its command, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from specdec_cli import app as commands
from specdec_cli.main import main


def parse(arguments: Sequence[str]) -> SimpleNamespace:
    """Parse a command line. Raises SystemExit with the exit code where it is refused."""
    found: list[SimpleNamespace] = []

    def record(module: str, values: dict[str, Any]) -> int:
        found.append(SimpleNamespace(**values))
        return 0

    with mock.patch.object(commands, "_run", record):
        code = main(list(arguments))
    if code or not found:
        raise SystemExit(code)
    return found[0]

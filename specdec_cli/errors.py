"""How a run of hydra ends where it is complete, but its exit code is not 0."""

from __future__ import annotations


class PromptsFailed(Exception):
    """A run is complete, but some of its prompts have an error instead of a record."""


class NotShown(Exception):
    """An audit is complete, and its certificate printed, but the model is not lossless, or not shown to be."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code

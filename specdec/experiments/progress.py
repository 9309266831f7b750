"""The progress bar of a run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.core.stats import Stats
from specdec.experiments.records import PLAIN, SPECULATIVE


class ProgressBar:
    """Progress of this process' calls, with acceptance and speed so far."""

    def __init__(self, total: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[so_far]}"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, expand=True)
        self.task = self.progress.add_task("warming up", total=total, so_far="")
        self.accepted = self.drafted = 0
        self.tokens: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def describe(self, description: str) -> None:
        """Show what is being done."""
        self.progress.update(self.task, description=description)

    def advance(self, calls: int) -> None:
        self.progress.advance(self.task, calls)

    def count(self, engine: str, stats: Stats, seconds: float) -> None:
        """Add one call to acceptance and speed."""
        self.accepted += stats.num_accepted_draft_tokens
        self.drafted += stats.num_draft_tokens
        self.tokens[engine] = self.tokens.get(engine, 0) + stats.num_emitted_tokens
        self.seconds[engine] = self.seconds.get(engine, 0.0) + seconds
        so_far = [f"{self.accepted / self.drafted:.0%} accepted"] if self.drafted else []
        for name, template in ((SPECULATIVE, "{:.0f} tok/s"), (PLAIN, "plain {:.0f} tok/s")):
            if name in self.tokens:
                so_far.append(template.format(self.tokens[name] / self.seconds[name]))
        self.progress.update(self.task, description="generating", so_far=", ".join(so_far))

"""One text of an enabled model, token by token as it comes, with the origin of each."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from specdec.core.stats import Stats
from specdec.core.steps import RowStep, StepResult
from specdec.generation.inspection import observed_steps
from specdec.utils.text import PieceDecoder
from specdec_cli.setup import Pair, working

WARM_UP_PROMPT = 8  # tokens

STYLES = {"accepted": "green", "recovered": "bold red", "bonus": "bold blue underline", "plain": ""}
MARKS = {"accepted": ("", ""), "recovered": ("⟨", "⟩"), "bonus": ("⟦", "⟧"), "plain": ("", "")}
MEANINGS = {
    "accepted": "the draft's, accepted",
    "recovered": "the target's, after a rejection",
    "bonus": "the target's, after a draft accepted in full",
    "plain": "the target's, where nothing was drafted",
}
Write = Callable[[str, str], None]  # called with a token's text and its origin


@dataclass(frozen=True)
class Answer:
    """A text and how it came about.

    seconds: from the call to its end; first_token_s: to the first token. steps: of the target; none where transformers'
    own loop ran. origins: of each id, as in RowStep.origins().
    """

    text: str
    ids: list[int]
    origins: list[str]
    steps: list[RowStep]
    seconds: float
    first_token_s: float
    is_interrupted: bool

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds

    @property
    def stats(self) -> Stats:
        return Stats.of(self.steps, max((step.requested for step in self.steps), default=0), len(self.steps))

    def summary(self, num_draft_tokens: int | str) -> str:
        """Its figures in one line."""
        line = (
            f"{len(self.ids)} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s, the first after"
            f" {self.first_token_s:.2f} s; "
        )
        length = self.stats.mean_acceptance_length
        line += "nothing was drafted" if length is None else f"mean acceptance length {length:.2f}"
        line += f", {describe_k(num_draft_tokens, self.steps)}"
        return f"interrupted; {line}" if self.is_interrupted else line


def describe_k(num_draft_tokens: int | str, steps: list[RowStep]) -> str:
    """ "K=3", or "K=auto, 4 in 80 % of steps"."""
    if isinstance(num_draft_tokens, int) or not steps:
        return f"K={num_draft_tokens}"
    [(most, count)] = Counter(step.requested for step in steps).most_common(1)
    return f"K={num_draft_tokens}, {most} in {100 * count / len(steps):.0f} % of steps"


class TokenStream:
    """A streamer of generate(): passes on the text of each token, with its origin, in the step that it comes from."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self.ids: list[int] = []
        self.origins: list[str] = []
        self.steps: list[RowStep] = []
        self.first_at: float | None = None
        self._decoder, self._write = PieceDecoder(tokenizer, skip_special_tokens=True), write
        self._to_come: deque[str] = deque()
        self._has_prompt = False

    def observe(self, result: StepResult) -> None:
        """Called with each step, before its ids."""
        for step in filter(None, result.steps):
            self.steps.append(step)
            self._to_come.extend(step.origins())

    def put(self, ids: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.first_at = self.first_at or time.perf_counter()
        self.ids.append(int(ids))
        self.origins.append(self._to_come.popleft() if self._to_come else "plain")
        self._write(self._decoder.add(self.ids[-1]), self.origins[-1])

    def end(self) -> None:
        if rest := self._decoder.flush():
            self._write(rest, self.origins[-1])


def warm_up(pair: Pair, inputs: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Run a short call of the same kind, before which specdec measures step times for automatic K."""
    short = {name: values[:, -WARM_UP_PROMPT:] for name, values in inputs.items()}
    with working("measuring step times"):
        write_answer(pair, short, arguments | {"max_new_tokens": 2}, 0, lambda text, origin: None)


def write_answer(pair: Pair, inputs: dict[str, Tensor], arguments: dict[str, Any], seed: int, write: Write) -> Answer:
    """Generate from ids and mask [1, P] of an enabled model; Ctrl-C ends the text where it is."""
    stream, is_interrupted, model = TokenStream(pair.tokenizer, write), False, pair.model
    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        with observed_steps(model, stream.observe):
            generate: Any = model.generate
            generate(**inputs, **arguments, streamer=stream)
    except KeyboardInterrupt:
        stream.end()
        is_interrupted = True
    seconds = time.perf_counter() - started
    return Answer(
        pair.tokenizer.decode(stream.ids, skip_special_tokens=True),
        stream.ids,
        stream.origins,
        stream.steps,
        seconds,
        (stream.first_at or started + seconds) - started,
        is_interrupted,
    )


def writer(*, shows_drafts: bool) -> Write:
    """What writes an answer to standard output; where it shows drafts, in colours, or in brackets without any."""
    if not shows_drafts:

        def write(text: str, origin: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        return write
    console = Console()
    return lambda text, origin: console.print(marked(text, origin, console), end="", soft_wrap=True)


def marked(text: str, origin: str, console: Console) -> Text:
    """A token's text as its origin is shown, in colour or between marks."""
    core = text.strip()  # the visible part: line breaks and indents stay as they are
    start = text.find(core) if core else 0
    indent, rest = text[:start], text[start + len(core) :]
    if not (console.no_color or console.color_system is None):
        return Text.assemble(indent, (core, STYLES[origin]), rest)
    before, after = MARKS[origin] if text else ("", "")
    return Text(f"{indent}{before}{core}{after}{rest}")


def legend(origins: list[str], console: Console) -> list[Text]:
    """How many tokens each origin has, one line each, marked as in the text."""
    return [
        Text.assemble(marked(origin, origin, console), f" {origins.count(origin)}  {meaning}")
        for origin, meaning in MEANINGS.items()
        if origin in origins
    ]

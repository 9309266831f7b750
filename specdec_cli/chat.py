"""`specdec chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from specdec.runtime.runner import context_of
from specdec_cli.generate import encode_chat
from specdec_cli.options import Options, num_draft_tokens
from specdec_cli.setup import Pair, check_sampling, enable, generation_arguments, load_pair
from specdec_cli.stream import Answer, Write, warm_up, write_answer, writer

HELP = """/reset            forget the conversation
/stats            tokens per second and acceptance, of the last answer and of all
/save FILE        write the conversation as JSON
/set NAME VALUE   change a setting: {settings}
/help             this list
/exit             end; so does Ctrl-D
A message goes on in the next line where its line ends in \\, or up to a line of \"\"\" where it begins with one.
Ctrl-C ends an answer where it is."""


@dataclass(frozen=True)
class Setting:
    """How /set reads a value: convert raises ValueError; low, high: what it must lie between; example: for messages."""

    convert: Callable[[str], Any]
    low: float | None = None
    high: float | None = None
    may_be_none: bool = False
    example: str = "1"

    def parse(self, name: str, text: str) -> Any:
        if self.may_be_none and text == "none":
            return None
        try:
            value = self.convert(text)
        except (ValueError, typer.BadParameter) as error:
            raise ValueError(f"{name} {text!r} is no value such as {self.example}") from error
        if (self.low is not None and not value >= self.low) or (self.high is not None and not value <= self.high):
            limits = f"{self.low:g} or more" if self.high is None else f"{self.low:g} to {self.high:g}"
            raise ValueError(f"{name} {text} must be {limits}")
        return value


SETTINGS = {
    "temperature": Setting(float, low=0),
    "top_p": Setting(float, 0, 1, may_be_none=True),
    "top_k": Setting(int, 1, may_be_none=True),
    "min_p": Setting(float, 0, 1, may_be_none=True),
    "max_new_tokens": Setting(int, 1),
    "seed": Setting(int, 0),
    "num_draft_tokens": Setting(num_draft_tokens, example="3 or auto"),
    "system": Setting(str, may_be_none=True),
}


def run(options: Options) -> int:
    """Read messages and commands until the end of the input."""
    check_sampling(options)
    pair = load_pair(options)
    if getattr(pair.tokenizer, "chat_template", None) is None:
        raise ValueError(f"{options.model} has no chat template; use `specdec generate`, which completes a text")
    enable(pair, options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # input() then has a history and can be edited
    console = Console(stderr=True, highlight=False)
    console.print(f"{options.model}, drafter {options.drafter}; /help lists commands, Ctrl-D ends", soft_wrap=True)
    conversation = Conversation(pair, options, writer(shows_drafts=options.show_drafts), console)
    conversation.warm_up()
    while True:
        try:
            message = read_message(lambda prompt: input(prompt if is_terminal else ""))
            if message == "/exit":
                return 0
            conversation.take(message)
        except EOFError:
            return 0
        except KeyboardInterrupt:  # at the prompt; in an answer it ends that
            console.print("\nCtrl-D or /exit ends the conversation")
        except (ValueError, OSError) as error:
            console.print(f"{' '.join(str(error).split())}", style="red", soft_wrap=True)


def read_message(read_line: Callable[[str], str]) -> str:
    """A message of one line or of several; raises EOFError at the end of the input."""
    line = read_line("> ")
    if line.strip().startswith('"""'):
        lines, line = [], line.strip()[3:]
        while not line.rstrip().endswith('"""'):
            lines.append(line)
            line = read_line("… ")
        lines.append(line.rstrip()[:-3])
        return "\n".join(lines).strip("\n")
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line("… ")
    return "\n".join([*lines, line]).strip()


@dataclass
class Conversation:
    """Messages so far, and the answers' figures. saved: files that this conversation wrote."""

    pair: Pair
    options: Options
    write: Write
    console: Console
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    saved: set[Path] = field(default_factory=set)

    def take(self, message: str) -> None:
        """A message for the model, or a command. Raises ValueError or OSError where it cannot be done."""
        name, _, rest = message.partition(" ")
        commands = {"/reset": self.reset, "/stats": self.show_stats, "/help": self.show_help}
        if name in commands and not rest:
            commands[name]()
        elif name == "/save":
            self.save(rest.strip())
        elif name == "/set":
            self.set(rest.strip())
        elif name.startswith("/") and "/" not in name[1:]:
            raise ValueError(f"{name} is no command; /help lists them")
        elif message:
            self.answer(message)

    def answer(self, message: str) -> None:
        """Write the model's answer; where it cannot be begun, the message is not kept."""
        system = self.options.system
        beginning = [] if system is None else [{"role": "system", "content": system}]
        messages = [*self.messages, {"role": "user", "content": message}]
        inputs = encode_chat(self.pair, beginning + messages)
        length, context = inputs["input_ids"].shape[1], context_of(self.pair.model)
        if context is not None and length >= context:
            raise ValueError(f"{length} tokens do not fit the model's context of {context}; /reset begins anew")
        arguments = generation_arguments(self.options, self.pair.tokenizer)
        if context is not None:
            arguments["max_new_tokens"] = min(arguments["max_new_tokens"], context - length)
        seed = self.options.seed + len(self.answers)
        answer = write_answer(self.pair, inputs, arguments, seed, self.write)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        print("" if answer.text.endswith("\n") else "\n", end="", flush=True)
        if answer.is_interrupted:
            self.console.print("interrupted; what was written stays in the conversation")

    def warm_up(self) -> None:
        """Let step times be measured before a first answer of this kind."""
        inputs = encode_chat(self.pair, [{"role": "user", "content": "Hello"}])
        warm_up(self.pair, inputs, generation_arguments(self.options, self.pair.tokenizer))

    def reset(self) -> None:
        self.messages = []
        self.console.print("the conversation is forgotten")

    def show_help(self) -> None:
        self.console.print(HELP.format(settings=", ".join(SETTINGS)), markup=False)

    def show_stats(self) -> None:
        if not self.answers:
            raise ValueError("there is no answer yet")
        k = self.options.num_draft_tokens
        self.console.print(f"last answer: {self.answers[-1].summary(k)}", soft_wrap=True)
        if len(self.answers) == 1:
            return
        parts = [list(part) for part in zip(*((a.ids, a.origins, a.steps) for a in self.answers), strict=True)]
        ids, origins, steps = ([item for part in column for item in part] for column in parts)
        seconds = sum(answer.seconds for answer in self.answers)
        first = sum(answer.first_token_s for answer in self.answers) / len(self.answers)
        whole = Answer("", ids, origins, steps, seconds, first, is_interrupted=False)
        self.console.print(f"all {len(self.answers)} answers: {whole.summary(k)}", soft_wrap=True)

    def save(self, name: str) -> None:
        """Write the messages; a file that this conversation did not write is left as it is."""
        if not name:
            raise ValueError("/save takes a file: /save conversation.json")
        file = Path(name).expanduser()
        with file.open("w" if file in self.saved else "x", encoding="utf-8") as output:
            json.dump(self.messages, output, ensure_ascii=False, indent=1)
        self.saved.add(file)
        self.console.print(f"{len(self.messages)} messages written to {file}", soft_wrap=True)

    def set(self, text: str) -> None:
        """Change a setting, or show all."""
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        if not text:
            for name in SETTINGS:
                self.console.print(f"{name} {getattr(self.options, name)}", soft_wrap=True)
            return
        if name not in SETTINGS or not value.strip():
            raise ValueError(f"/set takes one of {', '.join(SETTINGS)}, and a value: /set temperature 0.7")
        setattr(self.options, name, SETTINGS[name].parse(name, value.strip()))
        if name == "num_draft_tokens":
            enable(self.pair, self.options)
        if name in ("num_draft_tokens", "temperature"):
            self.warm_up()
        self.console.print(f"{name} {getattr(self.options, name)}", soft_wrap=True)

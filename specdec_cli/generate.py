"""`specdec generate MODEL [PROMPT]`: one text, streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from torch import Tensor

from specdec.core.stats import Stats
from specdec_cli.options import Options
from specdec_cli.setup import Pair, check_sampling, enable, generation_arguments, load_pair
from specdec_cli.stream import Answer, legend, warm_up, write_answer, writer

INTERRUPTED = 130


def run(options: Options) -> int:
    """Write one text; 130 where it was interrupted."""
    check_sampling(options)
    prompt = read_prompt(options)
    pair = load_pair(options)
    inputs = encode(pair, prompt, options)
    enable(pair, options)
    arguments = generation_arguments(options, pair.tokenizer)
    if options.stop:
        arguments |= {"stop_strings": options.stop, "tokenizer": pair.tokenizer}
    warm_up(pair, inputs, arguments)
    write = (lambda text, origin: None) if options.json else writer(shows_drafts=options.show_drafts)
    answer = write_answer(pair, inputs, arguments, options.seed, write)
    if options.json:
        print(json.dumps(make_report(options, pair, prompt, inputs, answer), ensure_ascii=False))
    else:
        if not answer.text.endswith("\n"):
            print(flush=True)
        console = Console(stderr=True, highlight=False)
        if options.show_drafts:
            for line in legend(answer.origins, console):
                console.print(line)
        console.print(answer.summary(options.num_draft_tokens), soft_wrap=True)
    return INTERRUPTED if answer.is_interrupted else 0


def read_prompt(options: Options) -> str:
    """The prompt: the argument, a file's, or what standard input holds. Raises ValueError where none is given."""
    if options.prompt is not None and options.file is not None:
        raise ValueError("PROMPT and --file are both given; leave one out")
    if options.file is not None:
        try:
            prompt = Path(options.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--file {options.file} is no text in UTF-8: {error}") from error
    elif options.prompt is not None and options.prompt != "-":
        prompt = options.prompt
    elif options.prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt is given; write it behind MODEL ("…"), or use --file FILE or standard input')
    else:
        prompt = sys.stdin.read()
    if options.file is not None or options.prompt in (None, "-"):
        prompt = prompt.removesuffix("\n")  # of the last line
    if not prompt.strip():
        raise ValueError("the prompt is empty; give it at least one word")
    return str(prompt)


def encode(pair: Pair, prompt: str, options: Options) -> dict[str, Tensor]:
    """The ids and mask [1, P] of a prompt, by the chat template where the tokenizer has one and --raw is not given."""
    has_template = getattr(pair.tokenizer, "chat_template", None) is not None
    if options.system is not None and (options.raw or not has_template):
        why = "--raw leaves the chat template out" if options.raw else f"{options.model} has no chat template"
        raise ValueError(f"--system needs a chat template, but {why}; write the instruction into the prompt")
    if options.raw or not has_template:
        return dict(pair.tokenizer(prompt, return_tensors="pt").to(pair.model.device))
    messages = [{"role": "user", "content": prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return encode_chat(pair, messages)


def encode_chat(pair: Pair, messages: list[dict[str, str]]) -> dict[str, Tensor]:
    """The ids and mask [1, P] of a conversation. Raises ValueError where the chat template refuses it."""
    try:
        inputs = pair.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    return dict(inputs.to(pair.model.device))


def make_report(options: Options, pair: Pair, prompt: str, inputs: dict[str, Tensor], answer: Answer) -> dict[str, Any]:
    """What --json prints."""
    stats: Stats = answer.stats
    return {
        "model": options.model,
        "drafter": options.drafter,
        "num_draft_tokens": options.num_draft_tokens,
        "dtype": str(pair.model.dtype).removeprefix("torch."),
        "device": options.device,
        "temperature": options.temperature,
        "seed": options.seed,
        "prompt": prompt,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "text": answer.text,
        "tokens": len(answer.ids),
        "is_interrupted": answer.is_interrupted,
        "seconds": answer.seconds,
        "first_token_s": answer.first_token_s,
        "tokens_per_second": answer.tokens_per_second,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "tokens_per_step": stats.tokens_per_step,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_histogram": stats.acceptance_histogram,
    }

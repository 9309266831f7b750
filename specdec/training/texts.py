"""The texts that a drafter is trained on: prompts and what the target answers, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import specdec


@dataclass(frozen=True)
class Text:
    """ids: a prompt and the answer behind it. num_prompt_ids: of them, the prompt's."""

    ids: list[int]
    num_prompt_ids: int


def write_texts(
    target: PreTrainedModel,
    prompts: Sequence[list[int]],
    call: dict[str, Any],
    batch_size: int,
    seed: int,
    file: Path,
    on_texts: Callable[[int], None],
) -> list[Text]:
    """Let the target answer the prompts: -> their texts, in order; those that the file holds are not written again.

    call: arguments of generate(). on_texts: called with how many texts there are so far. The file has a line for each
    batch, and a first line that names the prompts and the call: ValueError where it is of others.
    """
    origin = {"prompts": _digest(prompts), "call": call, "batch_size": batch_size, "seed": seed}
    texts = _read(file, origin)
    on_texts(len(texts))
    if len(texts) == len(prompts):
        return texts
    # sampled texts plainly: drafts gain little there, and a resumed file holds what one of a single run does
    specdec.enable(target, "none" if call["do_sample"] else "suffix")
    try:
        with file.open("a", encoding="utf-8") as output:
            if output.tell() == 0:
                output.write(json.dumps(origin) + "\n")
            for at in range(len(texts), len(prompts), batch_size):
                torch.manual_seed(seed + at)
                answers = _answers(target, prompts[at : at + batch_size], call)
                lines = [
                    Text(prompt + answer, len(prompt))
                    for prompt, answer in zip(prompts[at : at + batch_size], answers, strict=True)
                ]
                output.write(json.dumps([[text.num_prompt_ids, text.ids] for text in lines]) + "\n")
                output.flush()
                texts += lines
                on_texts(len(texts))
    finally:
        specdec.disable(target)
    return texts


def _read(file: Path, origin: dict[str, Any]) -> list[Text]:
    """The texts of a file; one that was cut off within a line is cut off before it."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    if not lines:
        return []
    if json.loads(lines[0]) != json.loads(json.dumps(origin)):
        raise ValueError(f"{file} holds answers to other prompts or of another call; name another folder, or delete it")
    return [Text(ids, count) for line in lines[1:] for count, ids in json.loads(line)]


def _answers(target: PreTrainedModel, prompts: Sequence[list[int]], call: dict[str, Any]) -> list[list[int]]:
    """What the target writes behind each prompt, up to its first stop id, which is included."""
    width = max(map(len, prompts))
    pad = target.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=target.device)
    model: Any = target
    rows = model.generate(ids, attention_mask=mask, pad_token_id=pad, **call)
    stops = target.generation_config.eos_token_id
    stop_ids = {stops} if isinstance(stops, int) else set(stops or ())
    answers = []
    for row in rows[:, width:].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in stop_ids), len(row))
        answers.append(row[:end])
    return answers


def _digest(prompts: Sequence[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32]

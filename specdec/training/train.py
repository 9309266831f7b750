"""Training of a drafter on texts that its target writes: `specdec train-drafter`."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.experiments.run import device_of
from specdec.experiments.workloads import Prompt, encode, uses_chat_template
from specdec.runtime.loading import load_tokenizer
from specdec.training.batch import Batch, Trainee, batch_of
from specdec.training.config import TrainConfig
from specdec.training.texts import Text, write_texts
from specdec.utils.provenance import provenance

MIN_LEARNING_RATE = 0.1  # of the largest, at the end
MAX_GRADIENT = 0.5
LINES = 20  # of progress in a file
SIMILAR = 16  # batches of texts that are sorted by length together, so that little is padding
TEXTS, CHECKPOINT, DRAFTER, CURVE, HELD_OUT = "texts.jsonl", "checkpoint", "drafter", "training.json", "held_out.jsonl"


def train(config: TrainConfig, values: dict[str, Any], console: Console) -> dict[str, Any]:
    """Run the training, or go on with it: -> its settings and the acceptance after each epoch, as training.json.

    values: the config as plain values, which a folder's earlier run must have had too.
    """
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    config.folder.mkdir(parents=True, exist_ok=True)
    curve = _started(config.folder, values)
    tokenizer = load_tokenizer(config.target.path)
    as_chat = uses_chat_template(config.workload, tokenizer)
    prompts = config.workload.prompts()
    is_held_out = _held_out(config, len(prompts))
    rows = [encode(prompt.turns[:1], [], tokenizer, as_chat) for prompt in prompts]
    if accelerator.is_main_process:
        kept = zip(prompts, rows, is_held_out, strict=True)
        _write_held_out(config, [(prompt, len(ids)) for prompt, ids, is_one in kept if is_one])
    if is_finished(config):
        return curve
    rows = [ids[-config.max_prompt_tokens :] for ids in rows]
    target = config.target.load(device_of(config.target), config.quant)
    config.train.check_target(config, target)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        written = _texts(config, target, rows, accelerator, progress)
        held_out, texts = (
            [text for text, is_one in zip(written, is_held_out, strict=True) if is_one == held]
            for held in (True, False)
        )
        torch.manual_seed(config.seed)  # so that a drafter begins alike whether texts were written before or not
        trainee: Trainee = config.train.start(config, target, texts)
        module = trainee.module
        steps_per_epoch = math.ceil(len(texts) / (config.batch_size * accelerator.num_processes))
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, steps_per_epoch * config.epochs))
        module, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
        accelerator.register_save_state_pre_hook(_leave_out_frozen)
        if curve["epochs"]:
            _load_state(_checkpoint(config, len(curve["epochs"])), module, accelerator)
        task = progress.add_task("training", total=steps_per_epoch * config.epochs)
        progress.update(task, completed=steps_per_epoch * len(curve["epochs"]))
        for epoch in range(len(curve["epochs"]), config.epochs):
            loss = 0.0
            for batch in _batches(config, target, trainee.feature_layers, texts, accelerator, epoch):
                step_loss, _ = module(batch)
                optimizer.zero_grad()
                accelerator.backward(step_loss)
                accelerator.clip_grad_norm_(trained, MAX_GRADIENT)
                optimizer.step()
                schedule.step()
                last_loss = float(step_loss.detach())
                loss += last_loss
                progress.update(task, advance=1, description=f"epoch {epoch + 1}, loss {last_loss:.2f}")
                _print_line(progress, task)
            held_out_batches = _batches(config, target, trainee.feature_layers, held_out, accelerator, None)
            acceptance = _acceptance(module, held_out_batches, accelerator)
            curve["epochs"].append({"loss": round(loss / steps_per_epoch, 4), "acceptance": acceptance})
            accelerator.save_state(str(_checkpoint(config, epoch + 1)))
            if accelerator.is_main_process:
                trainee.save(config.folder / DRAFTER)
                _write_json(config.folder / CURVE, curve)
                shutil.rmtree(_checkpoint(config, epoch), ignore_errors=True)
                by_position = ", ".join(f"{value:.1%}" for value in acceptance)
                progress.console.print(f"epoch {epoch + 1}: loss {loss / steps_per_epoch:.2f}, accepted {by_position}")
    return curve


def is_finished(config: TrainConfig) -> bool:
    """Whether the folder holds a training that has ended, and its drafter."""
    file = config.folder / CURVE
    if not file.is_file() or not (config.folder / DRAFTER).is_dir():
        return False
    num_epochs = len(json.loads(file.read_text(encoding="utf-8"))["epochs"])
    return num_epochs >= config.epochs


def show(curve: dict[str, Any], folder: Path, console: Console) -> None:
    """A table of the held-out acceptance after each epoch, and where the drafter is."""
    table = Table(title="held-out acceptance by position of the draft", title_justify="left")
    table.add_column("epoch", justify="right")
    table.add_column("loss", justify="right")
    for position in range(len(curve["epochs"][0]["acceptance"])):
        table.add_column(str(position + 1), justify="right")
    table.add_column("tokens a step", justify="right")
    for number, epoch in enumerate(curve["epochs"], 1):
        acceptance = epoch["acceptance"]
        length = 1 + sum(math.prod(acceptance[: count + 1]) for count in range(len(acceptance)))
        rates = [f"{value:.1%}" for value in acceptance]
        table.add_row(str(number), f"{epoch['loss']:.2f}", *rates, f"{length:.2f}")
    console.print(table)
    console.print(f"drafter: {folder / DRAFTER}", soft_wrap=True)


def _held_out(config: TrainConfig, num_prompts: int) -> list[bool]:
    """Which of the prompts are held out: evenly spread, since prompts of a kind may follow each other."""
    count = max(1, round(config.held_out * num_prompts))
    if count >= num_prompts:
        raise ValueError(f"prompts: {num_prompts}, of which {count} would be held out; give more of them")
    chosen = {index * num_prompts // count for index in range(count)}
    return [index in chosen for index in range(num_prompts)]


def _write_held_out(config: TrainConfig, prompts: Sequence[tuple[Prompt, int]]) -> None:
    """Write held-out prompts for the run at the end, as a workload reads them.

    prompts: each with its number of ids. Those that the training reads whole are taken, if there are any, evenly
    spread.
    """
    short = [prompt for prompt, num_ids in prompts if num_ids <= config.max_prompt_tokens]
    chosen = short or [prompt for prompt, _ in prompts]
    count = min(config.report_prompts, len(chosen))
    chosen = [chosen[index * len(chosen) // count] for index in range(count)]
    rows = [{"id": prompt.id, "task": prompt.task, "prompt": prompt.turns[0]} for prompt in chosen]
    (config.folder / HELD_OUT).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _load_state(checkpoint: Path, module: nn.Module, accelerator: Accelerator) -> None:
    """Go on from a checkpoint. Raises ValueError where it lacks a tensor that is trained."""
    accelerator.load_state(str(checkpoint), strict=False)  # what is frozen is not in it
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        trained = {name for name, value in module.named_parameters() if value.requires_grad}
        prefixes = ("", "module.")  # of a module that is shared by several processes
        if missing := [name for name in trained if not any(prefix + name in file.keys() for prefix in prefixes)]:  # noqa: SIM118
            raise ValueError(f"{checkpoint} is damaged: it lacks {', '.join(sorted(missing)[:3])}")


def _checkpoint(config: TrainConfig, epoch: int) -> Path:
    """Where the state after so many epochs is; there is one that training.json names, and maybe a later one."""
    return config.folder / f"{CHECKPOINT}-{epoch}"


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Keep what is not trained, as the target's embedding, out of a checkpoint."""
    for model, tensors in zip(models, weights, strict=True):
        for name in [name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad]:
            tensors.pop(name, None)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _started(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The training.json of an earlier run in the folder, or a new one. ValueError where that had other settings."""
    settings = {name: value for name, value in values.items() if name not in ("folder", "report_prompts")}
    file = folder / CURVE
    if not file.is_file():
        return {"settings": settings, "provenance": provenance("cpu"), "epochs": []}
    curve: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    before, now = curve["settings"], json.loads(json.dumps(settings))
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        name = changed[0]
        raise ValueError(
            f"{folder} holds a training with {name}={before.get(name)}, and now {name}={now.get(name)}; name another"
            " folder, or delete it"
        )
    return curve


def _texts(
    config: TrainConfig, target: PreTrainedModel, prompts: list[list[int]], accelerator: Accelerator, progress: Progress
) -> list[Text]:
    """All texts; the main process writes what is missing while the others wait."""
    task = progress.add_task("texts", total=len(prompts))

    def on_texts(count: int) -> None:
        progress.update(task, completed=count)
        _print_line(progress, task)

    with accelerator.main_process_first():
        return write_texts(
            target,
            prompts,
            config.sampling.call(),
            config.answer_batch,
            config.seed,
            config.folder / TEXTS,
            on_texts,
        )


def _print_line(progress: Progress, number: TaskID) -> None:
    """Where no bar can be drawn, as in a file, print a line for each of LINES parts of a task."""
    task = progress.tasks[number]
    part = max(1, round((task.total or 1) / LINES))
    if progress.console.is_terminal or task.completed % part:
        return
    left = "" if task.time_remaining is None else f", {task.time_remaining / 60:.0f} minutes left"
    progress.console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}{left}")


def _schedule(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of a step, as a fraction of the largest."""
    warmup = max(1, round(config.warmup * num_steps))

    def fraction(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        return MIN_LEARNING_RATE + (1 - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2

    return fraction


def _batches(
    config: TrainConfig,
    target: PreTrainedModel,
    feature_layers: Sequence[int],
    texts: Sequence[Text],
    accelerator: Accelerator,
    epoch: int | None,
) -> Iterator[Batch]:
    """The batches of this process; epoch: whose order of the texts, None for the given order."""
    stride = config.batch_size * accelerator.num_processes
    for chosen in _order(config.seed, texts, stride, epoch):
        own = chosen[accelerator.process_index :: accelerator.num_processes]
        rows = [texts[index] for index in own or chosen[:1]]  # each process takes part in every step
        batch = batch_of(rows, target, feature_layers)
        is_counted = bool(own) or epoch is not None
        yield batch if is_counted else replace(batch, is_answer=torch.zeros_like(batch.is_answer))


def _order(seed: int, texts: Sequence[Text], stride: int, epoch: int | None) -> list[list[int]]:
    """Indices of the texts of each step, `stride` of them: shuffled, with texts of about one length together."""
    order = list(range(len(texts)))
    if epoch is None:
        return [order[at : at + stride] for at in range(0, len(order), stride)]
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    for at in range(0, len(order), SIMILAR * stride):
        part = slice(at, at + SIMILAR * stride)
        order[part] = sorted(order[part], key=lambda index: len(texts[index].ids))
    steps = [order[at : at + stride] for at in range(0, len(order), stride)]
    generator.shuffle(steps)
    return steps


@torch.no_grad()
def _acceptance(module: Any, batches: Iterator[Batch], accelerator: Accelerator) -> list[float]:
    """The greedy acceptance of each position of a draft after those before it, over all processes."""
    module.eval()
    counts: list[Tensor] = [module(batch)[1] for batch in batches]
    module.train()
    total: Any = accelerator.reduce(torch.stack(counts).sum(0))
    return [round(float(right / max(tried, 1)), 4) for tried, right in total.tolist()]

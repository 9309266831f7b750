"""Training of an EAGLE-3 head on texts that its target writes: `specdec train-drafter`."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from specdec.drafters.eagle3 import Eagle3Head, Eagle3Settings
from specdec.drafters.head_checkpoint import EAGLE3
from specdec.experiments.run import device_of
from specdec.experiments.workloads import encode, uses_chat_template
from specdec.runtime.loading import load_tokenizer
from specdec.training.config import TrainConfig
from specdec.training.eagle3 import Batch, TrainingTimeTest
from specdec.training.texts import Text, write_texts
from specdec.utils.provenance import provenance

MAX_DRAFT_IDS = 32_000
SHARED = ("embed_tokens.", "embedding_rows.")  # tensors of a head that are its target's
MIN_LEARNING_RATE = 0.1  # of the largest, at the end
MAX_GRADIENT = 0.5
SPECULATORS_VERSION = "0.9.0"  # whose layout a head is saved in
TEXTS, CHECKPOINT, HEAD, CURVE = "texts.jsonl", "checkpoint", "head", "training.json"


def train(config: TrainConfig, values: dict[str, Any], console: Console) -> dict[str, Any]:
    """Run the training, or go on with it: -> its settings and the acceptance after each epoch, as training.json.

    values: the config as plain values, which a folder's earlier run must have had too.
    """
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    config.folder.mkdir(parents=True, exist_ok=True)
    curve = _started(config.folder, values)
    target = config.target.load(device_of(config.target), config.quant)
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    if any(not 0 <= layer < num_layers for layer in config.feature_layers or ()):
        raise ValueError(
            f"feature_layers={list(config.feature_layers or ())}: the hidden states of this target are 0 …"
            f" {num_layers - 1}"
        )
    tokenizer = load_tokenizer(config.target.path)
    as_chat = uses_chat_template(config.workload, tokenizer)
    prompts = [
        encode(prompt.turns[:1], [], tokenizer, as_chat)[-config.max_prompt_tokens :]
        for prompt in config.workload.prompts()
    ]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        texts = _texts(config, target, prompts, accelerator, progress)
        num_held_out = max(1, round(config.held_out * len(texts)))
        if num_held_out >= len(texts):
            raise ValueError(f"prompts: {len(texts)}, of which {num_held_out} would be held out; give more of them")
        held_out, texts = texts[:num_held_out], texts[num_held_out:]
        head = new_head(config, target, texts)
        module = TrainingTimeTest(head, config.ttt_steps, config.step_decay)
        steps_per_epoch = math.ceil(len(texts) / (config.batch_size * accelerator.num_processes))
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, steps_per_epoch * config.epochs))
        module, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
        if curve["epochs"]:
            accelerator.load_state(str(_checkpoint(config, len(curve["epochs"]))))
        task = progress.add_task("training", total=steps_per_epoch * config.epochs)
        progress.update(task, completed=steps_per_epoch * len(curve["epochs"]))
        for epoch in range(len(curve["epochs"]), config.epochs):
            loss = 0.0
            for batch in _batches(config, target, texts, accelerator, epoch):
                step_loss, _ = module(batch)
                optimizer.zero_grad()
                accelerator.backward(step_loss)
                accelerator.clip_grad_norm_(trained, MAX_GRADIENT)
                optimizer.step()
                schedule.step()
                last_loss = float(step_loss.detach())
                loss += last_loss
                progress.update(task, advance=1, description=f"epoch {epoch + 1}, loss {last_loss:.2f}")
            acceptance = _held_out_acceptance(config, target, module, held_out, accelerator)
            curve["epochs"].append({"loss": round(loss / steps_per_epoch, 4), "acceptance": acceptance})
            accelerator.save_state(str(_checkpoint(config, epoch + 1)))
            if accelerator.is_main_process:
                save_head(head, target, config, config.folder / HEAD)
                _write_json(config.folder / CURVE, curve)
                shutil.rmtree(_checkpoint(config, epoch), ignore_errors=True)
                by_position = ", ".join(f"{value:.1%}" for value in acceptance)
                progress.console.print(f"epoch {epoch + 1}: loss {loss / steps_per_epoch:.2f}, accepted {by_position}")
    return curve


def show(curve: dict[str, Any], folder: Path, console: Console) -> None:
    """A table of the held-out acceptance after each epoch, and where the head is."""
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
    console.print(f"head: {folder / HEAD}", soft_wrap=True)


def new_head(config: TrainConfig, target: PreTrainedModel, texts: Sequence[Text]) -> Eagle3Head:
    """A head in float32 that reads the target's embedding and drafts the most frequent ids of the texts.

    Its output layer begins as the target's, for these ids; as the target's embedding where that is in 8 or 4 bits. The
    rest is random.
    """
    text = target.config.get_text_config(decoder=True)
    vocab_size = int(text.vocab_size)
    heads = int(text.num_attention_heads)
    layer = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=config.intermediate_size or getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        tie_word_embeddings=False,
        rope_parameters=_rope_parameters(text),
    )
    feature_layers = config.feature_layers or _default_layers(target)
    num_ids = min(config.draft_vocab_size or MAX_DRAFT_IDS, vocab_size)
    settings = Eagle3Settings(
        tuple(feature_layers), num_ids, text.hidden_size, norm_output=config.norm_output, fc_norm=config.fc_norm
    )
    head = Eagle3Head(layer, settings, owns_embedding=False)
    counts = Counter(token for one in texts for token in one.ids)
    frequent = sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:num_ids]
    ids = torch.tensor(sorted(frequent))
    head.d2t = ids - torch.arange(num_ids)
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    embed = target.get_input_embeddings()
    output: Any = getattr(getattr(target, "lm_head", None), "weight", None)
    shape = vocab_size, text.hidden_size
    is_dense = isinstance(output, Tensor) and output.is_floating_point() and tuple(output.shape) == shape
    with torch.no_grad():
        rows = output[ids.to(target.device)] if is_dense else embed(ids.to(target.device))
        head.lm_head.weight.copy_(rows.float())
    module: nn.Module = head
    module.to(target.device)
    head.share(target)
    embed.requires_grad_(False)
    head.train(True)
    return head


def save_head(head: Eagle3Head, target: PreTrainedModel, config: TrainConfig, folder: Path) -> None:
    """Write the head in the layout of the speculators library, in bfloat16 and without the target's embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(head.settings)
    layers = {name: value for name, value in head.config.to_diff_dict().items() if name != "transformers_version"}
    content = {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": settings.pop("draft_vocab_size"),
        "eagle_aux_hidden_state_layer_ids": list(settings.pop("feature_layers")),
        **settings,
        "speculators_config": {
            "algorithm": EAGLE3,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.ttt_steps}],
            "verifier": {
                "architectures": list(target.config.architectures or ()),
                "name_or_path": config.target.path,
            },
        },
        "speculators_model_type": EAGLE3,
        "speculators_version": SPECULATORS_VERSION,
        "tie_word_embeddings": False,
        "transformer_layer_config": layers,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in head.state_dict().items()
        if not name.startswith(SHARED)
    }
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    tensors["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    tensors["t2d"][ids] = True
    save_file(tensors, folder / "model.safetensors")


def _checkpoint(config: TrainConfig, epoch: int) -> Path:
    """Where the state after so many epochs is; there is one that training.json names, and maybe a later one."""
    return config.folder / f"{CHECKPOINT}-{epoch}"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _started(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The training.json of an earlier run in the folder, or a new one. ValueError where that had other settings."""
    settings = {name: value for name, value in values.items() if name != "folder"}
    file = folder / CURVE
    if not file.is_file():
        return {"settings": settings, "provenance": provenance("cpu"), "epochs": []}
    curve: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if curve["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{folder} holds a training with other settings; name another folder, or delete it")
    return curve


def _texts(
    config: TrainConfig, target: PreTrainedModel, prompts: list[list[int]], accelerator: Accelerator, progress: Progress
) -> list[Text]:
    """All texts; the main process writes what is missing while the others wait."""
    task = progress.add_task("texts", total=len(prompts))
    with accelerator.main_process_first():
        return write_texts(
            target,
            prompts,
            config.sampling.call(),
            config.answer_batch,
            config.seed,
            config.folder / TEXTS,
            lambda count: progress.update(task, completed=count),
        )


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any] | None:
    """The target's rotary embedding, where it has one for all layers."""
    parameters = getattr(text, "rope_parameters", None)
    return parameters if parameters and "rope_type" in parameters else None


def _default_layers(target: PreTrainedModel) -> list[int]:
    """An early, a middle and a late hidden state of the target."""
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return sorted({min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)})


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
    config: TrainConfig, target: PreTrainedModel, texts: Sequence[Text], accelerator: Accelerator, epoch: int | None
) -> Iterator[Batch]:
    """The batches of this process; epoch: whose order of the texts, None for the given order."""
    order = list(range(len(texts)))
    if epoch is not None:
        random.Random(f"{config.seed}/{epoch}").shuffle(order)
    stride = config.batch_size * accelerator.num_processes
    for at in range(0, len(order), stride):
        chosen = order[at : at + stride][accelerator.process_index :: accelerator.num_processes]
        rows = [texts[index] for index in chosen or order[:1]]  # each process takes part in every step
        yield _batch(rows, target, config)


@torch.no_grad()
def _batch(rows: Sequence[Text], target: PreTrainedModel, config: TrainConfig) -> Batch:
    """Texts with what the target makes of them."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=target.device)
    columns = torch.arange(width, device=target.device)
    first = torch.tensor([row.num_prompt_ids for row in rows], device=target.device)[:, None]
    end = torch.tensor([len(row.ids) for row in rows], device=target.device)[:, None]
    output = target(input_ids=ids, attention_mask=(columns < end).long(), output_hidden_states=True, use_cache=False)
    layers = config.feature_layers or _default_layers(target)
    features = torch.stack([output.hidden_states[layer] for layer in layers], dim=2).float()
    return Batch(ids, (columns >= first) & (columns < end), features, output.logits.float())


def _held_out_acceptance(
    config: TrainConfig, target: PreTrainedModel, module: Any, texts: Sequence[Text], accelerator: Accelerator
) -> list[float]:
    """The greedy acceptance of each position of a draft after those before it, over all processes."""
    module.eval()
    with torch.no_grad():
        counts: list[Tensor] = [module(batch)[1] for batch in _batches(config, target, texts, accelerator, None)]
    module.train()
    total: Any = accelerator.reduce(torch.stack(counts).sum(0))
    return [round(float(right / max(tried, 1)), 4) for tried, right in total.tolist()]

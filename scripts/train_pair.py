"""Train the embedded pair: a small Llama target and a draft distilled from it, on this Python's standard library.

    python scripts/train_pair.py --output build/pair                 # about 90 minutes on two CPU cores
    python scripts/train_pair.py --output build/pair --device cuda --target-minutes 15 --draft-minutes 8
    python scripts/train_pair.py --output build/pair --only card     # measure again, write the model cards

1. `tokenizer`  byte-level BPE of 4096 on the training modules
2. `original`   the target in full precision: deep and thin, because on a CPU a small model's forward costs by its depth
3. `draft`      the original's embeddings and its first and last layer, distilled: forward KL to the original's
                distribution, on library text and on text that the original generated (what a draft sees at run time)
4. `target`     the original in 4 bits, as it ships; the first layer, which would cause most of the error, is kept
5. `card`       perplexities, agreement along the target's greedy output, expected acceptance, on held-out modules

Some modules (and their tests) are held out; prompts cut from them ship as `prompts.jsonl`, so that runs compare across
Python versions. Schedules follow wall time: a slower machine trains on fewer tokens and still ends with a decayed
learning rate.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import specdec  # noqa: F401  # so that transformers reads its 4-bit checkpoints
from specdec_cli.main import main as specdec_command

STAGES = ("tokenizer", "original", "draft", "target", "card")
QUANTIZATION = ["--group-size", "64", "--skip", "model.layers.0"]
VOCAB_SIZE = 4096
CONTEXT = 1024
LENGTH = 512  # tokens a training window; the target's first part trains on half of that, which is faster
TOKENS_PER_STEP = 4096
HELD_OUT = (
    "argparse", "bisect", "calendar", "contextlib", "csv", "fractions", "graphlib", "heapq", "imaplib", "mailbox",
    "nntplib", "queue", "sched", "shelve", "shlex", "statistics", "string", "textwrap", "timeit", "wave",
    "xdrlib", "zipapp",
)  # fmt: skip
# Generated tables and near-copies of other text: they teach a small model nothing.
LEFT_OUT = (
    "encodings",
    "pydoc_data",
    "__pycache__",
    "site-packages",
    "idle_test",
    "turtledemo",
    "config-3",
    "cjkencodings",
)
PROMPTS_PER_MODULE = 12
PROMPT_CHARS = 480


def stdlib_modules() -> dict[str, str]:
    """Source text by path relative to the standard library, sorted; generated and binary-like files left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part.startswith(LEFT_OUT) for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and 200 < len(text) < 400_000:
            sources[relative.as_posix()] = text
    return sources


def is_held_out(path: str) -> bool:
    """True for a held-out module, for its tests, and for the files of a held-out package."""
    parts = Path(path).with_suffix("").parts
    return any(part.removeprefix("test_") in HELD_OUT for part in parts)


def held_out_prompts(sources: dict[str, str]) -> list[dict[str, str]]:
    """A few cuts from each held-out module: the text up to a line end, starting at a line start, evenly spread."""
    prompts = []
    for module in HELD_OUT:
        text = sources.get(f"{module}.py")
        if text is None:
            continue
        for index in range(PROMPTS_PER_MODULE):
            start = text.find("\n", (len(text) - 3 * PROMPT_CHARS) * (index + 1) // (PROMPTS_PER_MODULE + 1)) + 1
            end = text.find("\n", start + PROMPT_CHARS) + 1
            if start and end:
                prompts.append({"id": f"{module}-{index}", "task": "stdlib", "prompt": text[start:end]})
    return prompts


def train_tokenizer(texts: list[str], output: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=specials[0],
        pad_token=specials[1],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(output / "original")
    fast.save_pretrained(output / "draft")
    return fast


def model_config(num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
    )


class Windows:
    """Random windows of a token stream: next(windows) -> ids [batch, length + 1]."""

    def __init__(self, stream: Tensor, length: int, device: str, seed: int, tokens: int = TOKENS_PER_STEP):
        self.stream, self.batch, self.length, self.device = stream, tokens // length, length, device
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        starts = torch.randint(len(self.stream) - self.length - 1, (self.batch, 1), generator=self.generator)
        return self.stream[starts + torch.arange(self.length + 1)].to(self.device)


class Trainer:
    """Muon for matrices, AdamW for embeddings and norms; warm-up, constant, then linear decay to 0, by wall time."""

    def __init__(self, model: LlamaForCausalLM, minutes: float, lr: float):
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = [muon, adamw]
        self.model, self.seconds, self.lr = model, minutes * 60, lr
        self.tokens, self.steps, self.started = 0, 0, 0.0
        self.smoothed: float | None = None

    @property
    def progress(self) -> float:
        """Share of the time that has passed since the first step, which compiles."""
        return 0.0 if self.steps == 0 else (time.monotonic() - self.started) / self.seconds

    def step(self, loss: Tensor, num_tokens: int) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = min(1.0, (self.steps + 1) / 50, (1.0 - self.progress) / 0.5)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * max(scale, 0.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.steps == 0:
            self.started = time.monotonic()
        self.steps += 1
        self.tokens += num_tokens
        value = loss.item()
        self.smoothed = value if self.smoothed is None else 0.97 * self.smoothed + 0.03 * value
        if self.steps % 25 == 0:
            rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
            print(
                f"  step {self.steps:5d}  {min(self.progress, 1.0):4.0%}  loss {self.smoothed:.3f}"
                f"  {self.tokens / 1e6:6.2f}M tokens  {rate:,.0f} tok/s",
                flush=True,
            )


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def distillation_loss(draft: LlamaForCausalLM, ids: Tensor, target_logits: Tensor) -> Tensor:
    """Forward KL(p || q) up to p's entropy, plus a little of total variation: 1 - TV is the acceptance rate itself."""
    draft_log_probs = draft(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
    target_probs = target_logits.float().softmax(-1)
    cross_entropy = -(target_probs * draft_log_probs).sum(-1).mean()
    total_variation = 0.5 * (target_probs - draft_log_probs.exp()).abs().sum(-1).mean()
    return cross_entropy + total_variation


def train_target(stream: Tensor, output: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(num_layers=args.target_layers)).to(args.device)
    model.set_attn_implementation("eager")  # compiled, it is faster than the CPU's flash attention at this length
    print(f"target: {model.num_parameters() / 1e6:.2f}M parameters, {args.target_minutes:g} minutes", flush=True)
    trainer = Trainer(model, args.target_minutes, lr=4e-3)
    loss_of = torch.compile(next_token_loss, dynamic=False)
    short = Windows(stream, LENGTH // 2, args.device, seed=1)
    long = Windows(stream, LENGTH, args.device, seed=2)
    while trainer.progress < 1:
        ids = next(short if trainer.progress < 0.7 else long)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(model, ids)
        trainer.step(loss, ids[:, 1:].numel())
        if trainer.steps % 500 == 0:
            model.save_pretrained(output / "original-checkpoint")
    model.to(torch.bfloat16).save_pretrained(output / "original")
    record(output, "original", trainer)


@torch.no_grad()
def generate_texts(target: LlamaForCausalLM, windows: Windows, minutes: float) -> Tensor:
    """Texts that the target generates from training prompts, half greedy, half sampled at T=1: ids [N, length + 1]."""
    texts, started = [], time.monotonic()
    while not texts or time.monotonic() - started < minutes * 60:
        prompts = next(windows)[:, :64]
        texts.append(
            target.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=len(texts) % 2 == 1,
                top_k=0,
                max_length=windows.length + 1,
                min_length=windows.length + 1,
            )
        )
        print(f"  generated: {sum(t.numel() for t in texts) / 1e3:.0f}k tokens", flush=True)
    return torch.cat(texts)


def train_draft(stream: Tensor, output: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    target = LlamaForCausalLM.from_pretrained(output / "original", dtype=torch.float32).to(args.device).eval()
    draft = LlamaForCausalLM(model_config(num_layers=2)).to(args.device)
    draft.set_attn_implementation("eager")
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    draft.model.layers[0].load_state_dict(target.model.layers[0].state_dict())
    draft.model.layers[1].load_state_dict(target.model.layers[-1].state_dict())
    print(f"draft: {draft.num_parameters() / 1e6:.2f}M parameters, {args.draft_minutes:g} minutes", flush=True)

    own = generate_texts(
        target, Windows(stream, 320, args.device, seed=3, tokens=128 * 320), minutes=0.15 * args.draft_minutes
    )
    own_windows = Windows(own.flatten().cpu(), LENGTH, args.device, seed=5)
    text_windows = Windows(stream, LENGTH, args.device, seed=4)
    trainer = Trainer(draft, 0.85 * args.draft_minutes, lr=3e-3)
    target.set_attn_implementation("eager")

    @torch.no_grad()
    def target_logits_of(ids: Tensor) -> Tensor:
        return target(input_ids=ids[:, :-1], use_cache=False).logits

    target_logits_of = torch.compile(target_logits_of, dynamic=False)
    loss_of = torch.compile(distillation_loss, dynamic=False)
    while trainer.progress < 1:
        ids = next(own_windows if trainer.steps % 3 == 2 else text_windows)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(draft, ids, target_logits_of(ids))
        trainer.step(loss, ids[:, 1:].numel())
    draft.to(torch.bfloat16).save_pretrained(output / "draft")
    record(output, "draft", trainer)


def record(output: Path, name: str, trainer: Trainer) -> None:
    """Write the figures of a training run, for the card."""
    facts = {
        "minutes": round(trainer.seconds / 60, 1),
        "tokens": trainer.tokens,
        "steps": trainer.steps,
        "final_loss": round(trainer.smoothed or math.nan, 4),
        "device": str(trainer.model.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (output / f"{name}-training.json").write_text(json.dumps(facts, indent=2))


@torch.no_grad()
def measure(output: Path, name: str, held_out_texts: list[str], device: str) -> dict[str, float]:
    """Perplexities on held-out text; greedy agreement and expected acceptance (T=1) along the target's own
    continuations.

    name: which target, "target" or "original"; in float32 around the saved weights: what the demo runs.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "original")
    target = LlamaForCausalLM.from_pretrained(output / name, dtype=torch.float32).to(device).eval()
    draft = LlamaForCausalLM.from_pretrained(output / "draft", dtype=torch.float32).to(device).eval()
    stream = torch.tensor(tokenizer("<|endoftext|>".join(held_out_texts))["input_ids"])
    windows = stream[: len(stream) // 513 * 513].view(-1, 513)[:200].to(device)
    result: dict[str, float] = {}
    for name, model in (("target", target), ("draft", draft)):
        losses = [next_token_loss(model, chunk).item() * len(chunk) for chunk in windows.split(8)]
        result[f"{name}_perplexity"] = math.exp(sum(losses) / len(windows))

    lines = (output / "prompts.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"][:128] for line in lines]
    prompts = [ids for ids in prompts if len(ids) == 128]
    ids = torch.tensor(prompts, device=device)
    for do_sample in (False, True):
        torch.manual_seed(0)
        text = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=do_sample,
            top_k=0,
            max_new_tokens=128,
            eos_token_id=None,
        )
        values = []
        for chunk in text.split(16):
            p, q = (model(chunk).logits[:, 127:-1].softmax(-1) for model in (target, draft))
            values.append(torch.minimum(p, q).sum(-1) if do_sample else (p.argmax(-1) == q.argmax(-1)).float())
        result["expected_acceptance" if do_sample else "greedy_agreement"] = torch.cat(values).mean().item()
    result["prompts"] = len(prompts)
    return {name: round(value, 4) for name, value in result.items()}


CARD = """---
license: apache-2.0
library_name: transformers
tags: [speculative-decoding, specdec]
---
# The embedded {name} of specdec

{role} Llama architecture, {layers} layers of 256, 4 query heads and 1 key head of 64, MLP 512, tied embeddings,
byte-level BPE of {vocab}, context {context}, trained on windows of up to {length}.
{parameters:.2f}M parameters, {megabytes:.1f} MB:
{precision}.
It exists so that the demo, the tests and the benchmarks run on real text and real acceptance with no download. It is no
assistant and writes no useful code.

## Measured on held-out modules
Both models in float32 around the saved weights. {prompts} prompts of 128 tokens, 128 tokens each along the target's own
output.

| what | value |
|---|---|
| target perplexity | {target_perplexity:.2f} |
| draft perplexity | {draft_perplexity:.2f} |
| draft's greedy token = target's, along the target's greedy output | {greedy_agreement:.1%} |
| expected acceptance at T=1, mean of sum(min(p, q)), along the target's sampled output | {expected_acceptance:.3f} |

Command: `python scripts/train_pair.py --output DIR --only card`.

## Training
The standard library of Python {python} (without generated tables, and without {held_out} and their tests),
{minutes:g} minutes on {device} with torch {torch}: {tokens:.1f}M tokens in {steps} steps, final loss {final_loss}.
By `scripts/train_pair.py`.

`prompts.jsonl`, which ships with the pair, holds cuts from the held-out modules of Python {python} (PSF License,
Version 2); sha256 `{prompts_sha256}`.
"""


ROLES = {
    "original": ("The model that the embedded target was quantized from.", "bfloat16"),
    "target": (
        "The model whose distribution counts.",
        "linear layers in 4 bits, but for the first layer's; those and the norms in bfloat16, the embedding, which is"
        " the head too, in 8 bits. Made of the original by\n`specdec quantize ORIGINAL TARGET"
        f" {' '.join(QUANTIZATION)}`",
    ),
    "draft": ("Distilled from the target's original, to propose for it.", "bfloat16"),
}


def write_cards(output: Path, metrics: dict[str, dict[str, float]]) -> None:
    """metrics: of each pair, by its target."""
    for name, (role, precision) in ROLES.items():
        config = LlamaConfig.from_pretrained(output / name)
        source = "original" if name == "target" else name
        training = json.loads((output / f"{source}-training.json").read_text())
        measured = metrics["original" if name == "original" else "target"]
        card = CARD.format(
            name=name,
            role=role,
            precision=precision,
            layers=config.num_hidden_layers,
            vocab=VOCAB_SIZE,
            context=CONTEXT,
            length=LENGTH,
            parameters=(output / source / "model.safetensors").stat().st_size / 2e6,
            megabytes=(output / name / "model.safetensors").stat().st_size / 1e6,
            held_out=", ".join(f"`{module}`" for module in HELD_OUT),
            prompts_sha256=hashlib.sha256((output / "prompts.jsonl").read_bytes()).hexdigest(),
            **measured,
            **training | {"tokens": training["tokens"] / 1e6},
        )
        (output / name / "README.md").write_text(card)
        (output / name / "metrics.json").write_text(json.dumps(measured | {"training": training}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for original/, target/, draft/ and prompts.jsonl"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--target-minutes", type=float, default=50)
    parser.add_argument("--draft-minutes", type=float, default=30)
    parser.add_argument("--target-layers", type=int, default=12)
    parser.add_argument("--only", choices=STAGES, help="one stage, from what the others left")
    args = parser.parse_args()

    sources = stdlib_modules()
    training_texts = [text for path, text in sources.items() if not is_held_out(path)]
    held_out_texts = [sources[f"{module}.py"] for module in HELD_OUT if f"{module}.py" in sources]
    stages = [args.only] if args.only else STAGES
    args.output.mkdir(parents=True, exist_ok=True)

    if "tokenizer" in stages:
        train_tokenizer(training_texts, args.output)
        lines = [json.dumps(prompt) for prompt in held_out_prompts(sources)]
        (args.output / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output / "original")
    if {"original", "draft"} & set(stages):
        encoded = tokenizer([text + "<|endoftext|>" for text in training_texts])["input_ids"]
        stream = torch.tensor([token for ids in encoded for token in ids])
        print(
            f"{len(training_texts)} modules, {len(stream) / 1e6:.2f}M tokens; {len(held_out_texts)} held out",
            flush=True,
        )
    if "original" in stages:
        train_target(stream, args.output, args)
    if "draft" in stages:
        train_draft(stream, args.output, args)
    if "target" in stages:
        shutil.rmtree(args.output / "target", ignore_errors=True)
        specdec_command(["quantize", str(args.output / "original"), str(args.output / "target"), *QUANTIZATION])
    if "card" in stages:
        metrics = {name: measure(args.output, name, held_out_texts, args.device) for name in ("original", "target")}
        write_cards(args.output, metrics)
        print(json.dumps(metrics))


if __name__ == "__main__":
    sys.exit(main())

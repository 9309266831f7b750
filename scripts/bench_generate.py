"""Time plain generate(), stock assisted decoding and specdec on one pair, in one run: interleaved, medians, one JSON line last.

    python scripts/bench_generate.py                       # the embedded pair, about 3 minutes on two CPU cores
    python scripts/bench_generate.py --quick --output benchmarks/results/bench_generate.json
    python scripts/bench_generate.py --target path/or/hub-id --draft path/or/hub-id --device cuda --dtype bfloat16

Greedy, same prompts and token counts for all; every round runs each engine once, so that a machine's drift meets all alike.
Tokens are the ids generated for every row until its stop; seconds are the whole call's, prompt included. `outside_forwards_ms`
is what a step costs apart from the two models' forwards and from the call's own preparation.
"""

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec import embedded
from specdec.provenance import provenance
from specdec.quant.rows import ATTENTION


class ForwardClock:
    """Seconds and calls spent in models' forwards; replaces each model's forward while it is entered."""

    def __init__(self, *models: PreTrainedModel):
        self.models, self.seconds, self.calls = models, 0.0, [0] * len(models)

    def __enter__(self) -> "ForwardClock":
        for index, model in enumerate(self.models):
            model.forward = self._timed(model.forward, index)
        return self

    def __exit__(self, *_: object) -> None:
        for model in self.models:
            del model.forward

    def _timed(self, forward: Callable, index: int) -> Callable:
        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = forward(*args, **kwargs)
            if result.logits.is_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            self.calls[index] += 1
            return result

        timed.__signature__ = inspect.signature(forward)  # generate() looks at it
        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(embedded.TARGET))
    parser.add_argument("--draft", default=str(embedded.DRAFT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[2, 3, 5], metavar="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a round; each batch takes its share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 64 tokens")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.max_new_tokens = 2, 64

    origin = provenance(args.device) | {"dtype": args.dtype}
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.target, padding_side="left")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(args.device)
    draft = AutoModelForCausalLM.from_pretrained(args.draft, dtype=dtype).to(args.device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [prompt["prompt"] for prompt in embedded.prompts()][:: len(embedded.prompts()) // args.prompts][: args.prompts]

    results = []
    for batch in args.batch:
        results += measure(target, draft, tokenizer, texts, batch, args)
    report = {"script": "bench_generate", "provenance": origin, "results": results}
    show(results)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    if any(result["identical_rows"] < result["rows"] for result in results if result["engine"].startswith("specdec")):
        sys.exit("specdec: a greedy output differs from plain generate()")


def measure(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer, texts: list[str], batch: int, args: argparse.Namespace
) -> list[dict]:
    """One result an engine: tokens per second of each round, its median, the ratio to plain in the same round."""
    batches = [
        tokenizer(texts[start : start + batch], return_tensors="pt", padding=True).to(args.device)
        for start in range(0, len(texts), batch)
    ]
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    engines = {"plain": Engine(target, options)}
    if target.config._attn_implementation == ATTENTION:  # what plain decoding would take, were it not to be row-invariant
        engines["plain, sdpa attention"] = WithSdpa(target, options)
    if batch == 1:  # stock assisted decoding takes no batch
        engines["stock assisted, its defaults"] = StockAssisted(target, options, draft)
        for k in args.num_draft_tokens:
            engines[f"stock assisted K={k}"] = StockAssisted(target, options, draft, k)
    engines["specdec none"] = Specdec(target, options, "none", 1)
    engines["specdec prompt_lookup K=5"] = Specdec(target, options, "prompt_lookup", 5)
    for k in args.num_draft_tokens:
        engines[f"specdec K={k}"] = Specdec(target, options, draft, k)

    plain, identical, outside, acceptance = [], {}, {}, {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for name, engine in engines.items():  # warm-up, and what the figures are checked by
        with engine:
            outputs = [engine.generate(inputs) for inputs in batches]
            acceptance[name] = engine.mean_acceptance_length()
            outside[name] = outside_forwards_ms(engine, batches, target, draft)
        plain = plain or outputs
        identical[name] = sum(same_rows(a, b, tokenizer.pad_token_id) for a, b in zip(outputs, plain, strict=True))
    for _ in track(range(args.rounds), description=f"batch {batch}", console=Console(stderr=True)):
        for name, engine in engines.items():
            with engine:
                started = time.perf_counter()
                outputs = [engine.generate(inputs) for inputs in batches]
                seconds = time.perf_counter() - started
            rates[name].append(count_tokens(outputs, batches, tokenizer) / seconds)
    return [
        {
            "engine": name,
            "batch": batch,
            "tokens_per_second": round(statistics.median(rates[name]), 1),
            "tokens_per_second_rounds": [round(rate, 1) for rate in rates[name]],
            "ratio_to_plain": round(statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True)), 3),
            "outside_forwards_ms": round(outside[name], 3),
            "identical_rows": identical[name],
            "rows": len(texts),
            "mean_acceptance_length": acceptance[name],
        }
        for name in engines
    ]


def outside_forwards_ms(engine: "Engine", batches: list[dict], target: PreTrainedModel, draft: PreTrainedModel) -> float:
    """Milliseconds a step spends outside the models' forwards; a call's preparation, seen in calls of one token, is taken off."""

    def spent(**options: int) -> tuple[float, int]:
        with ForwardClock(target, draft) as clock:
            started = time.perf_counter()
            for inputs in batches:
                engine.generate(dict(inputs) | options)
            return time.perf_counter() - started - clock.seconds, clock.calls[0]

    values = []
    for _ in range(3):
        (all_seconds, all_calls), (one_seconds, one_calls) = spent(), spent(max_new_tokens=1)
        values.append(1000 * (all_seconds - one_seconds) / (all_calls - one_calls))
    return statistics.median(values)


class Engine:
    """A way to generate: enter it, untimed, then generate(); this one is transformers' own plain loop."""

    def __init__(self, target: PreTrainedModel, options: dict):
        self.target, self.options = target, options

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, inputs: dict) -> Tensor:
        """inputs may override the options."""
        return self.target.generate(**self.options | dict(inputs))

    def mean_acceptance_length(self) -> float | None:
        """Over all batches since it was entered; None where it is not told."""
        return None


class WithSdpa(Engine):
    """Plain decoding of a 4-bit model on a CPU with sdpa's attention in place of the row-invariant one."""

    def __enter__(self) -> None:
        self.target.set_attn_implementation("sdpa")

    def __exit__(self, *_: object) -> None:
        self.target.set_attn_implementation(ATTENTION)


class StockAssisted(Engine):
    """transformers' assisted decoding, with its default settings or drafting K ids every time."""

    def __init__(self, target: PreTrainedModel, options: dict, draft: PreTrainedModel, k: int | None = None):
        super().__init__(target, options | {"assistant_model": draft})
        self.config = draft.generation_config
        self.settings = {} if k is None else {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0}
        self.settings |= {} if k is None else {"num_assistant_tokens_schedule": "constant"}

    def __enter__(self) -> None:
        self.before = {name: getattr(self.config, name) for name in self.settings}
        self.config.update(**self.settings)

    def __exit__(self, *_: object) -> None:
        self.config.update(**self.before)


class Specdec(Engine):
    """Ours."""

    def __init__(self, target: PreTrainedModel, options: dict, drafter: PreTrainedModel | str, k: int):
        super().__init__(target, options)
        self.drafter, self.k = drafter, k

    def __enter__(self) -> None:
        specdec.enable(self.target, self.drafter, num_draft_tokens=self.k)
        self.stats: list[specdec.Stats] = []

    def __exit__(self, *_: object) -> None:
        specdec.disable(self.target)

    def generate(self, inputs: dict) -> Tensor:
        output = super().generate(inputs)
        self.stats.append(specdec.last_stats(self.target))
        return output

    def mean_acceptance_length(self) -> float:
        accepted = sum(stats.num_accepted_draft_tokens for stats in self.stats)
        return round(1 + accepted / sum(stats.num_spec_steps for stats in self.stats), 3)


def same_rows(output: Tensor, plain: Tensor, pad: int) -> int:
    width = max(output.shape[1], plain.shape[1])
    output, plain = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=pad) for t in (output, plain))
    return int((output == plain).all(1).sum())


def count_tokens(outputs: list[Tensor], batches: list[dict], tokenizer) -> int:
    """Generated ids of every row up to its stop, the stop included."""
    total = 0
    for output, inputs in zip(outputs, batches, strict=True):
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            total += row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
    return total


def show(results: list[dict]) -> None:
    table = Table(title="tokens per second, medians of interleaved rounds")
    for column in ("batch", "engine", "tok/s", "× plain", "outside forwards, ms/step", "identical", "mean acceptance length"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for r in results:
        tau = r["mean_acceptance_length"]
        table.add_row(
            str(r["batch"]), r["engine"], f"{r['tokens_per_second']:.0f}", f"{r['ratio_to_plain']:.2f}",
            f"{r['outside_forwards_ms']:.2f}", f"{r['identical_rows']}/{r['rows']}", "" if tau is None else f"{tau:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()

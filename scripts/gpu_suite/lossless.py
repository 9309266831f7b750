"""Greedy texts of the embedded pair: the 4-bit target by generate() alone, and with speculation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

import specdec
from gpu_suite.messages import log
from gpu_suite.suite import Row, Section, Suite, failed
from specdec.audit.identity import first_difference
from specdec.quant.linear import Int4Linear
from specdec.runtime.loading import load
from specdec.utils import embedded

NEAR_TIE = 0.25  # between the two best logits: rounding in bfloat16 may decide
BATCHES = (1, 4)
NUM_DRAFT_TOKENS = 5


@dataclass(frozen=True)
class Writer:
    """Greedy texts of a target."""

    target: Any
    tokenizer: Any

    def write(self, prompts: list[str], max_new_tokens: int, **options: Any) -> tuple[Any, list[list[int]]]:
        """generate()'s output, and each prompt's continuation up to its EOS id."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.target.device)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options |= {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": self.tokenizer.pad_token_id}
        output = self.target.generate(**ids, max_new_tokens=max_new_tokens, **options)
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        eos = self.target.generation_config.eos_token_id
        return output, [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    def difference(self, prompts: list[str], index: int, ids: list[int], expected: list[int]) -> Row:
        """The first position at which a text differs from plain decoding, and the margin of its best logit there."""
        position = first_difference(expected, ids)
        assert position is not None
        output, _ = self.write(prompts, position + 1, output_logits=True)
        best = output.logits[-1][index].float().topk(2).values
        return {"position": position, "margin": (best[0] - best[1]).item()}

    def compare(self, drafter: Any, name: str, prompts: list[dict[str, str]], batch: int, max_new_tokens: int) -> Row:
        """Plain generate() against speculation, batch by batch."""
        row = {"batch": batch, "drafter": name, "texts": len(prompts), "identical": 0, "accepted": 0, "drafted": 0}
        row["differences"] = []
        for start in range(0, len(prompts), batch):
            batch_prompts = prompts[start : start + batch]
            texts = [prompt["prompt"] for prompt in batch_prompts]
            _, plain = self.write(texts, max_new_tokens)
            specdec.enable(self.target, drafter, num_draft_tokens=NUM_DRAFT_TOKENS)
            output, speculative = self.write(texts, max_new_tokens)
            specdec.disable(self.target)
            row["accepted"] += output.speculation.num_accepted_draft_tokens
            row["drafted"] += output.speculation.num_draft_tokens
            for index, (ids, expected) in enumerate(zip(speculative, plain, strict=True)):
                row["identical"] += ids == expected
                if ids != expected:
                    difference = self.difference(texts, index, ids, expected)
                    row["differences"].append({"prompt": batch_prompts[index]["id"]} | difference)
        log(f"  batch {batch}, {name}: {row['identical']} of {row['texts']} identical")
        return row


def run(suite: Suite) -> Row:
    dtype, count = "bfloat16" if suite.cuda else "float32", suite.sizes.prompts
    target, draft = (load(str(path), dtype, str(suite.device)) for path in (embedded.TARGET, embedded.DRAFT))
    writer = Writer(target, AutoTokenizer.from_pretrained(str(embedded.TARGET)))
    all_prompts = embedded.prompts()
    prompts = [all_prompts[i * len(all_prompts) // count] for i in range(count)]
    drafters = {"embedded draft": draft, "prompt lookup": "prompt_lookup"}
    results = [
        writer.compare(drafter, name, prompts, batch, suite.sizes.new_tokens)
        for batch in BATCHES
        for name, drafter in drafters.items()
    ]
    kernels = [type(module.kernel).__name__ for module in target.modules() if isinstance(module, Int4Linear)]
    counts = {name: kernels.count(name) for name in sorted(set(kernels))}
    report = {"dtype": dtype, "kernels": counts, "results": results}
    if suite.cuda and "CudaKernel" not in kernels:
        return report | failed("no 4-bit layer ran the kernel")
    if any(difference["margin"] > NEAR_TIE for row in results for difference in row["differences"]):
        return report | failed("texts differ where the two best logits are not nearly equal")
    return report


SECTION = Section("lossless", run)

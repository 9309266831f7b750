"""Check which of transformers' text classes work with specdec, by tiny random models with and without it.

    python scripts/check_models.py        # all classes; writes docs/models.md and specdec/assets/models.json
    python scripts/check_models.py olmo3 GitForCausalLM        # some, by model type or class; writes nothing

Every class of MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING gets a config of its own kind, whose
fields are made small by their names. Prompts are text alone, three rows of one length or left-padded, of 12 and 300
ids, with attention windows shorter and longer than the prompt; drafts are partly right. A class works where every text
equals that of plain generate().
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

import specdec
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from specdec.runtime.support import MODELS_FILE, RECURRENT

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
VOCAB_SIZE, CONTEXT, NEW_TOKENS = 101, 512, 24
MAX_PARAMETERS = 50_000_000  # a class whose tiny model has more is not tried
WINDOWS_AND_LENGTHS = ((8, (12,)), (128, (12, 300)))  # attention windows, and the prompt lengths tried with each

# Sizes of a tiny model, by the name of a config's field; the first pattern that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(text_)?vocab_size(_per_layer_input)?", VOCAB_SIZE),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_len|context_length|max_target_positions"
        r"|max_text_len|max_length",
        CONTEXT,
    ),
    (r"(num_)?((hidden|encoder|decoder|global)_)?layers|n_layers?|depth|num_blocks", 2),
    (
        r"(text_|encoder_|decoder_|backbone_|out_)?hidden_size(_per_layer_input)?|d_model|n_embd|dim|embed_dim"
        r"|(input_|output_)?embedding_size|emb_dim|output_dim|word_embed_proj_dim|projection_dim|d_inner",
        32,
    ),
    (
        r".*(intermediate|ffn|mlp|inner)_(size|dim|hidden_size)|.*intermediate_size.*|d_ff|ffn_dim"
        r"|dense_intermediate_size|moe_hidden_size|share_expert_dim",
        48,
    ),
    (r"(swa_)?(num_|n_)?((encoder|decoder)_)?(attention_)?heads?", 4),
    (r"(swa_)?(num_key_value_heads|num_kv_heads)|kv_n_heads", 2),
    (
        r"(swa_|global_)?head_dim|kv_channels|d_kv|rotary_dim|index_head_dim|qk_rope_head_dim|qk_nope_head_dim"
        r"|(swa_)?v_head_dim",
        8,
    ),
    (r".*_rank", 16),
    (r"index_n_heads", 2),
    (r"(num_(local_|routed_)?|n_routed_|moe_num_)experts", 4),
    (r"num_experts_per_tok|moe_top_?k|moe_k|top_k_experts", 2),
    (
        r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace"
        r"|num_dense_layers",
        1,
    ),
    (r"image_size|crop_size|img_size|min_image_size", 16),
    (r"type_vocab_size", 2),
)
OPTIONAL = ("head_dim", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "d_ff", "ffn_dim")
WINDOW = re.compile(
    r"sliding_window(_size)?|window_size|attention_window(_size)?|attention_chunk_size|local_attention|attn_window"
    r"|index_topk"
)
TEXT_CONFIGS = (
    "text_config",
    "decoder",
    "decoder_config",
    "llm_config",
    "attn_config",
    "ffn_config",
    "vlm_config",
    "language_config",
)
# Values, by model type, of fields that the patterns above leave too large or make invalid.
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_BOTH_KINDS = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"audio_config": {"codebook_dim": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass": {"text_config": {"rope_parameters": _BOTH_KINDS}},
    "cohere_compass_text": {"rope_parameters": _BOTH_KINDS},
    "cosmos3_edge": {"text_config": _SECTIONS},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"per_layer_config": None},
    "dots3_note_text": {"per_layer_config": None},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 48]}},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "glm46v": {"text_config": _SECTIONS},
    "glm4v": {"text_config": _SECTIONS},
    "glm4v_moe": {"text_config": _SECTIONS},
    "glm_ocr": {"text_config": _SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hy_v4_vl": {"text_config": _SECTIONS},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "qwen2_5_omni_thinker": {"text_config": _SECTIONS},
    "qwen2_5_vl": {"text_config": _SECTIONS},
    "qwen2_vl": {"text_config": _SECTIONS},
    "qwen3_omni_moe_thinker": {"text_config": _SECTIONS},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(cls: Any, window: int, is_text: bool = True) -> dict[str, Any]:
    """Arguments of a config class for a tiny model with attention windows of this length."""
    values: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    subconfigs = getattr(cls, "sub_configs", None) or {}
    for name, field in fields.items():
        default = None if field.default is dataclasses.MISSING else field.default
        is_optional = name in OPTIONAL or (name == "sliding_window" and "use_sliding_window" in fields)
        if (
            name in subconfigs
            or isinstance(default, bool)
            or not (isinstance(default, int) or (default is None and is_optional))
        ):
            continue
        if is_text and WINDOW.fullmatch(name):
            values[name] = window
        elif not name.endswith(("token_id", "token_index")):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            values |= {} if size is None else {name: size}
    defaults = cls() if any(sub.__name__ == "AutoConfig" for sub in subconfigs.values()) else None
    for name, sub in subconfigs.items():
        sub_cls = type(getattr(defaults, name, None)) if sub.__name__ == "AutoConfig" else sub
        if dataclasses.is_dataclass(sub_cls):
            values[name] = tiny_config(sub_cls, window, is_text and name in TEXT_CONFIGS)
            if getattr(sub_cls, "model_type", ""):
                values[name]["model_type"] = sub_cls.model_type
    if "qk_rope_head_dim" in fields:  # latent attention has separate fields for the widths of its heads
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    fixed = {
        "use_sliding_window": True, "use_cache": True, "is_decoder": True, "tie_word_embeddings": False,
        "pad_token_id": 0,
    }  # fmt: skip
    values |= {name: value for name, value in fixed.items() if name in fields}
    return values | {
        name: None for name in ("eos_token_id", "bos_token_id") if name in fields and "None" in str(fields[name].type)
    }


@dataclass(frozen=True)
class Family:
    """A class of transformers and a model type of it. task: "text" or "pictures and text"."""

    name: str
    model_type: str
    task: str

    def make(self, window: int) -> PreTrainedModel:
        """A tiny random model in float32, in eval mode, whose greedy text is not constant."""
        cls = getattr(transformers, self.name)
        config = _config(self.model_type, window)
        with torch.device("meta"):
            size = cls._from_config(config).num_parameters()
        if size > MAX_PARAMETERS:
            raise ValueError(f"its tiny model has {size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = cls._from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.25)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model


def _config(model_type: str, window: int) -> Any:
    cls = CONFIG_MAPPING[model_type]
    overrides = OVERRIDES.get(model_type, {})
    config = cls(**_merged(tiny_config(cls, window), overrides))
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if sections := rope.get("mrope_section"):  # their sum is half of a head's rotary width
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = int(head_width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [
            width - (len(sections) - 1) * (width // len(sections)),
            *[width // len(sections)] * (len(sections) - 1),
        ]
    return config


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(values)
    for name, value in others.items():
        is_nested = isinstance(value, dict) and isinstance(values.get(name), dict)
        merged[name] = _merged(values[name], value) if is_nested else copy.deepcopy(value)
    return merged


def families() -> list[Family]:
    """Every class once, with the first model type that it is listed for."""
    found: dict[str, Family] = {}
    listed = (
        ("text", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("pictures and text", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    for task, names in listed:
        for model_type, name in names.items():
            config = getattr(getattr(transformers, name), "config_class", None)
            own_type = getattr(config, "model_type", None)
            found.setdefault(name, Family(name, own_type if own_type in CONFIG_MAPPING else model_type, task))
    return list(found.values())


class PartlyRight:
    """Proposes a given text of each row, with every third token wrong."""

    def __init__(self) -> None:
        self.prompt_lengths: list[int] = []
        self.texts: list[list[int]] = []

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        ids = limit.new_zeros(len(limit), int(limit.max()))
        for row, count in enumerate(limit.tolist()):
            length = int(sequences.lengths[row])
            start = length - self.prompt_lengths[row]
            right = torch.tensor(self.texts[row][start : start + count])
            is_wrong = (length + torch.arange(len(right))) % 3 == 0
            ids[row, : len(right)] = (right + is_wrong) % VOCAB_SIZE
        return Draft(ids, None, limit)

    def observe(self, result: StepResult) -> None:
        pass


def prompts(length: int, is_padded: bool) -> dict[str, Tensor]:
    """Three rows of random ids [3, length]; is_padded: two of them shorter, with left padding."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, VOCAB_SIZE - 15, (3, length), generator=generator)
    padding = torch.tensor([0, length - 2, length // 3]) if is_padded else torch.zeros(3, dtype=torch.int64)
    mask = (torch.arange(length) >= padding[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# Results, from the best to the worst.
WORKS, PARTLY, STOCK, REFUSED, NO_TEXT, NOT_TRIED, WRONG = RESULTS = (
    "works", "works in part", "stock loop", "refused", "no text alone", "not tried", "WRONG TEXT",
)  # fmt: skip


def check(family: Family) -> dict[str, str]:
    """Check one class: -> a row of the table."""
    result, reason = WORKS, ""
    for window, lengths in WINDOWS_AND_LENGTHS:
        found, why = _check(family, window, lengths)
        if RESULTS.index(found) > RESULTS.index(result):
            result, reason = found, why
        if found in (REFUSED, NO_TEXT, NOT_TRIED, WRONG):
            break
    return {
        "class": family.name,
        "model_type": family.model_type,
        "task": family.task,
        "result": result,
        "reason": reason,
    }


def _check(family: Family, window: int, lengths: tuple[int, ...]) -> tuple[str, str]:
    """The result of a class with one attention window, and the reason for it."""
    try:
        model = family.make(window)
    except Exception as error:  # a class may fail in any way on a tiny config
        is_recurrent = getattr(getattr(transformers, family.name), "_is_stateful", False)
        return (REFUSED, RECURRENT) if is_recurrent else (NOT_TRIED, _first_line(error))
    drafter = PartlyRight()
    try:
        specdec.enable(model, drafter, num_draft_tokens=3, compile=False)
    except ValueError as error:
        return REFUSED, str(error).partition("cannot decode speculatively: ")[2] or str(error)
    calls = [(length, is_padded) for length in lengths for is_padded in (False, True)]
    stock_reasons = []
    for length, is_padded in calls:
        result, reason = _check_call(model, drafter, length, is_padded)
        if result == WRONG:
            rows = "left-padded" if is_padded else "even"
            return WRONG, f"{reason}: {rows} prompts of {length} ids with a window of {window}"
        if result == NO_TEXT:
            return NO_TEXT, reason
        if result == STOCK:
            stock_reasons.append(reason)
    if not stock_reasons:
        return WORKS, ""
    return PARTLY if len(stock_reasons) < len(calls) else STOCK, "; ".join(dict.fromkeys(stock_reasons))


def _check_call(model: PreTrainedModel, drafter: PartlyRight, length: int, is_padded: bool) -> tuple[str, str]:
    """Compare the text of one call to plain decoding's: -> WORKS, STOCK, NO_TEXT or WRONG, and the reason."""
    call = prompts(length, is_padded) | {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    specdec.disable(model)
    try:
        want = model.generate(**call)
    except Exception as error:  # a class that generates nothing from ids alone
        return NO_TEXT, f"plain generate() of ids alone raises {_first_line(error)}"
    specdec.enable(model, drafter, num_draft_tokens=3, compile=False)
    drafter.prompt_lengths, drafter.texts = call["attention_mask"].sum(1).tolist(), want[:, length:].tolist()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = model.generate(**call)
    if got.tolist() != want.tolist():
        return WRONG, "the texts differ"
    stats = specdec.last_stats(model)
    if stats is None:
        reasons = [str(warning.message).partition("to the stock loop: ")[2] for warning in caught]
        return STOCK, next(filter(None, reasons))
    if not 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens:
        return WRONG, f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens accepted"
    return WORKS, ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"[:200]


MEANINGS = {
    WORKS: "every text equals that of plain `generate()`, decoded speculatively",
    PARTLY: "some calls are decoded speculatively, the others run the stock loop, for the reason given",
    STOCK: "every call runs the stock loop, for the reason given",
    REFUSED: "`enable` raises `ValueError` with the reason given",
    NO_TEXT: "plain `generate()` does not run on ids alone",
    NOT_TRIED: "the script cannot make a tiny model of the class",
    WRONG: "the text differs from that of plain `generate()`: a bug of specdec",
}


def page(rows: list[dict[str, str]]) -> str:
    """The rows as Markdown, the best results first."""
    lines = [
        "# Which models work",
        "",
        "`python scripts/check_models.py` writes this page; do not edit it by hand. The script makes a tiny random"
        " float32 model of every class in transformers' mappings for causal and for image-text-to-text models, and"
        " compares its greedy texts with and without specdec: prompts of 12 and 300 ids, of one length and left-padded,"
        " attention windows shorter and longer than the prompt, no pictures.",
        "",
        f"transformers {transformers.__version__}, {len(rows)} classes."
        " `specdec.enable` itself tries a model of any other class.",
        "",
        "| result | meaning | text | pictures and text |",
        "|---|---|---:|---:|",
    ]
    found = [result for result in RESULTS if any(row["result"] == result for row in rows)]
    for result in found:
        counts = [
            sum(row["result"] == result and row["task"] == task for row in rows)
            for task in ("text", "pictures and text")
        ]
        lines.append(f"| {result} | {MEANINGS[result]} | {counts[0]} | {counts[1]} |")
    for result in found:
        chosen = sorted((row for row in rows if row["result"] == result), key=lambda row: row["class"].lower())
        lines += ["", f"## {result[0].upper()}{result[1:]}", ""]
        if result == WORKS:
            lines.append(", ".join(f"{row['class']}" for row in chosen) + ".")
            continue
        lines += ["| class | model type | why |", "|---|---|---|"]
        lines += [f"| {row['class']} | {row['model_type']} | {row['reason'].replace('|', '/')} |" for row in chosen]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="model types or classes; without any: all classes, and the page is written"
    )
    names = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    chosen = [family for family in families() if not names or {family.name, family.model_type} & set(names)]
    if not chosen:
        parser.error(f"none of {', '.join(names)} is a class or a model type of the two mappings")
    rows = []
    for family in track(
        chosen, description=f"{len(chosen)} classes", console=Console(stderr=True), disable=bool(names)
    ):
        rows.append(check(family))
        if names:
            print(f"{family.name}: {rows[-1]['result']}. {rows[-1]['reason']}".rstrip())
    if not names:
        MODELS_FILE.write_text(json.dumps({"transformers": transformers.__version__, "models": rows}, indent=1) + "\n")
        PAGE.write_text(page(rows))
        print(f"wrote {PAGE} and {MODELS_FILE}")
    wrong = [row for row in rows if row["result"] == WRONG]
    for row in wrong:
        print(f"{row['class']}: {row['reason']}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

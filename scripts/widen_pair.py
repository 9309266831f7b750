"""Widen a trained Llama pair to the shape of a larger one that writes the same text: what large models cost, without a download.

    python scripts/widen_pair.py 200m --output build/pairs/200m              # a few seconds on a CPU
    python scripts/widen_pair.py 8b --draft 100m --int4 128 --device cuda --output build/pairs/8b
    python scripts/widen_pair.py 1b --target num_hidden_layers=4 --draft 10m vocab_size=128256 --output build/pairs/own

Every matrix gets its new size, so a step costs what a model of that shape costs, while texts and acceptance stay those of the
small pair. The residual stream keeps the small model's h values and carries zeros in the rest of its H, so norms divide by a
smaller root mean square: their weights take sqrt(h/H), their eps h/H. All that is new reads the stream and computes on noise, and
what it would write is multiplied by zero. So o_proj and down_proj are zero where they add nothing, embeddings are in the new
columns, and all else is noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from specdec.quant.config import Int4Config
from specdec.quant.int4 import GROUP_SIZES
from specdec.quant.layers import is_4bit, layers_to_quantize
from specdec.quant.quantizer import quantize_from
from specdec.runtime.loading import load
from specdec.utils import embedded

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = ROOT / "tests" / "data" / "target"  # the embedded target before it was quantized
ROTARY_TYPES = ("default", "linear", "llama3")  # whose frequencies do not depend on the head's width
SMALL, LARGE = 2.0**-10, 2.0**26  # what keeps new ids from being chosen, see Widened._head


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama, by their names in its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: LlamaConfig) -> Shape:
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @property
    def num_parameters(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = (
            heads * self.head_dim * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
        )
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size + self.hidden_size


SHAPES = {
    "10m": Shape(1024, 1024, 2, 4, 1, 64, 4096, True),
    "100m": Shape(512, 2048, 8, 8, 2, 64, 128256, True),
    "200m": Shape(1024, 3072, 16, 16, 4, 64, 4096, False),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True),  # Llama 3.2 1B
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),  # Llama 3.1 8B
}
PAIRS = {"200m": ("200m", "10m"), "1b": ("1b", "100m"), "8b": ("8b", "1b")}


def widen(
    source: LlamaForCausalLM,
    shape: Shape,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    int4: Int4Config | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> LlamaForCausalLM:
    """A Llama of that shape with the source's logits; ids that the source lacks get thousands less and are never chosen.

    It is built on its device, parameter by parameter. int4: its linear layers go straight to 4 bits, one after the other.
    on_layer: called with the name of each decoder layer done, or each linear layer where int4 is given. In bfloat16 the source's
    own rounding is all there is where H/h is a power of 4 and so is the growth of the heads' width; else norms and queries are
    rounded once more.
    """
    widened = Widened(source, shape, torch.device(device), dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(widened.config).to(dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(widened.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="specdec keeps in full precision")  # the head, as always
        later = set() if int4 is None else {f"{layer}.weight" for layer in layers_to_quantize(model, int4)}
        for name, _ in list(model.named_parameters()):  # a tied head is named once, as the embedding
            if name not in later:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(widened.parameter(name), requires_grad=False))
                if on_layer is not None and int4 is None and name.endswith("post_attention_layernorm.weight"):
                    on_layer(module)
        model.tie_weights()
        if int4 is not None:
            quantize_from(lambda layer: widened.parameter(f"{layer}.weight"), model, int4, on_layer=on_layer)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


class Widened:
    """Makes the parameters of a widened model, one at a time."""

    def __init__(self, source: LlamaForCausalLM, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        check(source, shape)
        self.small, self.large = Shape.of(source.config), shape
        self.weights = {
            name: weight.detach().float() for name, weight in source.named_parameters(remove_duplicate=False)
        }
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        eps, h = source.config.rms_norm_eps, self.small.hidden_size
        # New ids need logits that never win, so one column of the stream holds a constant, whose square eps gives up.
        self.constant = (
            2.0 ** math.floor(math.log2(math.sqrt(eps * h / 2))) if shape.vocab_size > self.small.vocab_size else 0.0
        )
        settings = asdict(shape) | {"rms_norm_eps": (eps * h - self.constant**2) / shape.hidden_size, "dtype": dtype}
        self.config = LlamaConfig.from_dict(source.config.to_dict() | settings)

    def parameter(self, name: str) -> Tensor:
        """A parameter of the widened model, by its full name."""
        kind = name.split(".")[-2]
        if kind == "embed_tokens":
            return self._embedding()
        if kind == "lm_head":
            return self._head()
        if kind.endswith("norm") or "layernorm" in kind:
            return self._norm(name)
        shape, rows, columns = self._places(kind)
        source = self.weights.get(name)
        if kind in ("o_proj", "down_proj"):
            weight = torch.zeros(shape, device=self.device, dtype=self.dtype)
        else:
            weight = self._noise(shape, like=self.weights[f"model.layers.0.{'.'.join(name.split('.')[3:])}"])
        if source is None:  # a layer that the source lacks
            return weight
        if kind == "q_proj":
            source = source * math.sqrt(
                self.large.head_dim / self.small.head_dim
            )  # scores are divided by the root of the width
            old_heads = (rows // self.large.head_dim).unique()[:, None] * self.large.head_dim
            dims = (old_heads + torch.arange(self.large.head_dim, device=self.device)).flatten()
            weight[dims[~torch.isin(dims, rows)]] = 0  # an old head does not ask for what is new in its keys
        if kind in ("k_proj", "v_proj"):
            source = source[self._repeated()]
        weight[rows[:, None], columns] = source.to(self.device, self.dtype)
        return weight

    def _places(self, kind: str) -> tuple[tuple[int, int], Tensor, Tensor]:
        """A projection's shape, and where the small one's rows and columns go."""
        stream = self.large.hidden_size, torch.arange(self.small.hidden_size, device=self.device)
        inner = self.large.intermediate_size, torch.arange(self.small.intermediate_size, device=self.device)
        query_heads, key_heads = self._head_places()
        queries, keys = (
            n * self.large.head_dim for n in (self.large.num_attention_heads, self.large.num_key_value_heads)
        )
        (out, rows), (into, columns) = {
            "q_proj": ((queries, self._dims(query_heads, rotary=True)), stream),
            "k_proj": ((keys, self._dims(key_heads, rotary=True)), stream),
            "v_proj": ((keys, self._dims(key_heads, rotary=False)), stream),
            "o_proj": (stream, (queries, self._dims(query_heads, rotary=False))),
            "gate_proj": (inner, stream),
            "up_proj": (inner, stream),
            "down_proj": (stream, inner),
        }[kind]
        return (out, into), rows, columns

    def _head_places(self) -> tuple[Tensor, Tensor]:
        """New numbers of the small model's query heads [Hq] and of its key heads, each as often as it is needed: [Hk * copies].

        Where the large model has fewer queries to a key, a key head stands there several times.
        """
        ratio, copies = self._ratio(self.large), self._copies()
        query = torch.arange(self.small.num_attention_heads, device=self.device)
        key, place = query // self._ratio(self.small), query % self._ratio(self.small)
        queries = (key * copies + place // ratio) * ratio + place % ratio
        return queries, torch.arange(self.small.num_key_value_heads * copies, device=self.device)

    def _dims(self, heads: Tensor, rotary: bool) -> Tensor:
        """Rows of those heads in a projection; a rotary pair (i, i + d/2) of a head m times as wide is (m i, m i + m d/2)."""
        dims = torch.arange(self.small.head_dim, device=self.device)
        if rotary:
            dims = dims * (self.large.head_dim // self.small.head_dim)
        return (heads[:, None] * self.large.head_dim + dims).flatten()

    def _repeated(self) -> Tensor:
        """Rows of a small key or value projection, each head as often as it is needed."""
        rows = torch.arange(self.small.num_key_value_heads * self.small.head_dim).view(
            self.small.num_key_value_heads, -1
        )
        return rows.repeat_interleave(self._copies(), 0).flatten()

    def _copies(self) -> int:
        return -(-self._ratio(self.small) // self._ratio(self.large))

    @staticmethod
    def _ratio(shape: Shape) -> int:
        return shape.num_attention_heads // shape.num_key_value_heads

    def _norm(self, name: str) -> Tensor:
        source = self.weights.get(name, torch.empty(0))
        weight = torch.rand(self.large.hidden_size, generator=self.generator, device=self.device) + 0.5
        weight[: len(source)] = source.to(self.device) * math.sqrt(self.small.hidden_size / self.large.hidden_size)
        if self.constant:
            is_last = name == "model.norm.weight"
            weight[-1] = (
                SMALL * math.sqrt(self.small.hidden_size / self.large.hidden_size) / self.constant if is_last else 0.0
            )
        return weight.to(self.dtype)

    def _embedding(self) -> Tensor:
        source = self.weights["model.embed_tokens.weight"]
        v, h = source.shape
        weight = self._noise((self.large.vocab_size, self.large.hidden_size), like=source)
        weight[:v, :h] = source.to(self.device, self.dtype)
        weight[:v, h:] = 0
        if self.constant:
            weight[:v, -1] = self.constant
            weight[v:, -1] = -LARGE if self.large.tie_word_embeddings else self.constant
        return weight

    def _head(self) -> Tensor:
        """Behind the last norm the constant is SMALL / (the small model's last rms), and new ids' logits lose LARGE times that.

        With a tied head the others gain it times the constant: some 1e-6, the same for each.
        """
        source = self.weights["lm_head.weight"]
        v, h = source.shape
        weight = self._noise((self.large.vocab_size, self.large.hidden_size), like=source)
        weight[:v, :h] = source.to(self.device, self.dtype)
        if self.constant:
            weight[:v, -1] = 0
            weight[v:, -1] = -LARGE
        return weight

    def _noise(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        made = torch.empty(shape, device=self.device, dtype=self.dtype)
        return made.normal_(0, like.std().item(), generator=self.generator)


def check(source: Any, shape: Shape) -> None:
    """Raise a ValueError where a model cannot be widened to a shape."""
    if source.config.model_type != "llama" or source.config.attention_bias or source.config.mlp_bias:
        raise ValueError(f"only Llama models without biases can be widened, got a {source.config.model_type} model")
    if is_4bit(source):
        raise ValueError("the model is in 4 bits already; widen its original, which can go to 4 bits afterwards")
    small = Shape.of(source.config)
    for name, has in asdict(small).items():
        if name != "tie_word_embeddings" and getattr(shape, name) < has:
            raise ValueError(
                f"{name}={getattr(shape, name)} is less than the {has} of the model to widen; nothing can be cut off"
            )
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={shape.num_attention_heads} is no multiple of num_key_value_heads={shape.num_key_value_heads}"
        )
    if shape.hidden_size % shape.num_attention_heads:  # transformers wants it, although head_dim says all
        raise ValueError(
            f"hidden_size={shape.hidden_size} is no multiple of num_attention_heads={shape.num_attention_heads}"
        )
    if shape.head_dim % small.head_dim:
        raise ValueError(f"head_dim={shape.head_dim} is no multiple of the {small.head_dim} of the model to widen")
    rope_type = source.config.rope_parameters["rope_type"]
    if shape.head_dim != small.head_dim and rope_type not in ROTARY_TYPES:
        raise ValueError(
            f"head_dim cannot grow with rotary embeddings of type {rope_type!r}; keep it at {small.head_dim}"
        )
    if shape.tie_word_embeddings and not small.tie_word_embeddings:
        raise ValueError("tie_word_embeddings=true cannot come of a model with a head of its own; keep it untied")
    if shape.vocab_size > small.vocab_size and shape.hidden_size == small.hidden_size:
        raise ValueError(
            f"vocab_size={shape.vocab_size} needs a column of its own, so that ids the tokenizer lacks are never chosen;"
            f" make hidden_size larger than {small.hidden_size}"
        )
    copies = Widened._ratio(small) / Widened._ratio(shape)
    needed = small.num_key_value_heads * math.ceil(copies)
    if shape.num_key_value_heads < needed:
        raise ValueError(
            f"{shape.num_attention_heads} query heads on num_key_value_heads={shape.num_key_value_heads} leave no room for"
            f" {small.num_attention_heads} on {small.num_key_value_heads}: {needed} key heads would do"
        )


def parse_shape(words: Sequence[str], default: str) -> Shape:
    """A shape of a name's and NAME=VALUE's: ["8b", "num_hidden_layers=4"]; without a name it begins with the default."""
    name, *rest = words if words and "=" not in words[0] else [default, *words]
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    values: dict[str, Any] = {}
    for word in rest:
        key, _, value = word.partition("=")
        kinds = {f.name: type(getattr(SHAPES[name], f.name)) for f in fields(Shape)}
        if key not in kinds:
            raise ValueError(f"a shape has no {key!r}; it has {', '.join(kinds)}")
        try:
            values[key] = {"true": True, "false": False}[value.lower()] if kinds[key] is bool else int(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{word}: {key} wants {'true or false' if kinds[key] is bool else 'a whole number'}"
            ) from None
    return replace(SHAPES[name], **values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pair", choices=list(PAIRS), help=", ".join(f"{name}: {t} + {d}" for name, (t, d) in PAIRS.items())
    )
    words = {
        "nargs": "+",
        "default": [],
        "metavar": "WORD",
        "help": f"a shape ({', '.join(SHAPES)}) and NAME=VALUE, both optional",
    }
    parser.add_argument("--target", **words)
    parser.add_argument("--draft", **words)
    parser.add_argument("--source-target", default=str(ORIGINAL), help="the trained target to widen, in full precision")
    parser.add_argument("--source-draft", default=str(embedded.DRAFT))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--int4", type=int, choices=GROUP_SIZES, metavar="GROUP", help="the target straight to 4 bits: group size"
    )
    parser.add_argument("--device", default="cpu", help="where it is built")
    parser.add_argument("--output", type=Path, required=True, help="a folder that gets target/ and draft/")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()  # there is one of ours
    try:
        shapes = [parse_shape(w, name) for w, name in zip((args.target, args.draft), PAIRS[args.pair], strict=True)]
        for seat, source, shape in zip(
            ("target", "draft"), (args.source_target, args.source_draft), shapes, strict=True
        ):
            int4 = Int4Config(args.int4) if args.int4 and seat == "target" else None
            save(source, shape, args.output / seat, args.device, getattr(torch, args.dtype), int4)
    except ValueError as error:
        sys.exit(f"widen_pair: {error}")


def save(source: str, shape: Shape, folder: Path, device: str, dtype: torch.dtype, int4: Int4Config | None) -> None:
    """Widen a model and write it with its tokenizer; replaces what is there."""
    console, model = Console(stderr=True), load(source, "float32", "cpu")
    check(model, shape)
    layers = shape.num_hidden_layers * (7 if int4 else 1)
    with Progress(console=console) as progress:
        task = progress.add_task(f"{folder.name}, {shape.num_parameters / 1e6:,.0f} million parameters", total=layers)
        widened = widen(model, shape, device=device, dtype=dtype, int4=int4, on_layer=lambda _: progress.advance(task))
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    widened.save_pretrained(temporary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(source) / name).exists():
            shutil.copy(Path(source) / name, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    console.print(f"{folder}: {json.dumps(asdict(shape))}", highlight=False)


if __name__ == "__main__":
    main()

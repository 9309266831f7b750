"""Widen a trained Llama pair to larger shapes with the same outputs, to time large models without a download.

    python scripts/widen_pair.py 200m --output build/pairs/200m              # a few seconds on a CPU
    python scripts/widen_pair.py 8b --draft 100m --int4 128 --device cuda --output build/pairs/8b
    python scripts/widen_pair.py 1b --target num_hidden_layers=4 --draft 10m vocab_size=128256 --output build/pairs/own

Every matrix has its new size, so a step takes as long as one of a model of that shape, while texts and acceptance are
those of the small pair. The residual stream keeps the small model's h values and holds zeros in the rest of its H, so
norms divide by a smaller root mean square: their weights are scaled by sqrt(h/H), their eps by h/H. New heads and
neurons read the stream and compute on noise, and their output is multiplied by zero: o_proj and down_proj are zero in
new rows and columns, embeddings are zero in new columns, and all other new values are noise.
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
ROTARY_TYPES = ("default", "linear", "llama3")  # frequencies that do not depend on the head's width
# They keep new ids from being chosen, see WidenedParameters._head; LARGE / 8 is a scale that float16 can hold.
SMALL, LARGE = 2.0**-6, 2.0**18


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
    """A Llama of that shape with the source's logits; those of new ids are lower by thousands.

    It is built on its device, parameter by parameter. int4: its linear layers are quantized to 4 bits one after the
    other.
    on_layer: called with the name of each finished decoder layer, or linear layer where int4 is given. In bfloat16
    nothing is rounded again where H/h and the ratio of the heads' widths are powers of 4; else norms and queries are
    rounded once more.
    """
    parameters = WidenedParameters(source, shape, torch.device(device), dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(parameters.config).to(dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(parameters.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="specdec keeps in full precision")  # of the head
        quantized = set() if int4 is None else {f"{layer}.weight" for layer in layers_to_quantize(model, int4)}
        for name, _ in list(model.named_parameters()):  # a tied head is named once, as the embedding
            if name not in quantized:
                module, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(parameters.parameter(name), requires_grad=False)
                setattr(model.get_submodule(module), leaf, parameter)
                if on_layer is not None and int4 is None and name.endswith("post_attention_layernorm.weight"):
                    on_layer(module)
        model.tie_weights()
        if int4 is not None:
            quantize_from(lambda layer: parameters.parameter(f"{layer}.weight"), model, int4, on_layer=on_layer)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


class WidenedParameters:
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
        # New ids need low logits, so one column of the stream holds a constant; eps is reduced by its square.
        self.constant = (
            2.0 ** math.floor(math.log2(math.sqrt(eps * h / 2))) if shape.vocab_size > self.small.vocab_size else 0.0
        )
        settings = asdict(shape) | {"rms_norm_eps": (eps * h - self.constant**2) / shape.hidden_size, "dtype": dtype}
        self.config = LlamaConfig.from_dict(source.config.to_dict() | settings)

    def parameter(self, name: str) -> Tensor:
        """A parameter of the widened model, by its full name."""
        module = name.split(".")[-2]
        if module == "embed_tokens":
            return self._embedding()
        if module == "lm_head":
            return self._head()
        if module.endswith("norm") or "layernorm" in module:
            return self._norm(name)
        shape, rows, columns = self._positions(module)
        source = self.weights.get(name)
        if module in ("o_proj", "down_proj"):
            weight = torch.zeros(shape, device=self.device, dtype=self.dtype)
        else:
            weight = self._noise(shape, like=self.weights[f"model.layers.0.{'.'.join(name.split('.')[3:])}"])
        if source is None:  # a layer that the source lacks
            return weight
        if module == "q_proj":
            # scores are divided by the root of the head's width
            source = source * math.sqrt(self.large.head_dim / self.small.head_dim)
            old_heads = (rows // self.large.head_dim).unique()[:, None] * self.large.head_dim
            dims = (old_heads + torch.arange(self.large.head_dim, device=self.device)).flatten()
            weight[dims[~torch.isin(dims, rows)]] = 0  # an old head ignores new dims of its keys
        if module in ("k_proj", "v_proj"):
            source = source[self._repeated()]
        weight[rows[:, None], columns] = source.to(self.device, self.dtype)
        return weight

    def _positions(self, module: str) -> tuple[tuple[int, int], Tensor, Tensor]:
        """A projection's shape, and the positions of the small one's rows and columns in it."""
        stream = self.large.hidden_size, torch.arange(self.small.hidden_size, device=self.device)
        inner = self.large.intermediate_size, torch.arange(self.small.intermediate_size, device=self.device)
        query_heads, key_heads = self._head_positions()
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
        }[module]
        return (out, into), rows, columns

    def _head_positions(self) -> tuple[Tensor, Tensor]:
        """New indices of the small model's query heads [Hq] and of its key heads, repeated as needed: [Hk * copies].

        Where the large model has fewer queries to a key, each key head is repeated.
        """
        ratio, copies = self._ratio(self.large), self._copies()
        query = torch.arange(self.small.num_attention_heads, device=self.device)
        key, offset = query // self._ratio(self.small), query % self._ratio(self.small)
        queries = (key * copies + offset // ratio) * ratio + offset % ratio
        return queries, torch.arange(self.small.num_key_value_heads * copies, device=self.device)

    def _dims(self, heads: Tensor, rotary: bool) -> Tensor:
        """Rows of those heads in a projection.

        A rotary pair (i, i + d/2) becomes (m i, m i + m d/2) in a head m times as wide.
        """
        dims = torch.arange(self.small.head_dim, device=self.device)
        if rotary:
            dims = dims * (self.large.head_dim // self.small.head_dim)
        return (heads[:, None] * self.large.head_dim + dims).flatten()

    def _repeated(self) -> Tensor:
        """Rows of a small key or value projection, each head repeated as needed."""
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
        """After the last norm the constant is SMALL / (the small model's last rms); new ids' logits are LARGE times
        that lower.

        With a tied head the other logits are higher by the constant times that, below 1e-3 and the same for each.
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
        noise = torch.empty(shape, device=self.device, dtype=self.dtype)
        return noise.normal_(0, like.std().item(), generator=self.generator)


def check(source: Any, shape: Shape) -> None:
    """Raise a ValueError where a model cannot be widened to a shape."""
    if source.config.model_type != "llama" or source.config.attention_bias or source.config.mlp_bias:
        raise ValueError(f"only Llama models without biases can be widened, got a {source.config.model_type} model")
    if is_4bit(source):
        raise ValueError("the model is in 4 bits already; widen its original, which can be quantized afterwards")
    small = Shape.of(source.config)
    for name, has in asdict(small).items():
        if name != "tie_word_embeddings" and getattr(shape, name) < has:
            raise ValueError(
                f"{name}={getattr(shape, name)} is less than the {has} of the model to widen; dimensions can only grow"
            )
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={shape.num_attention_heads} is no multiple of"
            f" num_key_value_heads={shape.num_key_value_heads}"
        )
    if shape.hidden_size % shape.num_attention_heads:  # transformers requires it, although head_dim makes it needless
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
        raise ValueError("tie_word_embeddings=true is impossible for a model with an untied head; keep it untied")
    if shape.vocab_size > small.vocab_size and shape.hidden_size == small.hidden_size:
        raise ValueError(
            f"vocab_size={shape.vocab_size} needs a column of its own, so that new ids are never chosen;"
            f" make hidden_size larger than {small.hidden_size}"
        )
    copies = WidenedParameters._ratio(small) / WidenedParameters._ratio(shape)
    needed = small.num_key_value_heads * math.ceil(copies)
    if shape.num_key_value_heads < needed:
        raise ValueError(
            f"{shape.num_attention_heads} query heads on num_key_value_heads={shape.num_key_value_heads} cannot hold"
            f" {small.num_attention_heads} on {small.num_key_value_heads}: {needed} key heads are needed"
        )


def parse_shape(words: Sequence[str], default: str) -> Shape:
    """A shape from words such as ["8b", "num_hidden_layers=4"]; without a name the default shape is changed."""
    name, *rest = words if words and "=" not in words[0] else [default, *words]
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    values: dict[str, Any] = {}
    for word in rest:
        key, _, value = word.partition("=")
        types = {f.name: type(getattr(SHAPES[name], f.name)) for f in fields(Shape)}
        if key not in types:
            raise ValueError(f"a shape has no {key!r}; it has {', '.join(types)}")
        try:
            values[key] = {"true": True, "false": False}[value.lower()] if types[key] is bool else int(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{word}: {key} must be {'true or false' if types[key] is bool else 'an integer'}"
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
    logging.disable_progress_bar()  # save() shows its own
    try:
        shapes = [parse_shape(w, name) for w, name in zip((args.target, args.draft), PAIRS[args.pair], strict=True)]
        for role, source, shape in zip(
            ("target", "draft"), (args.source_target, args.source_draft), shapes, strict=True
        ):
            int4 = Int4Config(args.int4) if args.int4 and role == "target" else None
            save(source, shape, args.output / role, args.device, getattr(torch, args.dtype), int4)
    except ValueError as error:
        sys.exit(f"widen_pair: {error}")


def save(source: str, shape: Shape, folder: Path, device: str, dtype: torch.dtype, int4: Int4Config | None) -> None:
    """Widen a model and write it with its tokenizer; an existing folder is replaced."""
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

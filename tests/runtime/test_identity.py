"""A model's identity: it detects and names every change that its forward depends on, and is equal in every process."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import os
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

import specdec
from specdec.runtime.attention.override import attention_override
from specdec.runtime.identity.hooks import find_hook, why_not_traceable
from specdec.runtime.identity.snapshot import Identity
from tests.helpers.families import FAMILIES, family, make_model, prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama", **FAMILIES["llama"])


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute, and restore it afterwards."""
    existed, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if existed:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def hook(register: Callable[..., Any], function: Callable[..., Any]) -> Iterator[None]:
    handle = register(function)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def submodule(owner: nn.Module, name: str, value: nn.Module) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def added(owner: nn.Module, name: str, value: nn.Module) -> Iterator[None]:
    owner.add_module(name, value)
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def new_code(function: types.FunctionType, other: Callable[..., Any]) -> Iterator[None]:
    """Replace a function's code, as IPython's autoreload does."""
    before = function.__code__
    function.__code__ = other.__code__
    try:
        yield
    finally:
        function.__code__ = before


class Lora(nn.Module):
    """A wrapper around a linear layer, as peft injects it: y = W x + B A x."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(4)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + x @ self.a.t() @ self.b.t()
        return y


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.silu(x)


def shifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A patch of a function that calls the original and shifts its result."""

    @functools.wraps(function)
    def moved(*args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        moved_by = torch.arange(y.shape[-1], device=y.device).remainder(2).to(y.dtype)
        return y + 3 * moved_by

    return moved


def swapped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary embeddings with sine and cosine exchanged."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * sin + modeling_llama.rotate_half(q) * cos, k * sin + modeling_llama.rotate_half(k) * cos


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 3 * torch.arange(output.shape[-1]).remainder(2)


def double_input(module: nn.Module, args: Any) -> Any:
    return (args[0] + torch.arange(args[0].shape[-1]).remainder(2), *args[1:])


def patched_rms(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0)
    return y


# Changes of a llama, undone when their context ends, and how each is named. Each changes the text.
Change = Callable[[Any], AbstractContextManager[None]]
CHANGES: dict[str, tuple[Change, str]] = {
    "a forward hook": (
        lambda m: hook(m.model.norm.register_forward_hook, double_output),
        "a forward hook is on model.norm",
    ),
    "a pre-hook": (
        lambda m: hook(m.model.layers[1].mlp.register_forward_pre_hook, double_input),
        "a forward pre-hook is on model.layers.1.mlp",
    ),
    "a scaling": (
        lambda m: attribute(m.model.layers[0].self_attn, "scaling", 3.0),
        "model.layers.0.self_attn.scaling is 3.0 and was 0.353",
    ),
    "a rotary scaling": (
        lambda m: attribute(m.model.rotary_emb, "attention_scaling", 1.5),
        "model.rotary_emb.attention_scaling is 1.5 and was 1.0",
    ),
    "an epsilon": (
        lambda m: attribute(m.model.layers[0].input_layernorm, "variance_epsilon", 3.0),
        "model.layers.0.input_layernorm.variance_epsilon is 3.0 and was 1e-06",
    ),
    "a forward of an instance": (
        lambda m: attribute(
            m.model.layers[0].input_layernorm,
            "forward",
            types.MethodType(patched_rms, m.model.layers[0].input_layernorm),
        ),
        "model.layers.0.input_layernorm.forward was added",
    ),
    "a forward of a class": (
        lambda m: attribute(modeling_llama.LlamaMLP, "forward", shifted(modeling_llama.LlamaMLP.forward)),
        "LlamaMLP.forward was replaced",
    ),
    "an inherited forward": (
        lambda m: attribute(nn.Linear, "forward", shifted(nn.Linear.forward)),
        "Linear.forward was replaced",
    ),
    "a function": (
        lambda m: attribute(modeling_llama, "apply_rotary_pos_emb", swapped),
        "modeling_llama.apply_rotary_pos_emb was replaced",
    ),
    "the code of a function": (
        lambda m: new_code(modeling_llama.rotate_half, lambda x: x.flip(-1)),
        "the code of modeling_llama.rotate_half was replaced",
    ),
    "torch's functional": (
        lambda m: attribute(nn.functional, "linear", shifted(nn.functional.linear)),
        "functional.linear was replaced",
    ),
    "an activation": (
        lambda m: submodule(m.model.layers[0].mlp, "act_fn", Doubled()),
        "model.layers.0.mlp.act_fn is a Doubled and was a SiLUActivation",
    ),
    "LoRA": (
        lambda m: submodule(m.model.layers[0].self_attn, "q_proj", Lora(m.model.layers[0].self_attn.q_proj)),
        "model.layers.0.self_attn.q_proj is a Lora and was a Linear",
    ),
    "another layer": (
        lambda m: submodule(m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[0].mlp, {id(m.config): m.config})),
        "model.layers.1.mlp was replaced",
    ),
    "one layer less": (lambda m: submodule(m.model, "layers", m.model.layers[:1]), "model.layers was replaced"),
}
# These do not change the text, but are not distinguished from changes that do.
QUIET: dict[str, tuple[Change, str]] = {
    "a hook of all modules": (
        lambda m: hook(nn.modules.module.register_module_forward_hook, lambda *args: None),
        "a forward hook is on all modules",
    ),
    "a module that is added": (lambda m: added(m.model.norm, "extra", Doubled()), "model.norm.extra was added"),
    "a config value": (lambda m: attribute(m.config, "rms_norm_eps", 0.5), "config.rms_norm_eps is 0.5 and was 1e-06"),
    "a nested config value": (
        lambda m: attribute(m.config, "rope_parameters", m.config.rope_parameters | {"rope_theta": 7.0}),
        "config.rope_parameters is {'rope_theta': 7.0",
    ),
    "training mode": (
        lambda m: attribute(m.model.layers[0], "training", True),
        "model.layers.0.training is True and was False",
    ),
    "a padding id": (
        lambda m: attribute(m.model.embed_tokens, "padding_idx", 3),
        "model.embed_tokens.padding_idx is 3 and was None",
    ),
}


@pytest.mark.parametrize("name", CHANGES | QUIET)
def test_each_change_is_named_and_gives_another_digest(model: PreTrainedModel, name: str) -> None:
    make, words = (CHANGES | QUIET)[name]
    identity = Identity(model)
    digest = identity.digest
    assert identity.change() is None
    with make(model):
        found = identity.change()
        other = Identity(model)
        assert other.change() is None
        assert (other.digest != digest) == (name != "another layer"), "weights alone are not part of the digest"
    assert found is not None
    assert found.startswith(words), found
    assert identity.change() is None
    assert Identity(model).digest == digest


def test_nested_values_are_compared_by_content(model: PreTrainedModel) -> None:
    identity = Identity(model)
    model.config.rope_parameters["rope_theta"] = 7.0
    assert identity.change() == "config.rope_parameters['rope_theta'] is 7.0 and was 10000.0"


def test_weights_may_be_written_and_replaced_but_not_reshaped_cast_or_untied() -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"tie_word_embeddings": True})
    model.tie_weights()
    identity = Identity(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32))
    assert identity.change() is None
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert str(identity.change()).endswith("on cpu, tied to lm_head.weight")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert identity.change() is None
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.ones(32, 48).t())
    assert "strides [1, 48] on cpu and was float32 [48, 32] with strides [32, 1]" in str(identity.change())
    model.double()
    assert str(identity.change()).startswith("lm_head.weight is float64 [101, 32]")


def test_writes_to_plain_tensors_count(model: PreTrainedModel) -> None:
    model.model.norm.factor = torch.ones(3)
    identity = Identity(model)
    assert identity.change() is None
    model.model.norm.factor.mul_(2)
    assert identity.change() == "model.norm.factor was written to"
    model.model.norm.factor = torch.ones(3)
    assert identity.change() == "model.norm.factor was replaced"


def test_values_of_helper_objects_count(model: PreTrainedModel) -> None:
    class Helper:
        def __init__(self) -> None:
            self.scale, self.table = 2.0, {"a": [1, 2]}

    model.model.norm.helper = Helper()
    identity = Identity(model)
    assert identity.change() is None
    model.model.norm.helper.table["a"].append(3)
    assert identity.change() == "model.norm.helper.table['a'][2] was added"
    model.model.norm.helper.table["a"].pop()
    model.model.norm.helper.scale = 3.0
    assert identity.change() == "model.norm.helper.scale is 3.0 and was 2.0"


def test_attributes_that_no_forward_reads_do_not_count(model: PreTrainedModel) -> None:
    identity = Identity(model)
    digest = identity.digest
    model.config._name_or_path = model.name_or_path = "somewhere/else"
    model.generation_config.temperature = 0.3
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    model.generate(**prompts(4), max_new_tokens=3)
    # transformers leaves hooks on the model after this call
    model.generate(**prompts(4), max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert identity.change() is None
    assert find_hook(model) is None
    assert Identity(model).digest == digest
    specdec.disable(model)
    assert identity.change() is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_call_changes_no_family(model_type: str) -> None:
    model = family(model_type)
    identity = Identity(model)
    digest = identity.digest
    model.generate(**prompts(4), max_new_tokens=2)
    assert identity.change() is None
    assert Identity(model).digest == digest == Identity(copy.deepcopy(model)).digest


def test_a_4_bit_model_is_the_same_before_and_after_its_layers_choose_a_kernel() -> None:
    model = copy.deepcopy(family("llama", "int4_kernel"))
    identity = Identity(model)
    model.generate(**prompts(4), max_new_tokens=2)
    assert identity.change() is None
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert identity.change() is None
    layer = next(module for module in model.modules() if hasattr(module, "use_kernel"))
    layer.use_kernel = False
    assert str(identity.change()).endswith("use_kernel is False and was True")


def test_a_hook_and_a_forward_of_an_instance_are_not_traceable(model: PreTrainedModel) -> None:
    assert why_not_traceable(model) is find_hook(model) is None
    for name in ("a forward hook", "a pre-hook", "a hook of all modules"):
        make, words = (CHANGES | QUIET)[name]
        with make(model):
            assert why_not_traceable(model) == find_hook(model) == words
    with CHANGES["a forward of an instance"][0](model):
        assert why_not_traceable(model) == "the forward of model.layers.0.input_layernorm was replaced"
        assert find_hook(model) is None
    assert why_not_traceable(model) is None


def test_an_identity_keeps_no_model_alive() -> None:
    model = make_model("llama", **FAMILIES["llama"])
    identity = Identity(model)
    specdec.enable(model, "prompt_lookup")
    identity.change()
    alive = weakref.ref(model)
    specdec.disable(model)
    del model
    gc.collect()
    assert alive() is None
    assert identity.change() == "the model is gone"


DIGESTS = """
import sys
import threading
from specdec.runtime.identity.snapshot import Identity
from tests.helpers.families import FAMILIES, make_model, prompts
for model_type in {families}:
    model = make_model(model_type, **FAMILIES[model_type])
    if {first}:
        model.generate(**prompts(4), max_new_tokens=2)
    print(Identity(model).digest)
"""


def test_two_processes_give_the_same_digests_whatever_ran_before() -> None:
    found = []
    families = ["llama", "gemma3_text", "mixtral", "gpt2"]
    for seed, order, first in (("1", families, False), ("2", families[::-1], True)):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }
        command = [sys.executable, "-c", DIGESTS.format(families=order, first=first)]
        output = subprocess.run(
            command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        found.append(dict(zip(order, output, strict=True)))
    assert found[0] == found[1]
    assert found[0]["llama"] == Identity(make_model("llama", **FAMILIES["llama"])).digest


MODELING = """
import torch
from torch import nn
from transformers import LlamaForCausalLM

SCALE = 1.5
TABLE = {"a": 2.0}


def helper(x, factor=1.0):
    return x * factor


def decorated(function):
    def around(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return around


class Helper:
    def __init__(self, power):
        self.power = power + 1

    def raised(self, x):
        return self.inner(x)

    def inner(self, x):
        return x**self.power


class Made:
    def __init__(self, by):
        self.by = by + 2

    def raised(self, x):
        return x - self.by


class Mixin:
    offset = 0.5

    @property
    def shift(self):
        return self.offset * 2

    def move(self, x):
        return helper(x) * SCALE + self.shift * TABLE["a"]


class Head(Mixin, nn.Linear):
    def forward(self, x):
        return Made(1.0).raised(self.helper.raised(self.move(super().forward(x))))


class Remote(LlamaForCausalLM):
    @decorated
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""
EDITS = [
    ("SCALE = 1.5", "SCALE = 1.25"),
    ('{"a": 2.0}', '{"a": 3.0}'),
    ("x * factor", "x + factor"),
    ("factor=1.0", "factor=2.0"),
    ("offset = 0.5", "offset = 0.25"),
    ("self.offset * 2", "self.offset * 3"),
    ("helper(x) * SCALE", "helper(x) / SCALE"),
    ("self.move(super().forward(x))", "super().forward(x)"),
    ("x**self.power", "x*self.power"),
    ("by + 2", "by + 3"),
    ("x - self.by", "x + self.by"),
    ("power + 1", "power + 2"),
    ("return function(self, *args, **kwargs)", "return function(self, *args, **(kwargs | {}))"),
    (
        "        return super().forward(*args, **kwargs)",
        "        output = super().forward(*args, **kwargs)\n        return output",
    ),
]


def remote(path: Path, text: str) -> Any:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("modeling_remote", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    exec(
        compile(text, str(path), "exec"), module.__dict__
    )  # not through the byte-code cache, which compares times in seconds
    torch.manual_seed(0)
    model = module.Remote(make_model("llama", **FAMILIES["llama"]).config).eval()
    model.lm_head.__class__ = module.Head
    model.lm_head.helper = module.Helper(1)
    return model


def test_every_edit_of_a_modeling_file_gives_another_digest(tmp_path: Path) -> None:
    def digest(text: str, name: str = "modeling_remote.py") -> str:
        model = remote(tmp_path / name, text)
        return Identity(model).digest

    digests = {digest(MODELING)}
    assert {digest("# a comment\n\n" + MODELING, "elsewhere.py")} == digests
    for old, new in EDITS:
        assert MODELING.count(old) == 1, old
        digests.add(digest(MODELING.replace(old, new)))
    assert len(digests) == 1 + len(EDITS)


def test_a_change_of_a_global_that_a_remote_forward_reads_is_named(tmp_path: Path) -> None:
    model = remote(tmp_path / "modeling_remote.py", MODELING)
    namespace = model.forward.__func__.__globals__
    identity = Identity(model)
    for name, value, words in (
        ("SCALE", 9.0, "modeling_remote.SCALE is 9.0 and was 1.5"),
        ("helper", abs, "modeling_remote.helper was replaced"),
    ):
        before, namespace[name] = namespace[name], value
        assert identity.change() == words
        namespace[name] = before
    namespace["TABLE"]["a"] = 5.0
    assert identity.change() == "modeling_remote.TABLE['a'] is 5.0 and was 2.0"
    namespace["TABLE"]["a"] = 2.0
    namespace["TABLE"]["a cache"] = 1.0
    assert identity.change() is None
    with attribute(namespace["Mixin"], "offset", 4.0):
        assert identity.change() == "Mixin.offset is 4.0 and was 0.5"
    with attribute(namespace["Head"], "move", lambda self, x: x):
        assert identity.change() == "Head.move was added"
    assert identity.change() is None


def test_a_forward_of_another_thread_is_no_change(model: PreTrainedModel) -> None:
    """During a specdec forward, the config has another attention implementation."""
    identity, is_over, found = Identity(model), threading.Event(), set()

    def run() -> None:
        while not is_over.is_set():
            with attention_override(model.config):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(500):
        found |= {identity.change(), Identity(model).change()}
    is_over.set()
    thread.join()
    assert found == {None}
    with attention_override(model.config):
        assert identity.change() is None


def test_a_function_of_torch_that_a_layer_names_counts(model: PreTrainedModel) -> None:
    identity = Identity(model)
    with attribute(torch, "rsqrt", shifted(torch.rsqrt)):
        assert identity.change() == "torch.rsqrt was replaced"
        assert Identity(model).digest != identity.digest
    with attribute(torch, "erfinv", shifted(torch.erfinv)):
        assert identity.change() is None


def test_a_global_that_only_a_decorated_function_names_counts(tmp_path: Path) -> None:
    head = "    def forward(self, *args, **kwargs):\n"
    model = remote(tmp_path / "modeling_remote.py", "LIMIT = 1\n" + MODELING.replace(head, head + "        LIMIT\n"))
    identity = Identity(model)
    model.forward.__func__.__globals__["LIMIT"] = 2
    assert identity.change() == "modeling_remote.LIMIT is 2 and was 1"


def test_a_class_that_is_set_in_place_counts(model: PreTrainedModel) -> None:
    identity = Identity(model)
    model.model.layers[0].mlp.act_fn.__class__ = Doubled
    assert identity.change() == "model.layers.0.mlp.act_fn is a Doubled and was a SiLUActivation"

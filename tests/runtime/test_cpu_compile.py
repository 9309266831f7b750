"""Compiled forwards: the same logits, the same texts, and eager decoding where a model cannot be compiled."""

from __future__ import annotations

import copy
import gc
import io
import os
import pwd
import random
import resource
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from specdec_kernels import cpu
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

import specdec
from specdec.generation.call import MAX_PLAIN_STEPS
from specdec.runtime.attention.override import attention_override
from specdec.runtime.cpu_compile import forward as compiled_forward
from specdec.runtime.cpu_compile import packages, tracing
from specdec.runtime.cpu_compile.forward import CompiledForward
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.pair import PairMember
from specdec.runtime.prepare import prepare
from specdec.runtime.runner import ModelRunner
from specdec.utils import embedded
from tests.conftest import ROOT
from tests.generation import test_distribution, test_lossless
from tests.generation.test_concurrency import in_threads
from tests.helpers.checkpoint_writers import Case, write
from tests.helpers.drafters import AlwaysWrong
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.plain import CALLS, WIDTH, RecordingStreamer, continuation, pair, tokenizer
from tests.runtime import test_identity

pytestmark = pytest.mark.usefixtures("cpu_kernels")
COMPILED_FAMILIES = ("llama", "gemma3_text")
CASES = [
    case
    for case in test_lossless.covering()
    if case.family in COMPILED_FAMILIES and case.weights in ("float32", "int4_kernel")
]


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specdec runs without")
        yield


def state_of(model: PreTrainedModel) -> Any:
    return model.__dict__["_specdec_state"]


def is_compiled(model: PreTrainedModel) -> bool:
    state = state_of(model)
    return all(member.runner.compiled is not None for member in state.members(state.drafter))


@cache
def family_on_kernels(model_type: str, weights: str) -> tuple[PreTrainedModel, dict[Any, Tensor]]:
    """A test model whose 4-bit layers use the CPU kernels, and its plain texts by batch size."""
    return family.__wrapped__(model_type, weights), {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_greedy_text_equals_plain_text(case: test_lossless.Case) -> None:
    model, texts = family_on_kernels(case.family, case.weights)
    call = prompts(case.batch_size) | {"max_new_tokens": test_lossless.NEW_TOKENS, "do_sample": False}
    specdec.disable(model)
    if case.batch_size not in texts:
        texts[case.batch_size] = model.generate(**call, eos_token_id=None)
    eos_token_id = int(texts[case.batch_size][-1, 11 + 6]) if case.has_eos else None
    expected = model.generate(**call, eos_token_id=eos_token_id)
    specdec.enable(
        model, test_lossless.DRAFTERS[case.drafter](case), num_draft_tokens=case.num_draft_tokens, compile=True
    )
    assert is_compiled(model)
    assert model.generate(**call, eos_token_id=eos_token_id).tolist() == expected.tolist()
    assert specdec.last_stats(model) is not None


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", CALLS)
def test_any_call_gives_plain_text(name: str, batch_size: int, kind: str) -> None:
    model, draft = pair("llama")
    call = CALLS[name](continuation("llama", batch_size))
    inputs = prompts(batch_size)
    specdec.disable(model)
    call = {"max_new_tokens": 18, "do_sample": False} | call
    want = model.generate(**inputs, **copy.copy(call))
    specdec.enable(model, draft if kind == "model" else kind, num_draft_tokens=3, compile=True)
    assert is_compiled(model)
    got = model.generate(**inputs, **call)
    specdec.disable(model)
    assert got[:, WIDTH:].tolist() == want[:, WIDTH:].tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_compiled_draft_model_drafts_the_same_tokens(batch_size: int) -> None:
    """An error in a draft model does not change the text, but it lowers the acceptance rate."""
    model, _ = pair("llama")
    rates = []
    for draft in (copy.deepcopy(model), pair("llama")[1]):
        for compile in (False, True):
            specdec.enable(model, draft, num_draft_tokens=5, compile=compile)
            assert is_compiled(model) == compile
            model.generate(**prompts(batch_size), max_new_tokens=40, do_sample=False)
            rates.append(specdec.last_stats(model).draft_acceptance_rate)
    specdec.disable(model)
    assert rates[:2] == [1.0, 1.0]
    assert rates[2] == rates[3] < 1.0


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_draft_in_one_call_is_that_of_the_loop(
    batch_size: int, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft has ids that the target lacks."""
    model = pair("llama")[0]
    specdec.enable(model, wider_draft(), num_draft_tokens=4, compile=True)
    lengths: list[int] = []
    in_one_call = CompiledForward.draft

    def counted(*args: Any, **kwargs: Any) -> Any:
        ids, probs = in_one_call(*args, **kwargs)
        lengths.append(ids.shape[1])
        return ids, probs

    monkeypatch.setattr(CompiledForward, "draft", counted)

    def results() -> Any:
        torch.manual_seed(3)
        text = model.generate(**prompts(batch_size), max_new_tokens=40, do_sample=do_sample, top_k=0)
        stats = specdec.last_stats(model)
        return text.tolist(), stats.draft_acceptance_rate, stats.num_draft_tokens

    found = results()
    num_calls = len(lengths)
    assert num_calls > 5
    assert max(lengths) == 4
    monkeypatch.setattr(ModelRunner, "compiled", property(lambda self: None))  # the forwards themselves stay compiled
    assert results() == found
    assert len(lengths) == num_calls
    monkeypatch.undo()
    specdec.disable(model)


@pytest.mark.parametrize("has_eos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_plain_steps_in_one_call_are_those_of_the_loop(
    batch_size: int, has_eos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair("llama")[0]
    call = prompts(batch_size) | {"max_new_tokens": 40, "do_sample": False}
    stop_id = continuation("llama", batch_size)[-1][6] if has_eos else None
    want = model.generate(**call, eos_token_id=stop_id).tolist()
    specdec.enable(model, "none", num_draft_tokens="auto" if has_eos else 1, compile=True)
    counts = counted_plain_steps(monkeypatch)
    assert model.generate(**call, eos_token_id=stop_id).tolist() == want
    in_calls = specdec.last_stats(model)
    assert sum(counts) == in_calls.num_target_forwards
    assert counts[0] == min(MAX_PLAIN_STEPS, in_calls.num_target_forwards) > 1
    assert all(counts)
    num_calls = len(counts)
    monkeypatch.setattr(ModelRunner, "has_plain_steps", False)
    assert model.generate(**call, eos_token_id=stop_id).tolist() == want
    assert len(counts) == num_calls
    assert specdec.last_stats(model) == in_calls
    specdec.disable(model)


def test_plain_steps_of_auto_k_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do those of its profile. The drafter is never right, so few steps draft."""
    model = pair("llama")[0]
    call = prompts(1) | {"max_new_tokens": 120, "do_sample": False}
    want = model.generate(**call).tolist()
    specdec.enable(model, AlwaysWrong(pair("llama")[0]), num_draft_tokens="auto", compile=True)
    counts = counted_plain_steps(monkeypatch)
    for _ in range(3):
        counts.clear()
        assert model.generate(**call).tolist() == want
        assert max(counts) > 1
    specdec.disable(model)


def counted_plain_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of each call of CompiledForward.run_plain_steps from now on."""
    counts: list[int] = []
    run = CompiledForward.run_plain_steps

    def counted(*args: Any) -> Any:
        steps = run(*args)
        counts.append(len(steps))
        return steps

    monkeypatch.setattr(CompiledForward, "run_plain_steps", counted)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0},
        {"repetition_penalty": 1.2},
        {"suppress_tokens": [3]},
        {"stop_strings": ["never written"], "tokenizer": tokenizer()},
        {"return_dict_in_generate": True, "output_scores": True},
        {"streamer": RecordingStreamer()},
        {"stopping_criteria": [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 30)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_steps_that_the_host_takes_part_in_run_one_at_a_time(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair("llama")[0]
    specdec.enable(model, "none", compile=True)
    counts = counted_plain_steps(monkeypatch)
    model.generate(**prompts(1), max_new_tokens=20, **({"do_sample": False} | options))
    assert specdec.last_stats(model).num_target_forwards > 10
    assert counts == []
    specdec.disable(model)


def test_timed_steps_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("llama")[0]
    counts = counted_plain_steps(monkeypatch)
    specdec.enable(model, "none", compile=True, timing=True)
    model.generate(**prompts(1), max_new_tokens=20, do_sample=False)
    assert len(specdec.last_stats(model).timing.steps) == 20
    assert counts == []
    specdec.disable(model)


@cache
def wider_draft() -> PreTrainedModel:
    """A draft whose ids agree with the target's often, and not always."""
    model = pair("llama")[1]
    draft = make_model("llama", **FAMILIES["llama"], vocab_size=VOCAB_SIZE + 9)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = draft.state_dict()[name].clone()
        whole[:VOCAB_SIZE] = weights[name]
        weights[name] = whole
    draft.load_state_dict(weights)
    return draft


@pytest.mark.parametrize("drafter", ["model", "prompt_lookup", "eagle3", "random", "none"])
def test_sampled_texts_have_the_targets_distribution(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enable = specdec.enable

    def enable_compiled(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
        enable(model, *args, **kwargs, compile=True)
        assert is_compiled(model)
        return model

    monkeypatch.setattr(specdec, "enable", enable_compiled)
    make = test_distribution.DRAFTERS.get(drafter, lambda model: drafter)
    [p] = test_distribution.sampled_p_values(make(test_distribution.tiny_model(0)), "temperature")
    assert p > test_distribution.SIGNIFICANCE


@cache
def embedded_pair(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (embedded.TARGET, embedded.DRAFT)
    )
    return target, draft


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_logits_of_a_4_bit_target_are_bit_exact(dtype: torch.dtype) -> None:
    target, _ = embedded_pair(dtype)
    # prompts of more than 64 positions run compiled too
    assert_bit_exact(target, (1, 2, 6, 9), [200], [70], [1], [200, 1, 33])


@pytest.mark.parametrize("weights", ["float32", "int4_kernel"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_norms_attention_and_blocks_are_one_operator_each(model_type: str, weights: str) -> None:
    """Of Llama's form; qwen3 has norms of queries and keys too, and gemma3 adds 1 to the weights of its norms."""
    model, _ = family_on_kernels(model_type, weights)
    program, _ = tracing.trace(PairMember("target", ModelRunner(model), exact=True))
    counts = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    layers = model.config.num_hidden_layers
    is_llama, is_fused = model_type == "llama", model_type != "gemma3_text"
    has_mlp_blocks = is_fused and weights == "float32"  # else the last layer of the test models' MLPs alone is dense
    assert counts["specdec.attention_block.default"] == layers * is_llama
    assert counts["specdec.mlp_block.default"] == layers * has_mlp_blocks
    assert counts["specdec.rotary_attention.default"] == layers * (not is_llama)
    assert counts["specdec.attention.default"] == counts["aten.index_put_.default"] == 0
    blocks = counts["specdec.attention_block.default"] + counts["specdec.mlp_block.default"]
    assert counts["specdec.add_rms_norm.default"] == 2 * layers * is_fused - blocks
    assert counts["specdec.rms_norm.default"] == (1 + 2 * layers * (model_type == "qwen3")) * is_fused
    assert counts["specdec.cos_sin.default"] >= 1
    assert counts["aten.cos.default"] == counts["specdec.cos.default"] == 0
    assert (counts["specdec.mean.default"] == 0) == is_fused


def test_activation_order_and_experts_are_bit_exact(tmp_path: Path) -> None:
    """The order of columns is a parameter of a layer; a router's sums and softmax are PyTorch's."""
    case = Case(
        "gptq", "mixtral", act_order=True, symmetric=False, values={"num_hidden_layers": 1, "num_local_experts": 12}
    )
    write(tmp_path / "checkpoint", case)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "specdec keeps in full precision")
        model = specdec.load_quantized(tmp_path / "checkpoint", dtype=torch.float32)
    assert_bit_exact(model, (1, 6), [70], [70, 1, 33])


def assert_bit_exact(model: PreTrainedModel, widths: Sequence[int], *batches: list[int]) -> None:
    """After prompts of these lengths, with a rejected window before the one that is compared."""
    runner = ModelRunner(model)
    prepare([PairMember("target", runner, exact=True)], True)
    forward = runner.compiled
    assert forward is not None
    ids = torch.randint(runner.vocab_size, (3, max(batches[-1]) + 10), generator=torch.Generator().manual_seed(0))
    for lengths in batches:
        last = torch.tensor(lengths)
        for width in widths:
            got = []
            for runner.compiled in (None, forward):
                runner.begin(len(lengths), ids.shape[1])
                runner.prefill(ids[: len(lengths)], last - 1)
                positions = last[:, None] - 1 + torch.arange(width)
                rejected = runner.forward(ids[: len(lengths)].flip(1).gather(1, positions), positions).logits
                got.append((rejected, runner.forward(ids[: len(lengths)].gather(1, positions), positions).logits))
            assert got[0][0].equal(got[1][0])
            assert got[0][1].equal(got[1][1])


@pytest.mark.parametrize("num_draft_tokens", [2, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_embedded_pair_writes_plain_text_beyond_the_first_buffers(batch_size: int, num_draft_tokens: int) -> None:
    target, draft = embedded_pair(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")
    texts = [p["prompt"] for p in embedded.prompts()[3 :: len(embedded.prompts()) // 4]][:batch_size]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=220)
    call = {"max_new_tokens": 160, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    specdec.disable(target)
    expected = target.generate(**inputs, **call)
    assert expected.shape[1] > 256
    specdec.enable(target, draft, num_draft_tokens=num_draft_tokens, compile=True)
    assert is_compiled(target)
    got = target.generate(**inputs, **call)
    stats = specdec.last_stats(target)
    specdec.disable(target)
    assert got.tolist() == expected.tolist()
    assert stats.num_accepted_draft_tokens > 0


@pytest.fixture
def small() -> PreTrainedModel:
    """A model that no other test has compiled."""
    return make_model("llama", 3, **FAMILIES["llama"] | {"intermediate_size": 32, "num_hidden_layers": 1})


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder with the kernels and nothing else."""
    kernels = cpu.built_at()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    cpu.built_at().write_bytes(kernels.read_bytes())
    return tmp_path


def num_packages(cache: Path) -> int:
    """Number of packages; no unfinished files may be in the folder."""
    assert {path.suffix for path in cache.iterdir()} <= {".so", ".pt2", ".lock", ""}
    assert len(list(cache.glob("*.so"))) == 1
    return len(list(cache.glob("*.pt2")))


def test_a_lock_holds_back_those_who_compile_the_same_and_nobody_else(
    small: PreTrainedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = {}

    def compile_nothing(member: PairMember, package: Path, *_: Any) -> None:
        for path in (package.with_suffix(".lock"), own_cache / ".lock"):
            try:
                with FileLock(path, timeout=0):  # as another process would
                    locked[path.stem] = False
            except Timeout:
                locked[path.stem] = True
        raise RuntimeError("not compiled")

    monkeypatch.setattr(packages, "_compile", compile_nothing)
    with pytest.warns(UserWarning, match="not compiled"):
        specdec.enable(small, "prompt_lookup", compile=True)
    assert sorted(locked.values()) == [False, True]
    assert locked[".lock"] is False  # of the kernels


def test_a_package_that_another_process_has_compiled_meanwhile_is_used(
    small: PreTrainedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waited(FileLock):
        """A lock that was held while another process compiled."""

        def __enter__(self) -> Any:
            lock = super().__enter__()
            if "forward" in self.lock_file:
                Path(self.lock_file).with_suffix(".pt2").touch()
            return lock

    monkeypatch.setattr(packages, "FileLock", Waited)
    monkeypatch.setattr(packages, "trace", None)  # nothing is compiled
    monkeypatch.setattr(packages, "_FAILURES", {})
    member = PairMember("target", ModelRunner(small), exact=True)
    assert packages.build_packages([member]) == []
    assert num_packages(own_cache) == 1


def test_threads_take_turns_in_a_package() -> None:
    """A call whose inputs die while it runs needs the GIL, and the package is not run twice at once."""
    target, _ = embedded_pair(torch.float32)
    specdec.enable(target, "none", compile=True)
    runners = [state_of(target).target.spare() for _ in range(2)]
    ids = torch.arange(10, 30).view(2, 10)

    def run(runner: ModelRunner) -> Tensor:
        assert runner.compiled is not None
        runner.begin(2)
        runner.prefill(ids, torch.tensor([5, 5]))
        positions = torch.arange(6, 8).repeat(2, 1)
        for _ in range(150):
            logits = runner.forward(ids[:, 6:7], positions[:, :1]).logits  # not contiguous, so copies are the inputs
        return logits

    first, second = in_threads(lambda: run(runners[0]), lambda: run(runners[1]))
    assert isinstance(first, Tensor), first
    assert first.equal(second)


def text_of(model: PreTrainedModel) -> list[list[int]]:
    output: Tensor = model.generate(**prompts(4), max_new_tokens=9, do_sample=False)
    return output.tolist()


def test_auto_uses_packages_on_disk_and_compiles_nothing(
    small: PreTrainedModel, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.enable_progress_bar()  # another test may have turned it off
    want = text_of(small)
    specdec.enable(small, "prompt_lookup")
    assert not is_compiled(small)
    assert num_packages(own_cache) == 0
    capsys.readouterr()
    specdec.enable(small, "prompt_lookup", compile=True)
    assert is_compiled(small)
    assert num_packages(own_cache) == 1
    assert "compiling the target" in capsys.readouterr().err
    specdec.enable(small, "prompt_lookup", compile=True)
    assert "compiling" not in capsys.readouterr().err
    specdec.enable(small, "prompt_lookup", compile=False)
    assert not is_compiled(small)
    specdec.enable(small, "prompt_lookup")
    assert is_compiled(small)
    assert text_of(small) == want
    specdec.enable(make_model("llama", 3, **FAMILIES["llama"] | {"num_hidden_layers": 1}), "prompt_lookup")
    assert num_packages(own_cache) == 1


def test_a_damaged_package_is_ignored_and_named(small: PreTrainedModel, own_cache: Path) -> None:
    want = text_of(small)
    specdec.enable(small, "prompt_lookup", compile=True)
    (package,) = own_cache.glob("*.pt2")
    package.write_bytes(b"damaged")
    compiled_forward._LOADED.clear()  # as in another process
    with pytest.warns(UserWarning, match="the target runs eagerly: .* does not load"):
        specdec.enable(small, "prompt_lookup")
    assert not is_compiled(small)
    assert text_of(small) == want


def test_a_model_runs_eagerly_when_the_compiler_fails(
    small: PreTrainedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("g++: failed\nand more output")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    want = text_of(small)
    with pytest.warns(UserWarning, match=r"the target could not be compiled: RuntimeError: g\+\+: failed$") as warned:
        specdec.enable(small, "prompt_lookup", compile=True)
    assert len(warned) == 1
    assert not is_compiled(small)
    assert text_of(small) == want
    assert num_packages(own_cache) == 0
    monkeypatch.setattr(packages, "trace", None)  # no second attempt
    with pytest.warns(UserWarning, match="g\\+\\+: failed$"):
        specdec.enable(small, "prompt_lookup", compile=True)


def test_a_model_runs_eagerly_without_a_compiler(
    small: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    want = text_of(small)
    with pytest.warns(
        UserWarning, match=r"the kernels could not be built: RuntimeError: no C\+\+ compiler was found"
    ) as warned:
        specdec.enable(small, "prompt_lookup", compile=True)
    assert len(warned) == 1
    assert not is_compiled(small)
    assert text_of(small) == want


def test_a_wrong_compiled_forward_is_not_used(
    small: PreTrainedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = tracing._replace_operator

    def wrong(node: Any, *flags: bool) -> None:
        if node.target == torch.ops.aten.silu.default:
            node.target = torch.ops.aten.relu.default
        replace(node, *flags)

    monkeypatch.setattr(tracing, "_replace_operator", wrong)
    with pytest.warns(UserWarning, match="the compiled forward gives other logits"):
        specdec.enable(small, "prompt_lookup", compile=True)
    assert not is_compiled(small)
    assert num_packages(own_cache) == 0


def test_a_compiled_4_bit_target_that_is_not_bit_exact_is_not_used(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without replaced operators, logits change by rounding, which a dense model may do and a 4-bit target may not."""
    model, _ = family_on_kernels("llama", "int4_kernel")
    monkeypatch.setattr(tracing, "fuse", lambda graph: None)
    monkeypatch.setattr(tracing, "_replace_operator", lambda node, *flags: None)
    with pytest.warns(UserWarning, match="the compiled forward gives other logits"):
        specdec.enable(model, "prompt_lookup", compile=True)
    assert not is_compiled(model)
    assert num_packages(own_cache) == 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make_model("llama", 3, **FAMILIES["llama"]).double(), "its dtype is torch.float64"),
        (lambda: make_model("gemma2", 3, **FAMILIES["gemma2"]), r"its attention \(eager\)"),
        (lambda: make_model("mpt", 3, **FAMILIES["mpt"]), "its forward takes no position_ids"),
    ],
)
def test_the_reason_why_a_model_cannot_be_compiled_is_named(model: Any, reason: str, own_cache: Path) -> None:
    model = model()
    want = text_of(model)
    with pytest.warns(UserWarning, match=f"the target cannot be compiled: {reason}"):
        specdec.enable(model, "prompt_lookup", compile=True)
    assert text_of(model) == want


def test_a_bad_value_is_refused(small: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="compile='yes' must be True, False or 'auto'"):
        specdec.enable(small, "prompt_lookup", compile="yes")


def test_weights_may_be_written_replaced_and_cast(small: PreTrainedModel) -> None:
    specdec.enable(small, "prompt_lookup", compile=True)
    before = text_of(small)
    other = make_model("llama", 4, **FAMILIES["llama"] | {"intermediate_size": 32, "num_hidden_layers": 1})
    for change in (
        lambda: small.load_state_dict(other.state_dict()),
        lambda: small.lm_head.__setattr__("weight", torch.nn.Parameter(small.lm_head.weight.flip(0).clone())),
    ):
        change()
        got = text_of(small)
        assert is_compiled(small)
        specdec.disable(small)
        assert got == text_of(small) != before
        before = got
        specdec.enable(small, "prompt_lookup", compile=True)
    small.double()
    text = text_of(small)
    assert state_of(small).target.compiled is None
    specdec.disable(small)
    assert text == text_of(small)


def test_a_4_bit_target_may_be_loaded_again() -> None:
    model, _ = family_on_kernels("llama", "int4_kernel")
    model = copy.deepcopy(model)
    specdec.enable(model, "prompt_lookup", compile=True)
    want = text_of(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # in the canonical layout
    assert text_of(model) == want
    assert is_compiled(model)


def test_the_assistant_model_of_a_call_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = pair("llama")
    specdec.disable(model)
    want = text_of(model)
    specdec.enable(model, compile=True)
    ran = []

    def watch(name: str) -> None:
        call = getattr(CompiledForward, name)

        def watched(self: Any, *args: Any) -> Any:
            ran.append(self.model())
            return call(self, *args)

        monkeypatch.setattr(CompiledForward, name, watched)

    watch("__call__")
    watch("draft")
    got = model.generate(**prompts(4), max_new_tokens=9, do_sample=False, assistant_model=draft, num_assistant_tokens=3)
    specdec.disable(model)
    assert got.tolist() == want
    assert {id(one) for one in ran} == {id(model), id(draft)}


def plain_text(model: PreTrainedModel) -> list[list[int]]:
    """Text of a fresh copy, which was never compiled."""
    return text_of(copy.deepcopy(model))


@pytest.fixture
def shared() -> Iterator[PreTrainedModel]:
    """A copy of a model whose package is in the tests' cache folder, enabled with it."""
    model = copy.deepcopy(pair("llama")[0])
    specdec.disable(model)
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3, compile=True)
    assert is_compiled(model)
    yield model
    specdec.disable(model)


REVERSIBLE = {
    name: make for name, (make, _) in (test_identity.CHANGES | test_identity.QUIET).items() if name != "one layer less"
}


def write_weights(model: PreTrainedModel, generator: random.Random) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(generator.randrange(1, 100), 0))


def replace_weights(model: PreTrainedModel, generator: random.Random) -> None:
    weight = model.lm_head.weight.detach().roll(generator.randrange(1, 100), 0)
    model.lm_head.weight = torch.nn.Parameter(weight.clone())


@pytest.mark.filterwarnings("ignore:the target runs eagerly", "ignore:specdec leaves this call to the stock loop")
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_model_writes_its_own_text(shared: PreTrainedModel, seed: int) -> None:
    """Changes are made and undone in random order; without any, the compiled forward runs again."""
    generator = random.Random(seed)
    active: dict[str, ExitStack] = {}
    modes = set()
    for step in range(24):
        kind = generator.choice(["change", "undo", "undo", "weights"]) if step else "weights"
        if kind == "weights":
            generator.choice([write_weights, replace_weights])(shared, generator)
        elif kind == "undo" and active:
            active.pop(generator.choice(sorted(active))).close()
        elif inactive := sorted(REVERSIBLE.keys() - active.keys()):
            name = generator.choice(inactive)
            active[name] = ExitStack()
            active[name].enter_context(REVERSIBLE[name](shared))
        assert text_of(shared) == plain_text(shared), active.keys()
        ran_compiled = is_compiled(shared) and specdec.last_stats(shared) is not None  # with hooks the stock loop runs
        assert ran_compiled == (not active)
        modes.add(ran_compiled)
    while active:
        active.pop(generator.choice(sorted(active))).close()
    assert text_of(shared) == plain_text(shared)
    assert is_compiled(shared)
    assert modes == {True, False}


@pytest.mark.parametrize("name", test_identity.CHANGES)
def test_a_change_changes_the_text_and_is_named_once(shared: PreTrainedModel, name: str) -> None:
    make, words = test_identity.CHANGES[name]
    before = text_of(shared)
    with warnings.catch_warnings(record=True) as caught, make(shared):
        warnings.simplefilter("always")
        texts = [text_of(shared) for _ in range(2)]
        assert texts == [plain_text(shared)] * 2
    messages = [str(warning.message) for warning in caught]
    messages = [message for message in messages if message.startswith(("the target", "specdec"))]
    if "hook" in name:  # the stock loop runs, whose forwards show a hook one position at a time
        assert [message.partition(": ")[2].startswith("a hook on") for message in messages] == [True] * 2, messages
    else:
        assert [message.startswith(f"the target runs eagerly: {words}") for message in messages] == [True], messages
    assert texts[0] != before == text_of(shared)
    assert is_compiled(shared)


def test_nothing_is_compiled_while_a_hook_is_on(shared: PreTrainedModel) -> None:
    folder = cpu.cache_folder()
    packages_before, clean = set(folder.iterdir()), text_of(shared)
    handle = shared.model.norm.register_forward_hook(test_identity.double_output)
    with pytest.warns(UserWarning, match="the target cannot be compiled: a forward hook is on model.norm$") as warned:
        specdec.enable(shared, "prompt_lookup", compile=True)
    assert len(warned) == 1
    assert text_of(shared) == plain_text(shared) != clean
    handle.remove()
    assert text_of(shared) == clean
    assert not is_compiled(shared)
    specdec.enable(shared, "prompt_lookup", compile=True)
    assert is_compiled(shared)
    assert text_of(shared) == clean
    assert set(folder.iterdir()) == packages_before


def test_a_replaced_sdpa_is_not_bypassed(shared: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, 0 * query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", uniform)
    with pytest.warns(UserWarning, match="the target runs eagerly: transformers' sdpa attention was replaced"):
        assert text_of(shared) == plain_text(shared)
    with pytest.warns(UserWarning, match="the target cannot be compiled: transformers' sdpa attention was replaced"):
        specdec.enable(shared, "prompt_lookup", compile=True)
    assert text_of(shared) == plain_text(shared)


def test_a_call_under_autocast_is_eager(shared: PreTrainedModel, small: PreTrainedModel, own_cache: Path) -> None:
    """Its text is an eager model's. Plain decoding may write another: two ids have equal logits in bfloat16 there."""
    clean = text_of(shared)
    eager = copy.deepcopy(shared)
    specdec.enable(eager, "prompt_lookup", num_draft_tokens=3, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"the target runs eagerly: torch\.autocast is on"):
            assert text_of(shared) == text_of(eager)
        assert not is_compiled(shared)
        with pytest.warns(UserWarning, match=r"nothing is compiled under torch\.autocast"):
            prepare([PairMember("target", ModelRunner(small), exact=True)], True)
    assert text_of(shared) == clean
    assert is_compiled(shared)
    assert num_packages(own_cache) == 0


def test_a_compiled_model_can_be_garbage_collected() -> None:
    model = copy.deepcopy(pair("llama")[0])
    specdec.enable(model, "prompt_lookup", compile=True)
    assert is_compiled(model)
    text_of(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.fixture
def filled_cache(shared: PreTrainedModel, own_cache: Path) -> Path:
    """The path of the shared model's package, copied to a separate cache folder."""
    package = package_of(shared)
    assert package.parent == own_cache
    package.write_bytes((ROOT / "build" / "test-cache" / package.name).read_bytes())
    specdec.disable(shared)
    compiled_forward._LOADED.clear()
    specdec.enable(shared, "prompt_lookup")
    assert is_compiled(shared), "a parent folder may have the sticky bit, as /tmp has"
    return package


def package_of(model: PreTrainedModel) -> Path:
    return packages.package_path(PairMember("target", ModelRunner(model), exact=True), Identity(model))


def assert_one_warning(model: PreTrainedModel, words: str, **enable: Any) -> None:
    """Enabling gives one warning, with these words; the model runs eagerly and writes its own text."""
    specdec.disable(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        specdec.enable(model, "prompt_lookup", **enable)
        text = text_of(model)
    messages = [str(warning.message) for warning in caught]
    assert [words in message for message in messages] == [True], messages
    assert not is_compiled(model)
    assert text == plain_text(model)


def change_owner(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another user the owner of a path."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)


@pytest.mark.parametrize("which", ["package", "folder"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_package_that_others_may_write_is_not_loaded(
    shared: PreTrainedModel, filled_cache: Path, which: str, mode: int
) -> None:
    path = filled_cache if which == "package" else filled_cache.parent
    path.chmod(mode)
    assert_one_warning(shared, f"the target runs eagerly: other users may write to {path}; chmod go-w it")
    path.chmod(0o700)
    specdec.enable(shared, "prompt_lookup")
    assert is_compiled(shared)


@pytest.mark.parametrize("compile", ["auto", True])
@pytest.mark.parametrize("which", ["library", "folder"])
def test_kernels_that_others_may_write_are_not_loaded(
    small: PreTrainedModel, own_cache: Path, which: str, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cpu.built_at() if which == "library" else own_cache
    path.chmod(0o722)
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    assert_one_warning(small, f"specdec's CPU kernels are not used: other users may write to {path}", compile=compile)
    assert num_packages(own_cache) == 0


@pytest.mark.parametrize("which", ["package", "folder"])
def test_a_package_that_another_user_owns_is_not_loaded(
    shared: PreTrainedModel, filled_cache: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_owner(filled_cache if which == "package" else filled_cache.parent, monkeypatch)
    assert_one_warning(shared, "belongs to another user; remove it, or set SPECDEC_CACHE to a folder of your own")


def test_the_target_of_a_link_is_checked(shared: PreTrainedModel, filled_cache: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    target = elsewhere / filled_cache.name
    filled_cache.rename(target)
    filled_cache.symlink_to(target)
    elsewhere.chmod(0o777)
    assert_one_warning(shared, f"other users may write to {elsewhere}")


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("SPECDEC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))


def below_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_file(monkeypatch, tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file" / "folder"))


def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "locked"))
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)


@pytest.mark.parametrize("spoil", [no_home, a_file, below_a_file, read_only])
@pytest.mark.parametrize("is_built", [True, False])
def test_a_model_runs_eagerly_when_the_cache_folder_cannot_be_used(
    small: PreTrainedModel, is_built: bool, spoil: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not is_built:
        monkeypatch.setattr(cpu, "_IS_LOADED", None)
    spoil(monkeypatch, tmp_path)
    assert_one_warning(small, "specdec runs without compiled forwards: the cache folder cannot be used: ", compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.enable(small, "prompt_lookup", compile="auto")
    assert text_of(small) == plain_text(small)


def test_a_full_disk_leaves_no_files_and_the_model_runs_eagerly(
    small: PreTrainedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the package is written; a compiler that finds the disk full fails like any other."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def compiles(program: Any, *, package_path: io.BytesIO, inductor_configs: Any) -> None:
        package_path.write(bytes(1 << 16))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiles)
    try:
        assert_one_warning(small, "the target could not be compiled: OSError: [Errno 27] File too large", compile=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert num_packages(own_cache) == 0


def test_the_cache_folder_is_accessible_to_its_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "a" / "b"))
    mask = os.umask(0)
    try:
        assert cpu.make_cache_folder() == tmp_path / "a" / "b"
    finally:
        os.umask(mask)
    assert [(tmp_path / place).stat().st_mode & 0o777 for place in ("a", "a/b")] == [0o700, 0o700]


@pytest.mark.parametrize("weights", ["float32", "int4_kernel"])
def test_the_name_of_a_package_depends_on_every_module_that_is_traced(weights: str) -> None:
    """Otherwise a package of old code would stay in use after an edit of such a module."""
    runner = ModelRunner(family_on_kernels("llama", weights)[0])
    runner.begin(1)
    ids = torch.ones(1, 6, dtype=torch.int64)
    runner.prefill(ids, torch.tensor([2]))
    buffers = [buffer.clone() for buffer in runner.cache.buffers()]
    inputs = ids[:, 3:], torch.arange(3, 6)[None], torch.arange(3), buffers
    files = set()
    with attention_override(runner.config), torch.no_grad():
        sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
        try:
            tracing._Forward(runner)(*inputs)
        finally:
            sys.setprofile(None)
    traced = {path for path in map(Path, files) if path.is_relative_to(ROOT / "specdec")}
    assert {ROOT / "specdec" / "runtime" / name for name in ("model_forward.py", "cpu_compile/tracing.py")} <= traced
    assert traced <= set(packages.traced_sources())

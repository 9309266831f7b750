"""The schema of an experiment. Files in conf/ contain values for these classes and name their class as `_target_`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.core.sampling import VERIFICATIONS
from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.drafters.resolve import AUTO, resolve_drafter, with_suffix_decoding
from specdec.quant.config import Int4Config
from specdec.runtime.loading import DTYPES, load


@dataclass
class TargetConfig:
    """The target model.

    path: a folder or a hub id. dtype: of all but 4-bit weights; "auto" is float32 on a CPU, elsewhere the checkpoint's.
    device: "cpu", "cuda", …; "auto" is the device of this process.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_dtype("target.dtype", self.dtype)

    def load(self, device: str, quant: QuantConfig) -> PreTrainedModel:
        """Load the model on a device."""
        dtype = "float32" if self.dtype == "auto" and device == "cpu" else self.dtype
        return load(self.path, dtype, device, quant.int4_config())


@dataclass
class QuantConfig:
    """Whether the target is quantized while it is loaded. A 4-bit checkpoint is loaded as it is, with int4=false."""

    int4: bool = False
    group_size: int = 128
    symmetric: bool = True
    skip_modules: list[str] = field(default_factory=list)
    head: str | None = "int8"
    activations: str | None = "int8"

    def int4_config(self) -> Int4Config | None:
        """How to quantize; None where int4 is false."""
        if not self.int4:
            return None
        return Int4Config(self.group_size, self.symmetric, list(self.skip_modules), self.head, self.activations)


@dataclass
class DraftModel:
    """A smaller model as the drafter. dtype: "auto" is the target's. int4: quantize it while it is loaded."""

    path: str
    dtype: str = "auto"
    int4: bool = False
    group_size: int = 128

    def __post_init__(self) -> None:
        _check_dtype("drafter.dtype", self.dtype)

    def load(self, target: Any) -> Any:
        """Load the model on the target's device."""
        dtype = str(target.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        return load(self.path, dtype, str(target.device), Int4Config(self.group_size) if self.int4 else None)


@dataclass
class DraftHead:
    """A draft head that was trained for the target, in its dtype. path: a folder or hub id; "mtp": the target's own.

    int4, group_size: quantize its linear layers.
    """

    path: str
    int4: bool = False
    group_size: int = 128

    def load(self, target: Any) -> Any:
        """Load the head on the target's device: -> the drafter."""
        drafter: Any = resolve_drafter(self.path, target)
        if self.int4:
            drafter.quantize(self.group_size)
        return drafter


@dataclass
class SuffixAndModel(DraftModel):
    """Suffix decoding and a smaller model, each row's better proposal in each step."""

    def load(self, target: Any) -> Any:
        """Load the model on the target's device: -> the drafter."""
        return with_suffix_decoding(super().load(target), target)


@dataclass
class SamplingConfig:
    """How ids are sampled. temperature: 0 is greedy. top_k=0 and top_p=1 change nothing.

    Other settings come from the model's generation_config, as in any generate() call.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature} must be 0 (greedy) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens={self.max_new_tokens} must be 1 or more")

    def call(self) -> dict[str, Any]:
        """Arguments of generate()."""
        call: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            call |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return call


@dataclass
class ExperimentConfig:
    """One run.

    drafter: a DraftModel or any specdec.Drafter. workload: any specdec.experiments.workloads.Workload.
    num_draft_tokens: K, or "auto". batch_size: prompts per generate() call.
    compile, verification: as in specdec.enable().
    repetitions: of the whole workload, each with its own seeds.
    baseline: also decode the same prompts plainly, between the speculative calls, to measure the speedup.
    too_long: "skip" prompts that do not fit the context and count them, or stop with an "error".
    folder: for records and report. resume: continue the run in the folder.
    """

    name: str
    target: TargetConfig
    drafter: Any
    quant: QuantConfig
    sampling: SamplingConfig
    workload: Any
    folder: Path
    num_draft_tokens: int | str = 5
    batch_size: int = 1
    compile: bool | str = AUTO
    verification: str = "block"
    repetitions: int = 1
    seed: int = 0
    baseline: bool = True
    too_long: str = "skip"
    resume: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_draft_tokens, str) and self.num_draft_tokens != AUTO:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens!r} must be an integer, 1 or more, or auto")
        for name in ("num_draft_tokens", "batch_size", "repetitions"):
            if getattr(self, name) != AUTO and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.compile not in (True, False, AUTO):
            raise ValueError(f"compile={self.compile!r} must be true, false or auto")
        if self.verification not in VERIFICATIONS:
            raise ValueError(f"verification={self.verification!r} must be block or token")
        if self.too_long not in ("skip", "error"):
            raise ValueError(f"too_long={self.too_long!r} must be skip or error")

    @property
    def max_draft_tokens(self) -> int:
        """The largest K that a step may have."""
        return self.num_draft_tokens if isinstance(self.num_draft_tokens, int) else MAX_DRAFT_TOKENS


@dataclass
class AuditConfig:
    """One audit of losslessness, with the values of conf/audit.yaml; `specdec.audit.lossless.Settings` explains them.

    drafters: by name, each a DraftModel or any specdec.Drafter. workload: as in ExperimentConfig, first turns alone.
    max_prompts: use the first so many; None: all. max_prompt_tokens: of a longer prompt the last ones.
    budget_s: seconds of this run. folder: for evidence and certificate; the same run in the same folder goes on.
    """

    target: TargetConfig
    quant: QuantConfig
    drafters: dict[str, Any]
    workload: Any
    folder: Path
    budget_s: float
    max_prompts: int | None
    max_prompt_tokens: int
    num_draft_tokens: list[Any]
    batch_sizes: list[int]
    prefill_chunks: list[Any]
    max_new_tokens: int
    max_draws: int
    alpha: float
    seed: int
    loop: str

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts} must be 1 or more, or null")


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"{name}={dtype!r} must be auto, {', '.join(DTYPES)}")

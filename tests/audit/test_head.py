"""The audit of a draft head: mistakes in its settings are found, and its predictions are those of drafting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import specdec
from specdec.audit import head as audit
from specdec.audit.head import audit_head
from specdec.drafters.dflash import DFlashHead
from specdec.drafters.head_checkpoint import load_head
from specdec.drafters.peagle import PEagleHead
from specdec.experiments.workloads import encode
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec_cli.main import main
from tests.helpers.families import FAMILIES, make_model
from tests.helpers.heads import (
    drafts_of_greedy_call,
    random_dflash,
    random_dspark,
    random_head,
    random_peagle,
    states_of,
)
from tests.helpers.mtp import random_mtp

RIGHT = [2, 6, 9]  # the hidden states that the embedded head was trained on


@pytest.fixture(scope="module")
def embedded_target() -> PreTrainedModel:
    return load(str(embedded.TARGET), "bfloat16", "cpu")


@pytest.fixture(scope="module")
def texts(embedded_target: PreTrainedModel) -> list[list[int]]:
    """What the embedded target writes behind prompts, longer ones first."""
    tokenizer = load_tokenizer(str(embedded.TARGET))
    prompts = [encode((row["prompt"],), [], tokenizer, False)[-96:] for row in embedded.prompts()[::9]]
    specdec.enable(embedded_target, "none")
    torch.manual_seed(0)
    batch = torch.tensor([ids for ids in prompts if len(ids) == 96])
    model: Any = embedded_target
    written = model.generate(batch, max_new_tokens=96, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    specdec.disable(embedded_target)
    return list(written.tolist())


def copy_with(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> str:
    """The embedded head with something changed in its config or its tensors."""
    content = json.loads((embedded.EAGLE3 / "config.json").read_text())
    tensors = load_file(embedded.EAGLE3 / "model.safetensors")
    change(content, tensors)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def transpose_fc(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    blocks = [block.T for block in tensors["fc.weight"].split(256, dim=1)]
    tensors["fc.weight"] = torch.cat(blocks, dim=1).contiguous()


def test_the_embedded_head_is_run_as_it_was_trained(
    embedded_target: PreTrainedModel, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "STRIDE", 16)
    head = load_head(str(embedded.EAGLE3), embedded_target)
    done = []
    found = audit_head(embedded_target, head, texts[:6], lambda *progress: done.append(progress))
    assert not found.better
    assert found.reads_states
    assert found.verdict.startswith("no other setting is better")
    assert done[-1] == (6 * (len(found.changes) + 2),) * 2
    assert head.settings.feature_layers == tuple(RIGHT)
    assert not head.layers[0].norm_before_residual  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("change", "num_texts", "advice"),
    [
        (lambda content, _: content.update(eagle_aux_hidden_state_layer_ids=[2, 6, 8]), 24, "hidden states 2, 6, 9"),
        (lambda content, _: content.update(norm_output=False), 6, "norm_output=true"),
        (transpose_fc, 3, "fc.weight transposed"),
    ],
    ids=["a hidden state one layer off", "a norm left out", "a transposed weight"],
)
def test_a_mistake_is_named(
    embedded_target: PreTrainedModel,
    texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Any,
    num_texts: int,
    advice: str,
) -> None:
    monkeypatch.setattr(audit, "STRIDE", 64 if num_texts > 6 else 8)
    head = load_head(copy_with(tmp_path, change), embedded_target)
    found = audit_head(embedded_target, head, texts[:num_texts])
    assert advice in [one.what for one in found.better]
    assert "it is not run as it was trained: with " in found.verdict


def test_a_head_that_does_not_read_its_target_is_named(
    embedded_target: PreTrainedModel, texts: list[list[int]]
) -> None:
    head = load_head(str(embedded.EAGLE3), embedded_target)
    torch.manual_seed(0)
    head.fc.weight.data = 1e-4 * torch.randn_like(head.fc.weight)
    found = audit_head(embedded_target, head, texts[:3])
    assert found.passed is False
    assert found.verdict.startswith("the target's hidden states do not help it")


@pytest.mark.parametrize("make", [random_head, random_peagle, random_dflash, random_dspark, random_mtp])
def test_each_kind_of_head_predicts_what_it_drafts(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each text of a call, its first id, and the second of a head that goes on with its own output."""
    monkeypatch.setattr(audit, "STRIDE", 1)
    target = make_model("llama", seed=3, **FAMILIES["llama"])
    drafter = make(target)
    head = drafter.head
    specdec.enable(target, drafter, num_draft_tokens=2, compile=False)
    drafts = drafts_of_greedy_call(target)
    specdec.disable(target)
    num_steps = 1 if isinstance(head, DFlashHead | PEagleHead) else 2
    for text, draft in drafts:
        ids = [*text, draft[0], 0]
        with torch.no_grad():
            found = audit._logits(head, torch.tensor([ids]), states_of(head, target, ids))
        assert len(found) == num_steps
        for (logits, behind), drafted, at in zip(found, draft, (len(text) - 1, len(text)), strict=False):
            assert int(logits[behind == at].argmax()) == drafted, f"behind {len(text)} ids"
    assert len(audit_head(target, head, [drafts[0][0]]).changes) >= 3


def test_the_command_says_what_it_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = ["--max-prompts", "2", "--max-new-tokens", "16"]
    assert main(["audit", "head", str(embedded.TARGET), str(embedded.EAGLE3), *short]) == 0
    printed = capsys.readouterr().out
    for words in ("an EAGLE-3 head with 1 layer", "without the target's hidden states", "no other setting is better"):
        assert words in printed
    wrong = copy_with(tmp_path, transpose_fc)
    assert main(["audit", "head", str(embedded.TARGET), wrong, *short, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    assert found["verdict"].startswith("it is not run as it was trained: with fc.weight transposed")
    assert main(["audit", "head", str(embedded.TARGET), str(embedded.DRAFT), *short]) == 2
    assert f"{embedded.DRAFT} cannot be audited: it holds no draft head" in capsys.readouterr().err
    few = ["--max-prompts", "1", "--max-new-tokens", "4"]
    assert main(["audit", "head", str(embedded.TARGET), str(embedded.EAGLE3), *few]) == 3
    assert "positions are too few to tell" in capsys.readouterr().out

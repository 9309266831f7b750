"""The quality figures equal their definitions, and the command is a gate."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec.audit.quality import compare_quality
from specdec.utils import embedded
from specdec_cli.audit_quality import _windows
from specdec_cli.main import main
from tests.helpers.families import make_model

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT / "tests" / "data" / "target"
pytestmark = pytest.mark.filterwarnings("ignore:specdec keeps in full precision")


def test_the_figures_equal_those_of_whole_forwards() -> None:
    original = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    quantized = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    specdec.quantize(quantized, specdec.Int4Config(32))
    texts = [torch.randint(3, 101, (1, length)) for length in (100, 1, 70)]
    *_, quality = compare_quality(original, quantized, texts)
    p, q = ([model(ids).logits[0].detach().log_softmax(-1) for ids in texts] for model in (original, quantized))
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(p, q, strict=True)])
    nll = torch.cat([F.nll_loss(b[:-1], ids[0, 1:], reduction="none") for b, ids in zip(q, texts, strict=True)])
    assert quality.positions == 171
    assert quality.predicted == 168
    assert quality.mean_kl == pytest.approx(kl.mean().item(), rel=1e-2)  # the whole forward is a prefill, in float32
    assert quality.mean_kl > 0.01
    assert abs(quality.top1_agreement - same.float().mean().item()) <= 2 / 171
    assert quality.perplexity == pytest.approx(math.exp(nll.mean().item()), rel=1e-2)


def test_a_model_does_not_differ_from_itself() -> None:
    model = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    *_, quality = compare_quality(model, model, [torch.randint(3, 101, (1, 80))])
    assert quality.mean_kl == 0
    assert quality.top1_agreement == 1
    assert quality.perplexity == quality.original_perplexity


@pytest.mark.parametrize("max_tokens", [None, 2, 20, 64, 65])
def test_a_text_is_read_in_windows(tmp_path: Path, max_tokens: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET)
    text = tmp_path / "text"
    text.write_text("".join(p["prompt"] for p in embedded.prompts()[:2]))
    lines = text.read_text().splitlines(keepends=True)
    everything = [token for line in lines for token in tokenizer(line, add_special_tokens=False).input_ids]
    windows = list(_windows(text, tokenizer, 32, max_tokens))
    assert [token for window in windows for token in window[0].tolist()] == everything[:max_tokens]
    assert all(window.shape == (1, 32) for window in windows[:-1])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2000 tokens of held-out text."""
    path = tmp_path_factory.mktemp("text") / "held-out.py"
    path.write_text("\n".join(p["prompt"] for p in embedded.prompts()[::12]))
    return path


def audit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["audit", "quality", *arguments])
    return code, capsys.readouterr().out


def test_the_embedded_target_stays_within_its_bounds(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    """Perplexity at most 3 % above the bf16 original's, mean KL at most 0.02."""
    arguments = [str(embedded.TARGET), "--original", str(ORIGINAL), "--text", str(text), "--max-tokens", "2500"]
    code, out = audit(capsys, *arguments, "--max-kl", "0.02", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["passed"]
    assert report["tokens"] >= 2000
    assert report["mean_kl"] <= 0.02
    assert report["perplexity"] <= 1.03 * report["original_perplexity"]
    assert report["bytes_on_disk"] < 0.5 * report["original_bytes_on_disk"]
    assert report["bytes_in_memory"] < report["original_bytes_in_memory"]


def test_the_gate_can_fail(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    arguments = [str(embedded.TARGET), "--original", str(ORIGINAL), "--text", str(text), "--max-tokens", "200"]
    code, out = audit(capsys, *arguments, "--max-kl", "0.0001")
    assert code == 1
    assert "--max-kl 0.0001: failed" in out


def test_a_plain_model_is_quantized_by_the_command(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    arguments = [str(ORIGINAL), "--text", str(text), "--max-tokens", "600", "--json", "--group-size"]
    coarse, fine = (json.loads(audit(capsys, *arguments, size)[1]) for size in ("-1", "32"))
    assert coarse["passed"] is None
    assert 0 < fine["mean_kl"] < coarse["mean_kl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(embedded.TARGET), "--text", __file__], "name the model that it was made from with --original"),
        ([str(ORIGINAL), "--original", str(ORIGINAL), "--text", __file__], "leave --original out"),
        ([str(ORIGINAL), "--text", "no/such-file"], "--text no/such-file is no file"),
        (["no/such-model", "--text", __file__], "no/such-model"),
        ([str(ORIGINAL), "--text", __file__, "--context", "1"], "must be 2 or more"),
        ([str(ORIGINAL), "--text", __file__, "--max-tokens", "0"], "must be 2 or more"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["audit", "quality", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_models_with_different_vocabularies_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    assert main(["audit", "quality", str(embedded.TARGET), "--original", str(tmp_path), "--text", __file__]) == 2
    assert "the original's vocabulary has 101 ids, the 4-bit model's 4096" in capsys.readouterr().err


def test_an_empty_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert main(["audit", "quality", str(ORIGINAL), "--text", str(tmp_path / "empty")]) == 2
    assert "fewer than two tokens" in capsys.readouterr().err


def test_the_quantize_command_reproduces_the_embedded_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the settings of its model card, bit for bit."""
    destination = tmp_path / "int4"
    options = ["--group-size", "64", "--skip", "model.layers.0"]
    assert main(["quantize", str(ORIGINAL), str(destination), *options]) == 0
    out = capsys.readouterr().out
    assert "note: specdec keeps in full precision: model.layers.0.self_attn.q_proj" in out
    assert "77 layers in 4 bits" in out
    assert "times smaller than the 15.5 MB it was" in out
    assert (destination / "model.safetensors").read_bytes() == (embedded.TARGET / "model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(destination).get_vocab() == AutoTokenizer.from_pretrained(ORIGINAL).get_vocab()
    assert AutoModelForCausalLM.from_pretrained(destination).dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]

    assert main(["quantize", str(ORIGINAL), str(destination)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(destination), str(tmp_path / "twice")]) == 2
    assert "is quantized already, by specdec_int4" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


STUCK = """
import sys, time
from transformers import PreTrainedModel
from specdec_cli.main import main

def save_pretrained(self, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half of it")
    print("saving", flush=True)
    time.sleep(600)

PreTrainedModel.save_pretrained = save_pretrained
main(["quantize", *sys.argv[1:], "--group-size", "32"])
"""


def test_the_next_run_removes_the_files_of_a_killed_run_and_nothing_else(tmp_path: Path) -> None:
    make_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path / "source")
    source, destination = str(tmp_path / "source"), tmp_path / "out" / "int4"
    others = [destination.parent / name for name in (".int4-foreign_", ".int4-other-abcdefgh")]
    for other in others:
        other.mkdir(parents=True)
    (others[1] / "lock").touch()

    def hidden() -> list[Path]:
        return sorted(path for path in destination.parent.glob(".int4*") if path not in others)

    command = [sys.executable, "-W", "ignore", "-c", STUCK, source, str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "saving\n"
            (unfinished,) = hidden()
            assert main(["quantize", source, str(destination), "--group-size", "32"]) == 0
            assert hidden() == [unfinished], "its run is still alive"
        finally:
            run.kill()
    assert (unfinished / "model" / "model.safetensors").exists()
    shutil.rmtree(destination)
    assert main(["quantize", source, str(destination), "--group-size", "32"]) == 0
    assert hidden() == []
    assert all(other.is_dir() for other in others)
    assert sorted(path.name for path in destination.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_write_error_is_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    make_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path / "source")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", disk_full)
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "int4"), "--group-size", "32"]) == 2
    assert "int4 could not be written: SafetensorError: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantization_that_fails_leaves_nothing_behind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "source")
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "int4"), "--group-size", "32"]) == 2
    assert "up_proj" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

"""Training of an EAGLE-3 head: its losses against drafting, its texts, and runs that are stopped and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.head_checkpoint import load_head
from specdec.experiments.config import QuantConfig, SamplingConfig, TargetConfig
from specdec.experiments.report.labels import read_runs
from specdec.experiments.workloads import Dataset, Prompt
from specdec.runtime.loading import load_tokenizer
from specdec.runtime.runner import ModelRunner
from specdec.training import train as training
from specdec.training.batch import Batch
from specdec.training.batch import batch_of as training_batch
from specdec.training.config import TrainConfig
from specdec.training.distillation import Distillation, DraftModelTraining, new_draft_model
from specdec.training.eagle3 import Eagle3Training, TrainingTimeTest, new_head
from specdec.training.texts import Text, write_texts
from specdec.utils import embedded
from specdec.utils.numerics import relative_error
from specdec_cli.main import main
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.heads import random_head

STEPS = 3


@pytest.fixture
def target() -> PreTrainedModel:
    return make_model("llama", seed=3, **FAMILIES["llama"])


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target in full precision, with the embedded target's tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    values = FAMILIES["llama"] | {"vocab_size": 4096, "num_hidden_layers": 4, "max_position_embeddings": 512}
    make_model("llama", seed=3, **values).save_pretrained(folder)
    load_tokenizer(str(embedded.TARGET)).save_pretrained(folder)
    return folder


@torch.no_grad()
def batch_of(target: PreTrainedModel, drafter: Eagle3Drafter, ids: Tensor, num_prompt_ids: int) -> Batch:
    output = target(input_ids=ids, output_hidden_states=True)
    features = torch.stack([output.hidden_states[layer] for layer in drafter.feature_layers], dim=2)
    is_answer = (torch.arange(ids.shape[1]) >= num_prompt_ids).expand(ids.shape)
    return Batch(ids, is_answer, features, output.logits.float())


@pytest.mark.parametrize("settings", [{}, {"fc_norm": True, "norm_output": True}], ids=["plain", "norms"])
def test_a_step_of_training_reads_what_a_step_of_drafting_reads(
    target: PreTrainedModel, settings: dict[str, bool]
) -> None:
    drafter = random_head(target, draft_ids=list(range(1, VOCAB_SIZE, 2)), **settings)
    head = drafter.head
    ids = prompts(1)["input_ids"]
    batch = batch_of(target, drafter, ids, 0)
    with torch.no_grad():
        found = [head.lm_head(states) for states in TrainingTimeTest(head, STEPS, 1.0).states(ids, batch.features)]
    drafted = torch.arange(len(head.d2t)) + head.d2t
    length = ids.shape[1]
    for position in range(length - 1 - STEPS):
        runner = ModelRunner(head)
        runner.begin(1)
        runner.cache.window.reserve(length)
        with torch.inference_mode():
            states = head.reduce(batch.features[:, : position + 1])
            runner.cache.features.write(torch.arange(position + 1)[None], states[:, :, None])
        output = runner.prefill(ids[:, 1:], torch.tensor([position]))
        assert output is not None
        logits = output.logits
        for step in range(STEPS):
            if step:
                at = position + step
                logits = runner.forward(ids[:, at + 1 : at + 2], torch.tensor([[at]])).logits
            assert relative_error(found[step][0, position], logits[0, 0, drafted]) < 1e-5


def test_ids_are_counted_as_drafting_would_accept_them(target: PreTrainedModel) -> None:
    """The head drafts greedily along greedy texts; its drafts end at the first id that is not the target's."""
    drafter = random_head(target, draft_ids=list(range(1, VOCAB_SIZE, 2)))
    ids = target.generate(prompts(1)["input_ids"], max_new_tokens=30, do_sample=False)
    batch = batch_of(target, drafter, ids, 11)
    module = TrainingTimeTest(drafter.head, STEPS, 1.0)
    with torch.no_grad():
        wanted = [[0, 0] for _ in range(STEPS)]
        logits = [drafter.head.lm_head(states) for states in module.states(batch.ids, batch.features)]
        best = [one.argmax(-1) + drafter.head.d2t[one.argmax(-1)] for one in logits]
        for position in range(ids.shape[1] - 1):
            for step in range(STEPS):
                at = position + 2 + step
                if not 11 <= at < ids.shape[1]:
                    break
                wanted[step][0] += 1
                if best[step][0, position] != ids[0, at]:
                    break
                wanted[step][1] += 1
        _, counts = module(batch)
    assert counts.tolist() == wanted
    assert wanted[0][0] == 30


def test_texts_go_on_where_they_ended(target: PreTrainedModel, tmp_path: Path) -> None:
    rows = [row[mask.bool()].tolist() for row, mask in zip(*prompts(4).values(), strict=True)]
    call = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.0}

    def write(file: str, prompts: list[list[int]] = rows) -> list[Text]:
        return write_texts(target, prompts, call, 2, 0, tmp_path / file, lambda count: None)

    whole = write("a.jsonl")
    assert [text.ids[: text.num_prompt_ids] for text in whole] == rows
    assert all(len(text.ids) == text.num_prompt_ids + 5 for text in whole)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    assert write("b.jsonl") == whole
    (tmp_path / "c.jsonl").write_text(lines[0])
    assert write("c.jsonl") == whole
    assert (tmp_path / "c.jsonl").read_text() == "".join(lines)
    with pytest.raises(ValueError, match="holds answers to other prompts"):
        write("a.jsonl", rows[:3])
    assert not hasattr(target, "_specdec_state")


HEAD: dict[str, Any] = {
    "feature_layers": None, "draft_vocab_size": 256, "intermediate_size": 64, "norm_output": True, "fc_norm": True,
    "step_decay": 0.8, "learning_rate": 1e-3,
}  # fmt: skip
DRAFT_MODEL: dict[str, Any] = {"num_layers": 2, "hard_labels": 0.1, "learning_rate": 5e-4}


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in embedded.prompts()[:6]))
    values: dict[str, Any] = {
        "target": TargetConfig(path=str(embedded.TARGET), dtype="float32", device="cpu"),
        "quant": QuantConfig(),
        "workload": Dataset(str(file)),
        "sampling": SamplingConfig(max_new_tokens=8),
        "folder": folder,
        "answer_batch": 4,
        "max_prompt_tokens": 24,
        "held_out": 0.2,
        "num_draft_tokens": 2,
        "report_prompts": 1,
        "epochs": 2,
        "batch_size": 2,
        "warmup": 0.1,
        "seed": 0,
    }
    head = {name: changes.pop(name) for name in [*changes] if name in HEAD}
    return TrainConfig(**{"train": Eagle3Training(**HEAD | head)} | values | changes)


@pytest.mark.parametrize("train", [Eagle3Training(**HEAD), DraftModelTraining(**DRAFT_MODEL)], ids=["head", "draft"])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path, train: Any
) -> None:
    def config(name: str) -> TrainConfig:
        target = TargetConfig(path=str(original), dtype="float32", device="cpu")
        return config_of(tmp_path / name, train=train, target=target)

    console = Console(quiet=True)
    whole = training.train(config("a"), {"seed": 0}, console)
    assert [len(epoch["acceptance"]) for epoch in whole["epochs"]] == [2, 2]
    assert whole["epochs"][1]["loss"] < whole["epochs"][0]["loss"]

    batches = training._batches

    def stops(*args: Any) -> Any:
        if args[-1] == 1:
            raise KeyboardInterrupt
        return batches(*args)

    monkeypatch.setattr(training, "_batches", stops)
    with pytest.raises(KeyboardInterrupt):
        training.train(config("b"), {"seed": 0}, console)
    monkeypatch.setattr(training, "_batches", batches)
    assert training.train(config("b"), {"seed": 0}, console)["epochs"] == whole["epochs"]
    drafters = [load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("a", "b")]
    assert drafters[0].keys() == drafters[1].keys()
    assert all(drafters[0][name].equal(drafters[1][name]) for name in drafters[0])
    [checkpoint] = (tmp_path / "a").glob("checkpoint-*/model.safetensors")
    assert not [name for name in load_file(checkpoint) if "embed_tokens" in name]
    with pytest.raises(ValueError, match="holds a training with seed=0, and now seed=1; name another folder"):
        training.train(config("a"), {"seed": 1}, console)


@pytest.mark.parametrize("train", ["eagle3", "draft_model"])
def test_the_command_writes_a_drafter_and_the_report_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], original: Path, train: str
) -> None:
    folder = tmp_path / "out"
    config = config_of(folder)
    settings = ["max_prompt_tokens", "num_draft_tokens", "held_out", "batch_size", "report_prompts"]
    overrides = [f"{name}={getattr(config, name)}" for name in settings]
    overrides += [f"train={train}", f"workload.path={config.workload.path}", f"folder={folder}", "epochs=1"]
    own = ["draft_vocab_size=256", "intermediate_size=64"] if train == "eagle3" else ["num_layers=2"]
    overrides += [f"train.{value}" for value in own]
    overrides += [f"target.path={original}", "target=model", "target.dtype=float32", "sampling.max_new_tokens=8"]
    assert main(["train-drafter", *overrides]) == 0
    printed = capsys.readouterr().out
    for words in ("held-out acceptance by position of the draft", "tokens a step", f"drafter: {folder / 'drafter'}"):
        assert words in printed
    assert f"report: {folder / 'run' / 'report.html'}" in printed
    [run] = read_runs([folder / "run"])
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert {record.prompt_id for record in run.records} == {row["id"] for row in held_out}
    assert len(held_out) == 1
    assert main(["train-drafter", *overrides]) == 0  # which trains nothing, and runs nothing again
    assert capsys.readouterr().out.count("report: ") == 1
    assert read_runs([folder / "run"])[0].records == run.records

    target = TargetConfig(path=str(original), dtype="float32", device="cpu").load("cpu", QuantConfig())
    if train == "eagle3":
        # what vLLM's reader of the speculators library's configs looks up
        content = json.loads((folder / "drafter" / "config.json").read_text())
        own = content["speculators_config"]
        assert own["proposal_methods"][0]["speculative_tokens"] == 2
        assert own["verifier"]["name_or_path"] == str(original)
        assert content["speculators_model_type"] == "eagle3"
        layer = content["transformer_layer_config"]
        assert (layer["model_type"], layer["vocab_size"], layer["hidden_size"]) == ("llama", 4096, 32)
        names = {"draft_vocab_size", "target_hidden_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids"}
        assert names <= content.keys()
        head = load_head(str(folder / "drafter"), target)
        assert head.embed_tokens is target.get_input_embeddings()
    ids = torch.arange(3, 20)[None]
    expected = target.generate(ids, max_new_tokens=12, do_sample=False)
    specdec.enable(target, folder / "drafter", num_draft_tokens=3)
    assert target.generate(ids, max_new_tokens=12, do_sample=False).equal(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be 1 or more"),
        ({"held_out": 0.0}, r"held_out=0\.0 must be more than 0"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"draft_vocab_size": 0}, "draft_vocab_size=0 must be 1 or more, or null"),
        ({"feature_layers": []}, "names no hidden state"),
        ({"report_prompts": -1}, "report_prompts=-1 must be 1 or more, or 0 for no run at the end"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path / "head", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "train.num_layers=0 must be 1 or more"),
        ({"hard_labels": 1.5}, "train.hard_labels=1.5 must be from 0 to 1"),
        ({"learning_rate": 0.0}, "train.learning_rate=0.0 must be positive"),
    ],
)
def test_settings_of_a_draft_model_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftModelTraining(**DRAFT_MODEL | changes)


def test_a_training_that_has_ended_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path
) -> None:
    """Its run goes on where it ended; a checkpoint that lacks what is trained is damaged."""
    folder, target = tmp_path / "a", TargetConfig(path=str(original), dtype="float32", device="cpu")
    config = config_of(folder, target=target, epochs=1, draft_vocab_size=64)
    assert not training.is_finished(config)
    curve = training.train(config, {"report_prompts": 1}, Console(quiet=True))
    assert training.is_finished(config)
    with monkeypatch.context() as patched:
        patched.setattr(TargetConfig, "load", lambda *_: pytest.fail("the target is loaded"))
        assert training.train(config, {"report_prompts": 2}, Console(quiet=True)) == curve
    further = config_of(folder, target=target, epochs=2, draft_vocab_size=64)
    checkpoint = folder / "checkpoint-1" / "model.safetensors"
    tensors = load_file(checkpoint)
    [name] = [name for name in tensors if name.endswith("fc.weight")]
    del tensors[name]
    save_file(tensors, checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: it lacks head.fc.weight"):
        training.train(further, {}, Console(quiet=True))


def test_prompts_that_the_training_reads_whole_are_held_out_for_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, report_prompts=2)
    prompts = [
        (Prompt(str(index), "task", (f"prompt {index}",)), num_ids) for index, num_ids in enumerate((9, 50, 7, 8))
    ]
    training._write_held_out(config, prompts)
    assert [json.loads(line)["id"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()] == ["0", "2"]


def test_layers_that_the_target_lacks_are_named_before_it_answers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.feature_layers=\[12\]: the hidden states of this target are 0 … 11"):
        training.train(config_of(tmp_path / "head", feature_layers=[12]), {}, Console(quiet=True))
    assert not (tmp_path / "head" / "texts.jsonl").exists()


def test_texts_may_be_shorter_than_the_steps(target: PreTrainedModel) -> None:
    drafter = random_head(target)
    batch = batch_of(target, drafter, prompts(1)["input_ids"], 2)
    loss, counts = TrainingTimeTest(drafter.head, 20, 0.5)(batch)
    assert loss.isfinite()
    assert counts[8:].sum() == 0
    assert counts[0, 0] == 9


def test_a_target_of_another_kind_is_drafted_for() -> None:
    """GPT-2 names no width of its MLP, and has other names for the rest."""
    target = make_model("gpt2", **FAMILIES["gpt2"])
    head = new_head(Eagle3Training(**HEAD | {"intermediate_size": None, "draft_vocab_size": None}), target, [])
    assert head.config.intermediate_size == 4 * 32
    assert head.settings.draft_vocab_size == VOCAB_SIZE
    assert head.lm_head.weight.equal(target.get_input_embeddings().weight)


def test_a_draft_model_begins_with_evenly_spread_layers_of_its_target(tmp_path: Path) -> None:
    target = make_model("llama", seed=3, **FAMILIES["llama"] | {"num_hidden_layers": 6})
    target.save_pretrained(tmp_path)
    draft = new_draft_model(str(tmp_path), 3)
    tensors, own = target.state_dict(), draft.state_dict()
    assert all(value.equal(tensors[name]) for name, value in own.items() if ".layers." not in name)
    for index, layer in enumerate((0, 2, 5)):
        name = "mlp.up_proj.weight"
        assert own[f"model.layers.{index}.{name}"].equal(tensors[f"model.layers.{layer}.{name}"])
    trained = {name for name, value in draft.named_parameters() if value.requires_grad}
    assert trained == {name for name in own if ".layers." in name} | {"model.norm.weight"}
    with pytest.raises(ValueError, match=r"train.num_layers=6 must be less than the target's 6 layers"):
        DraftModelTraining(**DRAFT_MODEL | {"num_layers": 6}).check_target(config_of(tmp_path / "a"), target)


def test_a_draft_model_of_a_checkpoint_in_four_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="is quantized, and a draft model begins with layers in full precision"):
        new_draft_model(str(embedded.TARGET), 2)


@pytest.mark.parametrize(
    ("model_type", "changes", "num_layers", "message"),
    [
        ("mpt", {"n_layers": 4}, 2, "the layers of MptForCausalLM have no numbers in their tensors' names"),
        ("deepseek_v3", {"num_hidden_layers": 4, "first_k_dense_replace": 2}, 2, "are of several kinds"),
    ],
)
def test_a_target_whose_layers_cannot_be_chosen_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, int], num_layers: int, message: str
) -> None:
    make_model(model_type, **FAMILIES[model_type] | changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        new_draft_model(str(tmp_path), num_layers)


def test_a_draft_model_keeps_what_its_layers_do_not_have_in_common(tmp_path: Path) -> None:
    """SmolLM3's every fourth layer has no rotary embedding."""
    values = FAMILIES["smollm3"] | {"num_hidden_layers": 4}
    make_model("smollm3", **values).save_pretrained(tmp_path)
    draft: Any = new_draft_model(str(tmp_path), 2)
    assert draft.config.no_rope_layers == [1, 0]
    assert [bool(layer.self_attn.use_rope) for layer in draft.model.layers] == [True, False]


def test_a_head_is_trained_for_a_target_without_a_limit_of_positions(tmp_path: Path) -> None:
    target = make_model("mpt", **FAMILIES["mpt"])
    Eagle3Training(**HEAD).check_target(config_of(tmp_path / "head"), target)
    assert not any(module.training for module in target.modules())  # else a compiled target would run eagerly


@pytest.mark.parametrize("hard_labels", [0.0, 0.3, 1.0])
def test_the_loss_of_a_draft_model_is_the_cross_entropy_of_ids_and_distributions(
    target: PreTrainedModel, hard_labels: float
) -> None:
    draft = make_model("llama", seed=4, **FAMILIES["llama"])
    batch = prompts(2)
    texts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    read = training_batch([Text(ids, 3) for ids in texts], target, ())
    with torch.no_grad():
        loss, counts = Distillation(draft, 2, hard_labels)(read)
        wanted, tried, right = [], [0, 0], [0, 0]
        for ids in texts:
            own = draft(torch.tensor([ids])).logits[0].log_softmax(-1)
            other = target(torch.tensor([ids])).logits[0].softmax(-1)
            agrees = (own.argmax(-1) == other.argmax(-1)).tolist()
            for at in range(2, len(ids) - 1):
                soft, hard = -(other[at] * own[at]).sum(), -own[at, ids[at + 1]]
                wanted.append((1 - hard_labels) * soft + hard_labels * hard)
            for start in range(2, len(ids) - 1):
                for index in range(2):
                    at = start + index
                    if at >= len(ids) - 1:
                        break
                    tried[index] += 1
                    right[index] += agrees[at]
                    if not agrees[at]:
                        break
    assert float(loss) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)
    assert counts.tolist() == [[tried[0], right[0]], [tried[1], right[1]]]


def test_texts_of_about_one_length_are_trained_on_together() -> None:
    texts = [Text([0] * length, 1) for length in range(1, 201)]
    steps = training._order(0, texts, 4, 1)
    assert sorted(index for step in steps for index in step) == list(range(200))
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 20
    assert steps != training._order(0, texts, 4, 2)
    assert training._order(0, texts, 4, None)[1] == [4, 5, 6, 7]

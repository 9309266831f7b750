"""The audit of losslessness: a clean loop passes, every broken one is found, and what is found is explained."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import specdec
from specdec.audit.certificate import Certificate, certify
from specdec.audit.controls import CONTROLS, replace_verifier
from specdec.audit.evidence import Evidence
from specdec.audit.findings import FAULTY, INCONCLUSIVE, LOSSLESS, ROUNDING
from specdec.audit.identity import Divergence, explain, first_difference
from specdec.audit.lossless import TRANSFORMERS, Audit, Settings, audit_lossless
from specdec.audit.page import render_page
from specdec.audit.reference import replay
from specdec.audit.sampling import BETTORS, CALLS, GROUPS, Sample, _Bets, _Position, _positions, _Step, draw_and_replay
from specdec.audit.statistics import RepeatedPrefixes
from specdec.audit.widths import combine, measure_batch
from specdec.core.steps import Draft, Verdict
from specdec.drafters.resolve import with_suffix_decoding
from specdec.runtime.loading import load, load_tokenizer
from specdec.runtime.runner import ModelRunner
from specdec.utils import embedded
from specdec_cli.main import main
from tests.helpers.command_line import parse
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model

PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (30, 26, 41, 33, 28, 37, 25, 44)
]
LARGE_BUDGET = 600.0  # of runs that end when nothing is left to do


@cache
def pair(weights: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target, and as its draft model a copy of the dense model with noise on its weights."""
    target = family("llama", weights)
    draft = make_model("llama", **FAMILIES["llama"])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return target, draft


def settings(weights: str = "int4_kernel", **changes: Any) -> Settings:
    draft = pair(weights)[1]
    values: dict[str, Any] = {
        "num_draft_tokens": (3,), "batch_sizes": (1, 4), "max_new_tokens": 12, "max_draws": 1500,
        "widths": (1, 2, 5, 16), "batches": (1, 3, 16),
    }  # fmt: skip
    return Settings(PROMPTS, {"draft": draft, "prompt_lookup": "prompt_lookup"}, **values | changes)


def audit_of(weights: str = "int4_kernel", **changes: Any) -> Audit:
    return Audit(pair(weights)[0], settings(weights, **changes), Evidence({}))


@cache
def finished(weights: str) -> Certificate:
    """A whole audit of a tiny pair."""
    return audit_lossless(pair(weights)[0], settings(weights), budget_s=LARGE_BUDGET)


@pytest.mark.usefixtures("cpu_kernels")
def test_the_embedded_pair_is_lossless_and_all_broken_loops_are_found() -> None:
    """A short certificate of the package's own pair, with all drafters."""
    target, draft = (load(str(folder), "float32", "cpu") for folder in (embedded.TARGET, embedded.DRAFT))
    tokenizer = load_tokenizer(str(embedded.TARGET))
    prompts = [tokenizer(prompt["prompt"]).input_ids[:40] for prompt in embedded.prompts()[:4]]
    drafters = {"draft": draft, "prompt_lookup": "prompt_lookup", "suffix": "suffix"}
    drafters["suffix+draft"] = with_suffix_decoding(draft, target)
    chosen = dataclasses.replace(settings(), prompts=prompts, drafters=drafters)
    certificate = audit_lossless(target, chosen, budget_s=LARGE_BUDGET)
    assert certificate.reasons == []
    assert (certificate.verdict, certificate.exit_code) == (LOSSLESS, 0)
    assert certificate.num_texts == certificate.num_identical == 4 * 2 * 2 * 4
    assert [row.found for row in certificate.controls] == [True] * len(CONTROLS)
    assert certificate.widths is not None
    assert certificate.widths.is_invariant
    assert certificate.widths.batches == [1, 3, 16]
    assert all(value == 0 for row in certificate.widths.differences for value in row)
    assert certificate.max_logit_difference == 0
    assert certificate.sampled.num_ids >= 1500
    assert all(row.num_ids > 50 for row in certificate.sampled.groups)
    assert {row.what for row in certificate.sampled.calls if row.num_ids > 100} == {
        call.what for call in CALLS.values()
    }
    assert 0.01 < certificate.sampled.smallest_variation < 0.3


def test_a_dense_model_is_lossless_up_to_rounding_at_most() -> None:
    certificate = finished("float32")
    assert certificate.verdict in (LOSSLESS, ROUNDING)
    assert not certificate.claims_invariance
    assert all(divergence["is_rounding"] for divergence in certificate.divergences)
    assert [row.found for row in certificate.controls] == [True] * len(CONTROLS)


def test_false_alarms_are_no_more_frequent_than_stated() -> None:
    """100 repetitions with other seeds, of 192 ids each, from a vocabulary of 5."""
    values = FAMILIES["llama"] | {"vocab_size": 5, "num_hidden_layers": 1}
    target, draft = (make_model("llama", seed, **values) for seed in (0, 1))
    specdec.enable(target, draft, compile=False)
    ids = torch.tensor([[1, 2, 4, 3, 1, 2]] * 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alarms = 0
    for seed in range(100):
        sample = draw_and_replay(target, inputs, CALLS["plain"], [], 0, 3, seed, RepeatedPrefixes(), 1e-5)
        assert sum(sample.num_ids.values()) > 192
        alarms += BETTORS.log_e_value(torch.tensor(sample.log_wealth)) >= math.log(1 / 0.05)
    assert alarms <= 13  # at most 5 %; binomial, P(more than 13) < 1e-3


def test_an_audit_is_resumed_where_it_ended(tmp_path: Path) -> None:
    target, draft = pair("int4_kernel")
    chosen = Settings(
        PROMPTS,
        {"draft": draft},
        num_draft_tokens=(3,),
        max_new_tokens=8,
        max_draws=1000,
        widths=(1, 4),
        batches=(1, 3),
    )
    first = audit_lossless(target, chosen, budget_s=0.01, folder=tmp_path)
    assert first.verdict == INCONCLUSIVE
    assert first.exit_code == 3
    lines = (tmp_path / "evidence.jsonl").read_text().splitlines()
    with (tmp_path / "evidence.jsonl").open("a") as file:
        file.write('{"key": ["greedy"')  # a run that was killed
    pieces: list[str] = []

    def resume() -> Certificate:
        return audit_lossless(
            target, chosen, budget_s=LARGE_BUDGET, folder=tmp_path, on_progress=lambda what, s: pieces.append(what)
        )

    second = resume()
    assert second.verdict == LOSSLESS, second.reasons
    assert not any("batch 1" in what for what in pieces if what.startswith("logits"))
    assert (tmp_path / "evidence.jsonl").read_text().splitlines()[: len(lines)] == lines
    pieces.clear()
    third = resume()
    assert pieces == []
    assert third.sampled == second.sampled
    with pytest.raises(ValueError, match=r"holds another audit \(seed differs\)"):
        audit_lossless(target, dataclasses.replace(chosen, seed=1), folder=tmp_path)


def test_the_groups_of_ids_are_known_before_they_are_drawn() -> None:
    ids, logits = torch.zeros(3, dtype=torch.int64), torch.zeros(4, 5)
    steps = [
        _Step(num_drafted, ids, None, emitted, accepted, logits, logits)
        for num_drafted, emitted, accepted in ((3, 2, 1), (3, 4, 3), (0, 1, 0), (2, 1, 2))
    ]  # a rejection, full acceptance, a plain step, a stop in the draft
    assert [position.groups() for position in _positions(steps)] == [
        ["all", "draft"],
        ["all", "draft"],
        ["all", "draft", "rejection"],
        ["all", "draft"],
        ["all", "draft", "last"],
        ["all", "bonus"],
        ["all"],
        ["all", "draft"],
    ]


@pytest.mark.parametrize(("impossible", "is_found"), [(5, True), (0, False)])
def test_rounding_excuses_no_impossible_id(impossible: int, is_found: bool) -> None:
    """Rounding changes this law by 2 %, but two ids have probability 0 before and after."""
    law, own = torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[0.52, 0.48, 0, 0]])
    step = _Step(0, torch.empty(0, dtype=torch.int64), None, 1, 0, own.log(), own.log())
    sample = Sample([0.0] * len(BETTORS), dict.fromkeys(GROUPS, 0), [])
    bets = _Bets(RepeatedPrefixes(), torch.empty(0, dtype=torch.int64), 0, 0.1, sample)
    for number in range(300):
        drawn = 2 if number < impossible else number % 2
        bets.place([_Position(step)], torch.tensor([[number, drawn]]), law, law.log(), has_stops=False)
    bets.finish()
    assert (sample.impossible, sample.excluded, sample.num_ids["all"]) == (impossible, 0, 300)
    log_e = BETTORS.log_e_value(torch.tensor(sample.log_wealth, dtype=torch.float64))
    assert (log_e >= math.log(1000)) == is_found


def test_prompts_are_read_in_chunks_where_that_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    audit = audit_of()
    widths: list[int] = []
    forward = ModelRunner.forward

    def recorded(self: ModelRunner, ids: torch.Tensor, positions: torch.Tensor, last_only: bool = False) -> Any:
        if self.model is audit.model and last_only:
            widths.append(ids.shape[1])
        return forward(self, ids, positions, last_only)

    monkeypatch.setattr(ModelRunner, "forward", recorded)
    try:
        audit._enable("prompt_lookup")  # its trial has forwards of its own
        for chunk, expected in ((None, [30]), (16, [16, 14])):
            widths.clear()
            found = audit.compare_greedy("prompt_lookup", 3, chunk, (0,))
            assert widths == expected
            assert found["identical"] == 1
    finally:
        specdec.disable(audit.model)


def test_a_drafter_without_probabilities_cannot_show_wrong_ones() -> None:
    audit = Audit(pair("int4_kernel")[0], Settings(PROMPTS, {"prompt_lookup": "prompt_lookup"}), Evidence({}))
    found = audit.run_control("draft_temperature")
    assert found is not None
    assert found["found"] is None


def test_half_of_a_broken_loops_samples_are_no_result() -> None:
    audit = audit_of()
    audit._deadline = 0
    assert audit.run_control("draft_temperature") is None
    specdec.disable(audit.model)


def test_a_broken_verifier_is_not_lossless() -> None:
    """The verdict of a user's broken loop, not only the controls' row."""

    def accept_everything(draft: Draft, target_probs: torch.Tensor, uniforms: torch.Tensor) -> Verdict:
        next_ids = target_probs[torch.arange(len(draft.lengths)), draft.lengths].argmax(-1)
        return Verdict(draft.lengths, next_ids)

    audit = audit_of()
    evidence = audit.evidence
    with replace_verifier(accept_everything)():
        for index in range(3):
            evidence.add(("sampled", "draft", "plain", index), 1.0, audit.sample("draft", "plain", index))
    specdec.disable(audit.model)
    certificate = certify(evidence, None, True, 0.001, 0.0, 0.0, "audit", {})
    assert certificate.verdict == FAULTY
    assert "sampled ids are not drawn from the law of plain decoding; calls with temperature 1" in certificate.reasons
    assert certificate.exit_code == 1


def test_a_divergence_that_rounding_does_not_explain_is_a_fault() -> None:
    """Another model's text: the margin is far from zero at every width."""
    target, _ = pair("int4_kernel")
    specdec.enable(target, "none", compile=False)
    ids = torch.tensor(PROMPTS[0])
    plain = target.generate(ids[None], max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    other = [*plain[:4], (plain[4] + 1) % VOCAB_SIZE, plain[5]]
    position = first_difference(plain, other)
    assert position == 4
    found = explain(target, 0, ids, plain, other, position)
    specdec.disable(target)
    assert not found.is_rounding
    assert found.margin > 0
    assert found.spread == 0
    assert found.logits[0] > found.logits[1]


def test_a_dense_models_logits_are_measured_in_units_of_rounding() -> None:
    target = copy.deepcopy(pair("float32")[0]).to(torch.bfloat16)
    specdec.enable(target, "none", compile=False)
    ids, sizes = torch.tensor(PROMPTS[7]), (1, 4, 14)
    measured = [dataclasses.asdict(measure_batch(target, ids, 30, sizes, batch)) for batch in (3, 1)]
    specdec.disable(target)
    widths = combine(sizes, measured)
    assert widths is not None
    assert widths.batches == [1, 3]
    assert widths.differences[0][0] == 0
    assert 0 < widths.largest < 200
    assert 0 < widths.total_variation < 0.1
    assert not widths.is_invariant


def test_a_divergence_has_its_class_and_a_command_that_repeats_it() -> None:
    divergence = dataclasses.asdict(Divergence(9, 3, 5, 6, (2.0, 1.9), 0.1, [0.1, -0.2], 0.3))
    evidence = Evidence({})
    result = {"texts": 4, "identical": 3, "divergences": [divergence | {"is_rounding": True}], "first_prompt": 8}
    evidence.add(("greedy", "draft", 3, 4, 16, 8), 1.0, result)
    command = "specdec audit lossless folder --dtype bfloat16"
    origin = {"model": "folder", "dtype": "bfloat16", "loop": "specdec", "device": "", "date": "", "command": ""}
    origin["files_sha256"] = {}
    certificate = certify(evidence, None, False, 0.001, 0.0, 0.0, command, origin)
    [found] = certificate.divergences
    arguments = "--drafter draft --num-draft-tokens 3 --batch 4 --prefill-chunk 16"
    arguments += " --first-prompt 8 --max-prompts 4 --max-new-tokens 4"
    assert found["command"] == f"{command} {arguments}"
    assert (certificate.num_identical, certificate.verdict) == (3, INCONCLUSIVE)
    page = render_page(certificate)
    assert found["command"] in page
    assert "rounding</td>" in page
    assert (
        certify(evidence, None, True, 0.001, 0.0, 0.0, command, origin).verdict == FAULTY
    )  # where logits are to be equal


@pytest.mark.parametrize(
    ("plain", "other", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([5], [6], 0)],
)
def test_the_first_difference(plain: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(plain, other) == position


def test_replay_sees_the_laws_of_transformers_own_loop() -> None:
    """The law of a column is the softmax of the scores that generate() returns for the same prefix."""
    target, _ = pair("float32")
    ids = torch.tensor([PROMPTS[0][:9]])
    call: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "pad_token_id": 0}
    torch.manual_seed(0)
    text = target.generate(ids, do_sample=True, max_new_tokens=4, **call)
    laws: list[torch.Tensor] = []
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = replay(target, inputs, text, lambda column, probs: laws.append(probs), max_new_tokens=4, **call)
    assert again is not None
    assert torch.equal(again, text)
    for column, law in enumerate(laws):
        output = target.generate(
            text[:, : 9 + column], do_sample=True, max_new_tokens=1, return_dict_in_generate=True, output_scores=True,
            **call,
        )  # fmt: skip
        torch.testing.assert_close(law, output.scores[0].softmax(-1), rtol=1e-4, atol=1e-6)
    assert replay(target, inputs, text[:, :-1], lambda column, probs: None, max_new_tokens=4, **call) is None


def test_transformers_own_loop_is_audited_by_the_same_checks() -> None:
    target, draft = pair("int4_kernel")
    values: dict[str, Any] = {
        "num_draft_tokens": (3,),
        "batch_sizes": (1,),
        "prefill_chunks": (None,),
        "max_new_tokens": 6,
    }
    settings = Settings(PROMPTS[:2], {"draft": draft, "lookup": "prompt_lookup"}, loop=TRANSFORMERS, **values)
    audit = Audit(target, settings, Evidence({}))
    try:
        for drafter in settings.drafters:
            found = audit.compare_greedy(drafter, 3, None, (0,))
            assert (found["texts"], found["identical"]) == (1, 1)
            sample = audit.sample(drafter, "plain", 0)
            assert sample["num_ids"]["all"] == 12
            assert sample["num_ids"]["draft"] == sample["stop_errors"] == sample["impossible"] == 0
    finally:
        specdec.disable(target)
    assert draft.generation_config.num_assistant_tokens == 3


@pytest.mark.parametrize(
    "values",
    [
        {"batch_sizes": (1, 4)},
        {"num_draft_tokens": ("auto",)},
        {"drafters": {"no": "none"}},
        {"prefill_chunks": (None, 16)},
    ],
)
def test_transformers_own_loop_takes_what_it_can_do(values: dict[str, Any]) -> None:
    arguments = {"drafters": {"lookup": "prompt_lookup"}, "num_draft_tokens": (3,), "batch_sizes": (1,)}
    arguments |= {"prefill_chunks": (None,)} | values
    with pytest.raises(ValueError, match="transformers' own loop drafts with a model or prompt_lookup, for one row"):
        Settings(PROMPTS, loop=TRANSFORMERS, **arguments)


def test_the_badge_is_a_line_of_markdown() -> None:
    certificate = finished("float32")  # in 4 bits its widths, no multiples of 32, are not batch-invariant with AVX-512
    num_ids, num_texts = f"{certificate.sampled.num_ids:,}", certificate.num_texts
    assert certificate.badge == (
        f"![specdec audit: lossless, {num_texts} of {num_texts} texts, {num_ids} ids](https://img.shields.io/badge/specdec%20audit-"
        f"lossless%2C%20{num_texts}%20of%20{num_texts}%20texts%2C%20{num_ids.replace(',', '%2C')}%20ids-brightgreen)"
    )
    assert certificate.to_json()["badge"] == certificate.badge


def test_the_page_shows_verdict_and_evidence() -> None:
    certificate = finished("int4_kernel")
    page = render_page(certificate)
    texts = f"{certificate.num_texts} of {certificate.num_texts}"
    for text in ("lossless</h1>", texts, "8 of 8", "never checks the last draft id", "equal, bit for bit"):
        assert text in page
    assert page.count("<rect") == 12
    assert "http" not in page.replace("http-equiv", "")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words and digits, no more."""
    words = ["<pad>", "<unk>", *"0123456789", "text", "number"]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    words_of = Tokenizer(model)
    words_of.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words_of, pad_token="<pad>", unk_token="<unk>")


def test_the_command_writes_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds depend on the drafter's name, so it is the same in every run."""
    monkeypatch.chdir(tmp_path)
    target, draft = Path("target"), Path("draft")
    for folder, model in zip((target, draft), pair("float32"), strict=True):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": [f"text number {i}", "?"]}) + "\n" for i in range(12)))
    arguments = ["audit", "lossless", str(target), "--drafter", str(draft), "--prompts", str(prompts)]
    arguments += ["--output", str(tmp_path / "audit")]
    short = ["--max-draws", "2500", "--max-new-tokens", "4", "--num-draft-tokens", "2", "--budget", "5min"]
    assert main([*arguments, *short]) == 0
    printed = capsys.readouterr().out
    assert printed.lstrip().startswith("lossless")
    assert "looks for a stop id once a" in printed
    certificate = json.loads((tmp_path / "audit" / "certificate.json").read_text())
    assert certificate["verdict"] in (LOSSLESS, ROUNDING)
    assert certificate["provenance"]["model"] == str(target)
    assert (tmp_path / "audit" / "certificate.html").is_file()
    assert main([*arguments, *short, "--json"]) == 0  # nothing is left to do
    again = json.loads(capsys.readouterr().out)
    assert again["sampled"] == certificate["sampled"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5min", 90), ("2h", 7200), ("7", 7)])
def test_a_budget_has_a_unit(text: str, seconds: float) -> None:
    assert parse(["audit", "lossless", "folder", "--budget", text]).budget == seconds


@pytest.mark.parametrize("arguments", [["--budget", "soon"], ["--batch", "1,x"]])
def test_arguments_that_cannot_be_read_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["audit", "lossless", "folder", *arguments])
    assert f"Invalid value for '{arguments[0]}': {arguments[1]!r} is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0s"], "--budget 0.0 must be positive"),
        (["--alpha", "2"], "--alpha 2.0 must lie between 0 and 1"),
        (["--batch", "0,4"], "--batch 0,4 must be whole numbers"),
        (["--prefill-chunk", "whole,0"], "--prefill-chunk whole,0 must be whole numbers"),
    ],
)
def test_bad_input_ends_with_a_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "lossless", "folder", *arguments]) == 2
    assert message in capsys.readouterr().err

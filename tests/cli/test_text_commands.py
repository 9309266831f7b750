"""generate, chat, demo and bench on the embedded pair; env."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import specdec
from specdec.core import verification
from specdec.core.steps import Draft, Verdict
from specdec.drafters.resolve import load_drafter
from specdec.runtime.loading import load
from specdec.utils import embedded
from specdec_cli import bench, chat, demo, env, stream
from specdec_cli.main import main
from specdec_cli.setup import Pair

TARGET, DRAFT = str(embedded.TARGET), str(embedded.DRAFT)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT = "for i in range("
SHORT = ["--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def chat_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded target with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(TARGET, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def plain_text(prompt: str, max_new_tokens: int = 16) -> str:
    """What transformers' own loop writes."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TARGET)
    model: Any = load(TARGET, "float32", "cpu")
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("drafter", ["prompt_lookup", DRAFT, "none"])
def test_generate_writes_the_text_of_plain_decoding(drafter: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(["generate", TARGET, PROMPT, "--drafter", drafter, "--num-draft-tokens", "3", *SHORT], capsys)
    assert out == plain_text(PROMPT).removesuffix("\n") + "\n"
    figures = err.splitlines()[-1]
    assert "16 tokens in " in figures
    assert ("nothing was drafted" if drafter == "none" else "mean acceptance length ") in figures
    assert figures.endswith("K=3")


def test_generate_marks_what_was_drafted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", TARGET, PROMPT, "--drafter", DRAFT, "--num-draft-tokens", "3", "--show-drafts", *SHORT]
    out, err = run(arguments, capsys)
    assert "⟨" in out or "⟦" in out
    unmarked = out.translate({ord(mark): None for mark in "⟨⟩⟦⟧"})
    assert unmarked.rstrip() == plain_text(PROMPT).rstrip()
    names = ("accepted", "⟨recovered⟩", "⟦bonus⟧", "plain")
    counts = [int(line.split()[1]) for line in err.splitlines() if line.split()[0] in names]
    assert len(counts) > 1
    assert sum(counts) == 16


def test_generate_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", TARGET, PROMPT, "--drafter", DRAFT, "--json", "--dtype", "bfloat16", *SHORT]
    report = json.loads(run([*arguments, "--temperature", "0.8", "--top-k", "20", "--seed", "5"], capsys)[0])
    assert (report["tokens"], report["dtype"], report["temperature"]) == (16, "bfloat16", 0.8)
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"])
    assert 0 < report["first_token_s"] < report["seconds"]
    assert sum(report["acceptance_histogram"]) <= 16


@pytest.mark.parametrize("source", ["--file", "stdin", "-"])
def test_generate_reads_a_file_and_standard_input(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    given = {"--file": ["--file", str(tmp_path / "prompt.txt")], "stdin": [], "-": ["-"]}[source]
    report = json.loads(run(["generate", TARGET, *given, "--json", "--max-new-tokens", "2"], capsys)[0])
    assert report["prompt"] == PROMPT


def test_generate_stops_behind_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    whole = plain_text(PROMPT)
    stop = whole[4:7]
    out, _ = run(["generate", TARGET, PROMPT, "--stop", stop, "--drafter", DRAFT, *SHORT], capsys)
    assert len(out) < len(whole)
    assert stop in out
    assert whole.startswith(out.removesuffix("\n"))


def test_generate_uses_the_chat_template(chat_target: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", chat_target, PROMPT, *SHORT]
    out, _ = run([*arguments, "--system", "Be brief."], capsys)
    assert out.rstrip("\n") == plain_text(f"system: Be brief.\nuser: {PROMPT}\nassistant: ").rstrip("\n")
    out, _ = run([*arguments, "--raw"], capsys)
    assert out.rstrip("\n") == plain_text(PROMPT).rstrip("\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_generate_keeps_what_was_written_before_ctrl_c(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = stream.TokenStream.put

    def interrupted(self: stream.TokenStream, ids: Tensor) -> None:
        put(self, ids)
        if len(self.ids) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(stream.TokenStream, "put", interrupted)
    assert main(["generate", TARGET, PROMPT, "--drafter", DRAFT, *SHORT, *["--json"] * as_json]) == 130
    captured = capsys.readouterr()
    if as_json:
        report = json.loads(captured.out)
        assert report["is_interrupted"]
        assert report["tokens"] == 5
    else:
        assert plain_text(PROMPT).startswith(captured.out.removesuffix("\n"))
        assert captured.err.splitlines()[-1].startswith("interrupted; 5 tokens in ")


def test_generate_quantizes(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(["generate", DRAFT, PROMPT, "--quantize", "int4", "--json", *SHORT], capsys)[0])
    assert report["tokens"] == 16
    assert report["text"]


def lines_of(*lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_keeps_the_conversation(
    chat_target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "conversation.json"
    lines_of(
        "import \\", "os", '"""', "a", "b", '"""', "/stats", f"/save {file}", f"/save {file}", "/reset", "class A:",
        "/exit", "never read", monkeypatch=monkeypatch,
    )  # fmt: skip
    out, err = run(["chat", chat_target, "--drafter", DRAFT, "--num-draft-tokens", "2", *SHORT], capsys)
    first = plain_text("user: import \nos\nassistant: ")
    second = plain_text(f"user: import \nos\nassistant: {first}\nuser: a\nb\nassistant: ")
    third = plain_text("user: class A:\nassistant: ")
    assert out.split() == " ".join([first, second, third]).split()
    roles_and_texts = [(message["role"], message["content"]) for message in json.loads(file.read_text())]
    assert roles_and_texts == [("user", "import \nos"), ("assistant", first), ("user", "a\nb"), ("assistant", second)]
    assert "last answer: 16 tokens in " in err
    assert "all 2 answers: 32 tokens in " in err
    assert err.count(f"4 messages written to {file}") == 2
    assert "the conversation is forgotten" in err


def test_chat_refuses_and_goes_on(
    chat_target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text("not to be lost")
    lines_of(
        "/stats", "/sav x", "/save", f"/save {tmp_path / 'other.txt'}", "/set temperature -1", "/set temperature nan",
        "/set top_p 2", "/set seed x", "/set heat 1", "/set max-new-tokens 2", "/set num_draft_tokens x",
        "/set num_draft_tokens 3", "/set temperature 0.5", "/set top_p none", "/set", "/help", "",
        "word " * 2000, "import", monkeypatch=monkeypatch,
    )  # fmt: skip
    out, err = run(["chat", chat_target, "--drafter", "prompt_lookup"], capsys)
    for expected in (
        "there is no answer yet", "/sav is no command", "/save takes a file", "File exists", "/set takes one of",
        "temperature -1 must be 0 or more", "temperature nan must be 0 or more", "top_p 2 must be 0 to 1",
        "seed 'x' is no value such as 1", "num_draft_tokens 'x' is no value such as 3 or auto", "num_draft_tokens 3",
        "max_new_tokens 2", "/reset begins anew",
    ):  # fmt: skip
        assert expected in err, expected
    assert (tmp_path / "other.txt").read_text() == "not to be lost"
    assert out.strip()  # the last message has an answer


def test_chat_goes_on_after_ctrl_c(
    chat_target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = stream.TokenStream.put, []

    def interrupted(self: stream.TokenStream, ids: Tensor) -> None:
        put(self, ids)
        if len(self.ids) == 4 and not calls:
            calls.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(stream.TokenStream, "put", interrupted)
    lines_of("import", "/reset", "import", monkeypatch=monkeypatch)
    out, err = run(["chat", chat_target, "--drafter", DRAFT, *SHORT], capsys)
    assert "interrupted; what was written stays in the conversation" in err
    assert out.rstrip().endswith(plain_text("user: import\nassistant: ").rstrip())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["a \\", "b"], "a \nb"),
        (['"""a', "b", '"""'], "a\nb"),
        (['"""a b"""'], "a b"),
        (['"""', "  a", 'b"""'], "  a\nb"),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    source: Iterator[str] = iter(lines)
    assert chat.read_message(lambda prompt: next(source)) == message
    assert not list(source)


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The demo with one round, and the number of threads that it sets set back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "ROUNDS", 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_round")
def test_demo_shows_origins_table_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(["demo", "--num-draft-tokens", "3", "--max-new-tokens", "24"], capsys)
    for expected in (
        "⟨recovered⟩", "⟦bonus⟧", "tokens/s", "specdec speculative", "mean acceptance length: ", "acceptance rate: ",
        "tokens per step, steps without a draft included: ",
    ):  # fmt: skip
        assert expected in out
    assert "identical: yes" in out.splitlines()
    counts = [
        int(line.split()[1]) for line in out.splitlines() if "the draft's, accepted" in line or "the target's," in line
    ]
    assert sum(counts) == 24


@pytest.mark.usefixtures("one_round")
def test_demo_json_is_one_object_whose_counts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(["demo", "--max-new-tokens", "24", "--json", "--num-draft-tokens", "2"], capsys)[0])
    assert report["identical"] is True
    assert report["tokens"] == 24
    drafting = sum(report["acceptance_histogram"])
    plain = round(24 - (report["mean_acceptance_length"] or 0) * drafting)  # such a step emits one id
    assert report["tokens_per_step"] == pytest.approx(24 / (drafting + plain))
    assert report["prompt"] in [one["prompt"] for one in embedded.prompts()]
    rows = {row["engine"]: row for row in report["results"] if not row["is_compiled"]}
    rates = [rows[name]["tokens_per_second"] for name in (bench.SPECULATIVE, bench.PLAIN)]
    assert report["speedup"] == pytest.approx(rates[0] / rates[1])


@pytest.mark.usefixtures("one_round")
def test_demo_says_how_to_compile_where_that_was_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    out, _ = run(["demo", "--max-new-tokens", "2"], capsys)
    assert "`specdec demo --compile`" in " ".join(out.split())


@pytest.mark.usefixtures("one_round")
def test_demo_reports_a_difference_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept_always(draft: Draft, target_ids: Tensor) -> Verdict:
        return Verdict(draft.lengths, target_ids.gather(1, draft.lengths[:, None])[:, 0])

    monkeypatch.setattr(verification, "verify_greedy", accept_always)
    assert main(["demo", "--max-new-tokens", "24", "--num-draft-tokens", "3"]) == 1
    assert "identical: no" in capsys.readouterr().out.splitlines()


def test_bench_compares_engines_batches_and_k(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", TARGET, "--drafter", DRAFT, "--batch", "1,2", "--num-draft-tokens", "2", "--rounds", "1"]
    arguments += ["--max-prompts", "2", "--max-new-tokens", "6", "--json"]
    report = json.loads(run(arguments, capsys)[0])
    kinds = [(row["batch"], row["engine"], row["num_draft_tokens"]) for row in report["results"]]
    shared = [(bench.PLAIN, None), (bench.SPECULATIVE, 2)]
    single = [(bench.STOCK, None), (bench.ASSISTED, 2), *shared]
    assert kinds == [(1, *kind) for kind in single] + [(2, *kind) for kind in [(bench.STOCK, None), *shared]]
    for row in report["results"]:
        assert (row["texts"], row["identical"]) == (2, 2)
        assert (row["calls"], len(row["call_seconds"])) == (2 // row["batch"], 1)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert (row["mean_acceptance_length"] is not None) == (row["engine"] == bench.SPECULATIVE)
    assert [sentence.split(":")[0] for sentence in report["verdict"]] == ["Batch 1", "Batch 2"]


def test_transformers_assisted_loop_has_the_number_of_draft_tokens_that_its_row_says() -> None:
    """And with auto its own schedule, also after a row with a number."""
    model = load(TARGET, "float32", "cpu")
    pair = Pair(model, None, load_drafter(DRAFT, model, "float32"))
    config: Any = pair.drafter.runner.model.generation_config  # type: ignore[attr-defined]
    own = config.to_dict()
    found = []
    for k in (3, "auto"):
        with bench.prepared(pair, bench.Engine(bench.ASSISTED, k)) as more:
            within = more["assistant_model"].generation_config
            found.append((within.num_assistant_tokens, within.num_assistant_tokens_schedule))
            within.num_assistant_tokens = 9  # as the loop itself may
        assert pair.drafter.runner.model.generation_config.to_dict() == own  # type: ignore[attr-defined]
    assert found == [(3, "constant"), (config.num_assistant_tokens, config.num_assistant_tokens_schedule)]


def test_bench_prints_a_table_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(
        ["bench", TARGET, "--rounds", "1", "--max-prompts", "1", "--max-new-tokens", "4", "--num-draft-tokens", "2"],
        capsys,
    )
    assert "specdec speculative" in out
    assert "range" in out
    assert "Batch 1: " in out


def row(speedup: float, low: float, high: float, k: int = 2) -> dict[str, Any]:
    values = {"speedup": speedup, "speedup_low": low, "speedup_high": high}
    return {"batch": 1, "engine": bench.SPECULATIVE, "num_draft_tokens": k, **values}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [row(1.5, 1.2, 1.8), row(1.3, 1.2, 1.4, 4)],
            "Batch 1: drafting pays, most with K=2: 1.50× (1.20 to 1.80) plain",
        ),
        ([row(0.8, 0.7, 0.9), row(0.9, 0.8, 0.95, 4)], "Batch 1: no setting pays; the best, K=4, reaches 0.90×"),
        ([row(1.1, 0.9, 1.3)], "Batch 1: no clear difference; the best setting, K=2, reaches 1.10× (0.90 to 1.30)"),
    ],
)
def test_the_verdict_of_a_bench(rows: list[dict[str, Any]], sentence: str) -> None:
    assert bench.verdict(1, rows).startswith(sentence)


def test_the_interval_of_a_bench_is_of_calls_or_rounds() -> None:
    def measured(seconds: list[list[float]]) -> bench.Measured:
        texts = [[[1, 2]] for _ in seconds[0]]
        return bench.Measured(bench.Engine(bench.PLAIN), 1, seconds=seconds, texts=texts)

    one = measured([[1.0], [2.0], [1.0]]).speedup(measured([[2.0], [2.0], [4.0]]))
    assert (one.value, one.low, one.high) == (2, 1, 4)  # medians 1 and 2; rounds 2, 1 and 4
    several = measured([[1.0, 2.0] * 4, [1.0, 2.0] * 4]).speedup(measured([[2.0, 5.0] * 4, [2.0, 5.0] * 4]))
    assert several.value == pytest.approx(28 / 12)
    assert several.low is not None
    assert several.high is not None
    assert 2 <= several.low < 28 / 12 < several.high < 2.5


def test_env_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(run(["env", "--json"], capsys)[0])
    assert report["specdec"] == specdec.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["missing"] == []
    found = env.find_spec
    monkeypatch.setattr(env, "find_spec", lambda name: None if name == "hydra" else found(name))
    monkeypatch.setenv("PATH", "")
    out, _ = run(["env"], capsys)
    assert 'hydra, for bench, experiment, train-drafter and report: pip install "specdec-lossless[experiments]"' in out
    assert "a C++ compiler, for the CPU kernels and compile=True: apt-get install g++" in out

"""The audit of a server: two that answer by known laws, in this process or over HTTP."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.audit.api import ID_PREFIX, Completion, Law, Refused, Server, together
from specdec.audit.evidence import Evidence
from specdec.audit.findings import FAULTY, INCONCLUSIVE, LOSSLESS, ROUNDING
from specdec.audit.page import render_page
from specdec.audit.server import (
    BETTORS,
    MISTAKES,
    NO_IDS,
    NOT_SAMPLED,
    ServerAudit,
    ServerCertificate,
    ServerSettings,
    audit_server,
    certify_server,
    total_variation,
)
from specdec.audit.statistics import RepeatedPrefixes
from specdec_cli.main import main

VOCAB_SIZE = 12
PROMPTS = [f"prompt {number}" for number in range(16)]


@dataclass
class FakeServer:
    """A model whose law depends on the last id alone. shift: of its draws towards the most likely id.

    noise: of its log probabilities, anew for each request. greedy: how it chooses from logits where nothing is sampled.
    """

    shift: float = 0.0
    noise: float = 0.0
    greedy: Callable[[list[float]], int] = lambda logits: max(range(VOCAB_SIZE), key=logits.__getitem__)
    shows_ids: bool = True
    url: str = "http://fake"
    is_extended: bool = True
    model: str = "fake"
    version: str | None = "1"
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def tokenize(self, text: str) -> list[int] | None:
        return [ord(character) % VOCAB_SIZE for character in text] if self.shows_ids else None

    def logits(self, last: int) -> list[float]:
        generator = random.Random(last)
        return [3 * generator.random() + self.noise * self.random.uniform(-1, 1) for _ in range(VOCAB_SIZE)]

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        num_logprobs: int = 0,
        read_again: bool = False,
    ) -> Completion:
        ids = [ord(character) % VOCAB_SIZE for character in prompt] if isinstance(prompt, str) else list(prompt)
        draws, laws, new = random.Random(seed), [], []
        for _ in range(max_tokens):
            logits = self.logits(ids[-1])
            total = math.log(math.fsum(map(math.exp, logits)))
            laws.append(sorted(((logit - total, token) for token, logit in enumerate(logits)), reverse=True))
            if temperature == 0:
                token = self.greedy(logits)
            elif draws.random() < self.shift:
                token = laws[-1][0][1]
            else:
                weights = [math.exp(logit / temperature) for logit in logits]
                token = draws.choices(range(VOCAB_SIZE), weights)[0]
            ids.append(token)
            new.append(token)
        text = "".join(chr(ord("a") + token) for token in new)
        if not (num_logprobs and self.shows_ids):
            return Completion(text, None, None, len(new))
        shown = [Law({token: logprob for logprob, token in law[:num_logprobs]}) for law in laws]
        return Completion(text, new, shown, len(new))


def settings(**changes: Any) -> ServerSettings:
    values: dict[str, Any] = {"max_new_tokens": 8, "load": 4, "num_logprobs": 5, "max_draws": 3000, "alpha": 0.001}
    return ServerSettings(PROMPTS, **values | changes)


def certificate_of(reference: FakeServer, candidate: FakeServer, **changes: Any) -> ServerCertificate:
    audit = ServerAudit(reference, candidate, settings(**changes), Evidence({}))  # type: ignore[arg-type]
    audit.run(600)
    return certify_server(audit, {"model": "fake", "reference": "a", "candidate": "b", "date": "", "command": ""})


def test_a_server_that_answers_alike_is_lossless_and_mistakes_are_found() -> None:
    certificate = certificate_of(FakeServer(), FakeServer())
    assert (certificate.verdict, certificate.reasons) == (LOSSLESS, [])
    assert certificate.num_texts == certificate.num_identical == 2 * len(PROMPTS)
    assert [(row.server, row.load) for row in certificate.greedy] == [
        ("reference", 4),
        ("candidate", 1),
        ("candidate", 4),
    ]
    assert [row.found for row in certificate.controls] == [True] * len(MISTAKES)
    assert certificate.sampled.num_ids >= 3000
    in_all, first, later = (row.num_ids for row in certificate.sampled.groups)
    assert in_all == first + later
    assert 0.01 < certificate.sampled.smallest_variation < 0.1
    assert certificate.variation == 0


def test_draws_that_favour_the_most_likely_id_are_found() -> None:
    certificate = certificate_of(FakeServer(), FakeServer(shift=0.15))
    assert certificate.verdict == FAULTY
    assert certificate.reasons == ["sampled ids are not drawn from the law of the reference"]
    assert certificate.exit_code == 1


def test_false_alarms_are_no_more_frequent_than_stated() -> None:
    """200 runs of 128 ids, of which the reference lists the five most likely ones, with rounding."""
    alarms = 0
    for seed in range(200):
        audit = ServerAudit(FakeServer(noise=1e-3), FakeServer(noise=1e-3), settings(seed=seed), Evidence({}))  # type: ignore[arg-type]
        audit.evidence.add(("rounding", 0), 1.0, {"variation": 1e-3, "margin": 2e-3, "contexts": 4})
        log_wealth = torch.zeros(len(BETTORS), dtype=torch.float64)
        for index in range(4):
            result = audit.sample(4, index, RepeatedPrefixes())
            assert result["num_ids"]["all"] == 32
            log_wealth += torch.tensor(result["log_wealth"], dtype=torch.float64)
        alarms += BETTORS.log_e_value(log_wealth) >= math.log(1 / 0.05)
    assert alarms <= 20  # at most 5 %; binomial, P(more than 20) < 1e-3


def second_likeliest(logits: list[float]) -> int:
    return sorted(range(VOCAB_SIZE), key=logits.__getitem__)[-2]


def test_another_greedy_choice_is_a_fault() -> None:
    certificate = certificate_of(FakeServer(noise=1e-6), FakeServer(greedy=second_likeliest), command="audit")
    assert certificate.verdict == FAULTY
    assert certificate.reasons[0] == "32 of 32 greedy texts differ from the reference's, not by rounding"
    [first, *_] = certificate.divergences
    assert first["position"] == 0
    assert first["margin"] > 100 * first["spread"] > 0
    assert first["command"] == "audit --first-prompt 0 --max-prompts 1"


def test_a_margin_takes_two_ids() -> None:
    with pytest.raises(ValueError, match="num_logprobs=1 must be 2 or more"):
        settings(num_logprobs=1)


def test_a_choice_within_the_rounding_of_the_reference_is_none() -> None:
    """Some margins of this law are smaller than its noise."""
    certificate = certificate_of(FakeServer(noise=0.03), FakeServer(noise=0.03))
    assert certificate.divergences
    assert certificate.variation > 0.01
    assert all(found["is_rounding"] for found in certificate.divergences)
    assert (certificate.verdict, [row.found for row in certificate.controls]) == (ROUNDING, [True] * len(MISTAKES))
    page = render_page(certificate)
    assert "lossless up to rounding</h1>" in page
    assert "rounding</td>" in page
    assert "An API shows no steps" in page


def test_without_ids_texts_alone_are_compared() -> None:
    same = certificate_of(FakeServer(shows_ids=False), FakeServer())
    assert (same.verdict, same.sampled.num_ids, same.num_identical) == (INCONCLUSIVE, 0, 32)
    assert NO_IDS in same.reasons
    assert [(row.name, row.found) for row in same.controls] == [("sampled", True)]
    assert not any("more time" in reason for reason in same.reasons)
    assert same.limits[0] == NO_IDS
    other = certificate_of(FakeServer(shows_ids=False), FakeServer(greedy=second_likeliest))
    assert other.verdict == INCONCLUSIVE
    assert "32 of 32 greedy texts differ, and the API does not show why" in other.reasons
    assert "unknown</td>" in render_page(other)


def test_a_server_that_does_not_sample_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own does where the model's generation config says do_sample=False."""
    complete = FakeServer.complete

    def greedy(self: FakeServer, prompt: Any, max_tokens: int, **options: Any) -> Completion:
        return complete(self, prompt, max_tokens, **options | {"temperature": 0.0})

    monkeypatch.setattr(FakeServer, "complete", greedy)
    certificate = certificate_of(FakeServer(shows_ids=False), FakeServer(shows_ids=False))
    assert [(row.name, row.found) for row in certificate.controls] == [("sampled", None)]
    assert (certificate.verdict, certificate.num_identical) == (INCONCLUSIVE, 32)
    assert NOT_SAMPLED in certificate.reasons
    assert not any("not found" in reason for reason in certificate.reasons)
    shown = certificate_of(FakeServer(), FakeServer())
    assert (shown.verdict, shown.reasons) == (FAULTY, ["sampled ids are not drawn from the law of the reference"])


def test_ids_are_tested_only_where_all_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hides the ids that end texts would show a selection."""
    candidate = FakeServer()
    audit = ServerAudit(FakeServer(), candidate, settings(), Evidence({}))  # type: ignore[arg-type]
    complete = FakeServer.complete

    def hidden(self: FakeServer, prompt: Any, max_tokens: int, **options: Any) -> Completion:
        shown = complete(self, prompt, max_tokens, **options)
        return Completion(shown.text, (shown.ids or [])[:-1], shown.laws, shown.num_ids)

    monkeypatch.setattr(FakeServer, "complete", hidden)
    with pytest.raises(ValueError, match="http://fake showed 7 of 8 ids of a text"):
        audit.sample(4, 0, RepeatedPrefixes())


def test_rounding_is_measured_before_ids_are_tested() -> None:
    audit = ServerAudit(FakeServer(), FakeServer(), settings(), Evidence({}))  # type: ignore[arg-type]
    audit.run(600)
    kinds = [key[0] for key in audit.evidence.results]
    assert kinds.index("rounding") < kinds.index("sampled")
    assert kinds.index("rounding") < kinds.index("control")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ({1: 0.5, 2: 0.3}, {1: 0.5, 2: 0.3}, 0.0),
        ({1: 0.5, 2: 0.3}, {1: 0.4, 2: 0.3}, 0.1),
        ({1: 0.5, 2: 0.3}, {1: 0.5, 3: 0.3}, 0.0),  # of 2 and 3 nothing is known
        ({1: 1.0}, {1: 0.25, 2: 0.75}, 0.75),
    ],
)
def test_the_total_variation_of_what_both_laws_list(a: dict[int, float], b: dict[int, float], distance: float) -> None:
    laws = [Law({token: math.log(p) for token, p in law.items()}) for law in (a, b)]
    assert total_variation(laws[0], laws[1]) == pytest.approx(distance)


def as_llamacpp(completion: Completion) -> dict[str, Any]:
    pairs = zip(completion.ids or [], completion.laws or [], strict=True)
    content = [
        {"id": token, "top_logprobs": [{"id": other, "logprob": p} for other, p in law.logprobs.items()]}
        for token, law in pairs
    ]
    return {"content": content}


def as_vllm(completion: Completion) -> dict[str, Any]:
    top = [{f"{ID_PREFIX}{other}": p for other, p in law.logprobs.items()} for law in completion.laws or []]
    return {"tokens": [f"{ID_PREFIX}{token}" for token in completion.ids or []], "top_logprobs": top}


def as_texts(completion: Completion) -> dict[str, Any]:
    return {"tokens": list(completion.text), "top_logprobs": None}


@contextmanager
def served(
    model: FakeServer, show: Callable[[Completion], dict[str, Any]] = as_llamacpp, *, is_strict: bool = False
) -> Iterator[str]:
    """The URL of a server of a model in this process. is_strict: it refuses fields that are not OpenAI's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "fake"}]} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.answer({"tokens": model.tokenize(body["content"])})
                return
            if is_strict and "top_k" in body:
                self.answer({"error": "unexpected fields"}, 422)
                return
            assert (body["top_p"], body["model"]) == (1.0, "fake")
            assert is_strict or (body["top_k"], body["min_p"]) == (0, 0.0)
            count = body.get("logprobs", 0)
            text = model.complete(
                body["prompt"],
                body["max_tokens"],
                temperature=body["temperature"],
                seed=body["seed"],
                num_logprobs=count,
            )
            choice = {"text": text.text, "logprobs": show(text) if count else None}
            self.answer({"choices": [choice], "usage": {"completion_tokens": text.num_ids}, "system_fingerprint": "f"})

        def answer(self, body: Any, status: int = 200) -> None:
            self.send_response(status if body is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body or {"error": "no such page"}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("show", [as_llamacpp, as_vllm])
def test_ids_and_laws_are_read_from_an_answer(show: Callable[[Completion], dict[str, Any]]) -> None:
    model = FakeServer()
    with served(model, show) as url:
        server = Server(f"{url}/v1/")
        assert server.model == "fake"
        ids = server.tokenize("abc")
        assert ids == model.tokenize("abc")
        assert ids is not None
        found = server.complete(ids, 3, temperature=1.0, seed=5, num_logprobs=4)
        assert server.version == "f"
    assert found == model.complete(ids, 3, temperature=1.0, seed=5, num_logprobs=4)
    assert found.laws is not None
    assert 0 < found.laws[0].rest < 1


def test_an_answer_with_texts_alone_has_no_ids() -> None:
    with served(FakeServer(), as_texts) as url:
        found = Server(url).complete("abc", 3, num_logprobs=4)
    assert (found.ids, found.laws, len(found.text)) == (None, None, 3)


def test_a_server_that_takes_openais_fields_alone_is_asked_for_texts() -> None:
    """Whatever ids it shows: its own defaults may cut the law that they are drawn from."""
    with served(FakeServer(), is_strict=True) as reference, served(FakeServer()) as candidate:
        certificate = audit_server(reference, candidate, settings(max_new_tokens=4), budget_s=600)
    assert (certificate.verdict, certificate.num_identical) == (INCONCLUSIVE, 32)
    assert NO_IDS in certificate.reasons


def test_a_server_that_refuses_prompts_of_ids_is_asked_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = FakeServer.complete

    def texts_alone(self: FakeServer, prompt: Any, max_tokens: int, **options: Any) -> Completion:
        if not isinstance(prompt, str):
            raise Refused("http://fake answered 400: prompt must be a string", 400)
        return complete(self, prompt, max_tokens, **options)

    monkeypatch.setattr(FakeServer, "complete", texts_alone)
    certificate = certificate_of(FakeServer(), FakeServer())
    assert (certificate.verdict, certificate.num_identical) == (INCONCLUSIVE, 32)
    assert NO_IDS in certificate.reasons


def test_a_refusal_after_an_answer_is_an_error() -> None:
    model = FakeServer()
    with served(model) as url:
        server = Server(url)
        server.complete("abc", 1)
        model.complete = None  # type: ignore[assignment, method-assign]
        with pytest.raises(ValueError, match="did not answer"):
            server.complete("abc", 1)
    assert server.is_extended


def test_the_command_audits_two_servers_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with served(FakeServer()) as reference, served(FakeServer()) as candidate:
        arguments = ["audit", "lossless", "--reference", reference, "--candidate", candidate, "--prompts", str(prompts)]
        arguments += [
            "--max-draws",
            "1000",
            "--max-new-tokens",
            "4",
            "--load",
            "4",
            "--output",
            str(tmp_path / "audit"),
        ]
        assert main([*arguments, "--budget", "5min"]) == 0
        printed = capsys.readouterr().out
        assert printed.lstrip().startswith("lossless")
        assert "Not shown: An API shows no steps" in printed
        certificate = json.loads((tmp_path / "audit" / "certificate.json").read_text())
        assert certificate["provenance"]["candidate"] == f"{candidate} (f)"
        assert (tmp_path / "audit" / "certificate.html").is_file()
        assert main([*arguments, "--json"]) == 0  # nothing is left to do
    again = json.loads(capsys.readouterr().out)
    assert again["sampled"] == certificate["sampled"]


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1/models did not answer: .*refused"):
        audit_server("http://127.0.0.1:9", "http://127.0.0.1:9", settings())
    with pytest.raises(ValueError, match="'localhost:8000' is no URL of a server"):
        Server("localhost:8000")
    with served(FakeServer()) as url:
        server = Server(url)
        with pytest.raises(ValueError, match=r"/other/v1/models answered 404: .*no such page"):
            Server(f"{url}/other")
    with pytest.raises(ValueError, match=r"/v1/completions did not answer"):
        server.complete("abc", 1)


def test_requests_are_made_together() -> None:
    barrier = threading.Barrier(3, timeout=30)

    def call() -> Completion:
        barrier.wait()
        return Completion("", None, None, 0)

    assert len(together([call] * 3, load=3)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "http://a"], "--reference and --candidate go together"),
        ([], "an audit takes either MODEL, or --reference and --candidate"),
        (["folder", "--reference", "http://a", "--candidate", "http://b"], "an audit takes either MODEL, or"),
        (["--reference", "http://a", "--candidate", "http://b", "--load", "1"], "load=1 must be 2 or more"),
    ],
)
def test_bad_input_ends_with_a_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "lossless", *arguments]) == 2
    assert message in capsys.readouterr().err

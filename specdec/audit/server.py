"""The audit of a server: does speculation change its answers? Two servers of one model, without and with it.

Asked through the OpenAI API: greedy texts of the two, one request at a time and several; ids that the candidate draws,
against the laws that the reference gives for them, by the bets of statistics.py.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import specdec
from specdec.audit.api import Completion, Law, Refused, Server, together
from specdec.audit.evidence import Evidence, Key
from specdec.audit.findings import Findings, control_rows, e_value, histogram, sum_up
from specdec.audit.identity import first_difference
from specdec.audit.statistics import Bet, Bettors, Kind, RepeatedPrefixes, clopper_pearson
from specdec.audit.work import OnProgress, Piece, ignore_progress, work_through
from specdec.utils.provenance import provenance

SHARES = {"rounding": 0.1, "greedy": 0.4, "sampled": 0.35, "control": 0.15}  # of the budget, as long as work is left
SAMPLED_TOKENS = 8  # ids of a sampled text
CHECKED_TOKENS = 8  # ids behind a prompt, after which a law is measured several times
UNLISTED = -1  # any id that a law does not list
RARE = 1e-3  # an id of a smaller probability is rare
MARGINS = 2  # of the largest change of a margin that was measured: within so many, rounding may have decided
CONTROL_ROUNDS = 40  # calls after which a mistake counts as not found

GROUPS = {"all": "all ids", "first": "first ids of a text", "later": "later ids, which may be drafted"}
# likelihood, rare, repeated: as in sampling.py. likeliest: the most likely id.
FEATURES = {
    "all": ("likelihood", "likeliest", "rare", "repeated"),
    "first": ("likelihood",),
    "later": ("likelihood", "likeliest"),
}
BETTORS = Bettors(FEATURES)
TEMPERATURES = {"temperature": 1.5, "likeliest": 0.0}  # at which ids are drawn wrongly, on purpose
MISTAKES = {
    "temperature": "draws at temperature 1.5",
    "likeliest": "always takes the most likely id",
    "sampled": "samples where greedy texts are compared",
}
LIMITS = [
    "An API shows no steps: ids cannot be grouped by whether they were drafted, verified or drawn after a rejection.",
    "Windows of other widths cannot be asked for: rounding is measured between prompts that are read and ids that are"
    " decoded, alone and together with other requests.",
    "Ids are sampled at temperature 1 without further processors, whose laws an API does not give.",
]
NO_IDS = "the servers do not show the ids of texts and the most likely next ids, so texts alone were compared"
NOT_SAMPLED = "asked for temperature 1, the candidate writes its greedy texts; its model's generation config may say so"


@dataclass(frozen=True)
class ServerSettings:
    """What is asked. prompts: texts. model: as requests name it; None: the first that a server lists.

    max_new_tokens: of greedy texts. load: how many requests are under way at a time, besides one. num_logprobs: of the
    most likely next ids that the reference gives. max_draws: ids after which sampling ends. alpha: the rate of false
    alarms of the sampling test over the whole run. first_prompt, command: as in specdec.audit.lossless.Settings.
    """

    prompts: Sequence[str]
    model: str | None = None
    max_new_tokens: int = 64
    load: int = 8
    num_logprobs: int = 20
    max_draws: int = 20_000
    alpha: float = 0.001
    seed: int = 0
    first_prompt: int = 0
    command: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("an audit takes prompts, and there are none")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.num_logprobs < 2:
            raise ValueError(f"num_logprobs={self.num_logprobs} must be 2 or more, for margins between two ids")
        if self.load < 2:
            raise ValueError(f"load={self.load} must be 2 or more; single requests are made as well")


@dataclass(frozen=True)
class ServerRow:
    """Greedy texts of one server at one load, against the reference's at load 1; the interval is of 95 %."""

    server: str
    load: int
    texts: int
    identical: int
    interval: tuple[float, float]


@dataclass(kw_only=True)
class ServerCertificate(Findings):
    """What an audit of a server found.

    greedy: texts by server and load. variation: the largest total variation between two laws that the reference gave
    for the same ids, so what rounding does there. limits: what was not shown.
    """

    greedy: list[ServerRow]
    variation: float
    limits: list[str]

    @property
    def num_texts(self) -> int:
        return sum(row.texts for row in self.greedy if row.server == "candidate")

    @property
    def num_identical(self) -> int:
        return sum(row.identical for row in self.greedy if row.server == "candidate")

    def greedy_table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [row.server, str(row.load), f"{row.identical} of {row.texts}", "{:.1%} to {:.1%}".format(*row.interval)]
            for row in self.greedy
        ]
        return ["server", "requests at a time", "identical", "95 % interval"], rows


class ServerAudit:
    """Runs the pieces of work of one audit."""

    def __init__(self, reference: Server, candidate: Server, settings: ServerSettings, evidence: Evidence) -> None:
        self.reference, self.candidate, self.settings, self.evidence = reference, candidate, settings, evidence
        self.prefixes = RepeatedPrefixes()
        self.laws: dict[tuple[int, ...], Law] = {}
        self.generator = torch.Generator().manual_seed(settings.seed)
        tokenized = [reference.tokenize(prompt) for prompt in settings.prompts]
        self.ids = [ids for ids in tokenized if ids]
        self.shows_ids = len(self.ids) == len(settings.prompts) and self._shows_ids()
        self.prompts: Sequence[str | Sequence[int]] = self.ids if self.shows_ids else settings.prompts

    def _shows_ids(self) -> bool:
        """Whether both servers show ids, and the reference laws, for a prompt of ids."""
        for server in (self.reference, self.candidate):
            try:
                shown = server.complete(self.ids[0], 2, num_logprobs=self.settings.num_logprobs)
            except Refused:
                return False
            if not server.is_extended:  # its own defaults may cut the law that ids are drawn from
                return False
            if shown.ids is None or len(shown.ids) != shown.num_ids or (server is self.reference and not shown.laws):
                return False
        return True

    def run(self, budget_s: float, on_progress: OnProgress = ignore_progress) -> None:
        """Work until nothing is left, or for budget_s seconds."""
        queues = {"greedy": self._greedy_work()}
        if self.shows_ids:  # rounding first, since the bets allow for it
            queues = {"rounding": self._rounding_work(), **queues, "sampled": self._sampled_work()}
        queues["control"] = self._control_work()
        work_through(queues, SHARES, self.evidence, budget_s, on_progress)

    @property
    def mistakes(self) -> dict[str, str]:
        """Those that can be made; draws can be tested only where ids are shown."""
        return {name: what for name, what in MISTAKES.items() if self.shows_ids or name not in TEMPERATURES}

    def _blocks(self) -> Iterator[range]:
        count = len(self.prompts)
        for first in range(0, count, self.settings.load):
            yield range(first, min(first + self.settings.load, count))

    def _rounding_work(self) -> Iterator[Piece]:
        for rows in itertools.islice(self._blocks(), 4):
            key: Key = ("rounding", rows[0])
            if key not in self.evidence.results:
                yield key, "rounding of the reference", partial(self.measure_rounding, rows)

    def measure_rounding(self, rows: range) -> dict[str, Any]:
        """How far laws of the reference differ for the same ids, from request to request.

        -> the largest total variation, and the largest change of the margin between the two most likely ids.
        """
        variation = margin = 0.0
        texts = [self._ask(self.reference, self.ids[row], CHECKED_TOKENS) for row in rows]
        contexts = [[*self.ids[row], *(text.ids or [])[:-1]] for row, text in zip(rows, texts, strict=True)]
        decoded = [(text.laws or [])[-1] for text in texts]
        for others in self._measured_again(contexts):
            for law, other in zip(decoded, others, strict=True):
                variation = max(variation, total_variation(law, other))
                first, second = sorted(law.logprobs, key=law.logprob, reverse=True)[:2]
                margin = max(margin, abs(_margin(law, first, second) - _margin(other, first, second)))
        return {"variation": variation, "margin": margin, "contexts": len(contexts)}

    def _measured_again(self, contexts: Sequence[Sequence[int]]) -> list[list[Law]]:
        """Laws behind contexts: read as prompts, alone and together."""
        calls = [partial(self._ask, self.reference, context, 1, read_again=True) for context in contexts]
        answers = [[call() for call in calls], together(calls, self.settings.load)]
        return [[(answer.laws or [])[0] for answer in some] for some in answers]

    def _ask(self, server: Server, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> Completion:
        """With ids and laws where the servers show them."""
        num_logprobs = self.settings.num_logprobs if self.shows_ids else 0
        return server.complete(prompt, max_tokens, num_logprobs=num_logprobs, **options)

    @property
    def rounding(self) -> tuple[float, float]:
        """The largest total variation and change of a margin that were measured."""
        found = list(self.evidence.of("rounding").values())
        return tuple(max((one[name] for one in found), default=0.0) for name in ("variation", "margin"))  # type: ignore[return-value]

    def _greedy_work(self) -> Iterator[Piece]:
        for rows in self._blocks():
            key: Key = ("greedy", rows[0])
            if key not in self.evidence.results:
                yield key, "greedy texts", partial(self.compare_greedy, rows)

    def compare_greedy(self, rows: range) -> dict[str, Any]:
        """Texts of some prompts against the reference's, one at a time and together: counts and divergences."""
        plain = self._texts(self.reference, rows, 1)
        compared = [
            ("reference", self.settings.load, self._texts(self.reference, rows, self.settings.load)),
            ("candidate", 1, self._texts(self.candidate, rows, 1)),
            ("candidate", self.settings.load, self._texts(self.candidate, rows, self.settings.load)),
        ]
        counts, divergences = [], []
        for name, load, texts in compared:
            differing = [
                (row, a, b) for row, a, b in zip(rows, plain, texts, strict=True) if _content(a) != _content(b)
            ]
            counts.append({"server": name, "load": load, "texts": len(rows), "identical": len(rows) - len(differing)})
            if name == "candidate":
                divergences += [self._explain(row, load, a, b) for row, a, b in differing]
        return {"counts": counts, "divergences": divergences}

    def _texts(self, server: Server, rows: range, load: int, **options: Any) -> list[Completion]:
        calls = [partial(self._ask, server, self.prompts[row], self.settings.max_new_tokens, **options) for row in rows]
        return together(calls, load)

    def _explain(self, row: int, load: int, plain: Completion, other: Completion) -> dict[str, Any]:
        """The first difference of two texts; with ids, the margin between the two under the reference."""
        found: dict[str, Any] = {"prompt": self.settings.first_prompt + row, "load": load}
        position = first_difference(_content(plain), _content(other)) or 0
        found |= {"position": position, "plain_id": None, "candidate_id": None}
        if plain.ids is None or other.ids is None or position >= min(len(plain.ids), len(other.ids)):
            return found | {"margin": None, "spread": None}
        ids = plain.ids[position], other.ids[position]
        decoded = (plain.laws or [])[position]
        context = [*self.ids[row], *plain.ids[:position]]
        again = self._measured_again([context])
        margins = [_margin(law, *ids) for law in (decoded, *(laws[0] for laws in again))]
        spread = max(abs(margin - margins[0]) for margin in margins)
        return found | {"plain_id": ids[0], "candidate_id": ids[1], "margin": margins[0], "spread": spread}

    def _sampled_work(self) -> Iterator[Piece]:
        drawn = sum(result["num_ids"]["all"] for result in self.evidence.of("sampled").values())
        index = 0
        while drawn < self.settings.max_draws:
            for load in (1, self.settings.load):
                key: Key = ("sampled", load, index)
                if key not in self.evidence.results:
                    yield key, f"sampled texts, {load} at a time", partial(self.sample, load, index, self.prefixes)
                    drawn += self.evidence.results[key]["num_ids"]["all"]
            index += 1

    def sample(self, load: int, index: int, prefixes: RepeatedPrefixes, temperature: float = 1.0) -> dict[str, Any]:
        """Texts that the candidate draws for two prompts, several each; every id against the reference's law."""
        prompts = [self.ids[(index + 7 * number) % len(self.ids)] for number in range(2)]
        prompts = [prompt for prompt in prompts for _ in range(max(2, load // 2))]
        seeds = [
            zlib.crc32(repr((self.settings.seed, load, index, number, temperature)).encode()) >> 1
            for number in range(len(prompts))
        ]
        calls = [
            partial(self.candidate.complete, prompt, SAMPLED_TOKENS, temperature=temperature, seed=seed, num_logprobs=1)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        tolerance = self.rounding[0]
        bets: dict[Kind, list[Bet]] = defaultdict(list)
        means: list[float] = []
        num_ids = dict.fromkeys(GROUPS, 0)
        for prompt, text in zip(prompts, together(calls, load), strict=True):
            if len(text.ids or []) != text.num_ids:  # without the ids that end texts, the others are a selection
                raise ValueError(
                    f"{self.candidate.url} showed {len(text.ids or [])} of {text.num_ids} ids of a text, and its draws"
                    " can be tested only where it shows all"
                )
            for position, token in enumerate(text.ids or []):
                prefix = (*prompt, *(text.ids or [])[:position])
                if prefix not in self.laws:
                    self.laws[prefix] = (self._ask(self.reference, prefix, 1).laws or [])[0]
                features = self._features(self.laws[prefix], token, prefix, prefixes)
                for group in ("all", "first" if position == 0 else "later"):
                    num_ids[group] += 1
                    for name in FEATURES[group]:
                        bets[group, name].append((*features[name], tolerance))
                if position:
                    means.append(features["likeliest"][1])
        return {"log_wealth": BETTORS.wager(bets), "num_ids": num_ids, "means": histogram(means)}

    def _features(
        self, law: Law, drawn: int, prefix: tuple[int, ...], prefixes: RepeatedPrefixes
    ) -> dict[str, tuple[float, float]]:
        """z and its mean, by feature; ids that the law does not list count as one, less likely than all others."""
        probs = {token: math.exp(logprob) for token, logprob in law.logprobs.items()} | {UNLISTED: law.rest}
        token = drawn if drawn in probs else UNLISTED
        order = {other: -1.0 if other == UNLISTED else p for other, p in probs.items()}
        below = math.fsum(p for other, p in probs.items() if order[other] < order[token])
        ties = math.fsum(p for other, p in probs.items() if order[other] == order[token])
        uniform = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        likeliest = max(law.logprobs, key=law.logprob)
        rare = [other for other, p in probs.items() if other == UNLISTED or p < RARE]
        return {
            "likelihood": (min(below + uniform * ties, 1.0), 0.5),
            "likeliest": (float(token == likeliest), min(probs[likeliest], 1.0)),
            "rare": (float(token in rare), min(math.fsum(probs[other] for other in rare), 1.0)),
            "repeated": prefixes.feature(prefix, token, lambda tokens: [probs[other] for other in tokens]),
        }

    def _control_work(self) -> Iterator[Piece]:
        for name, what in self.mistakes.items():
            key: Key = ("control", name)
            if key not in self.evidence.results:
                yield key, f"a mistake on purpose: {what}", partial(self.run_control, name)

    def run_control(self, name: str) -> dict[str, Any]:
        """Ask the candidate for something else until a check finds it."""
        if name not in TEMPERATURES:
            rows = next(self._blocks())
            texts = (self._texts(self.reference, rows, 1), self._texts(self.candidate, rows, 1, temperature=1.0))
            differing = sum(_content(a) != _content(b) for a, b in zip(*texts, strict=True))
            num_ids = sum(len(text.ids or []) for text in texts[1])
            if differing == 0:
                return {"found": None, "num_ids": num_ids, "evidence": NOT_SAMPLED}
            return {"found": True, "num_ids": num_ids, "evidence": f"{differing} of {len(rows)} texts differ"}
        log_wealth = torch.zeros(len(BETTORS), dtype=torch.float64)
        prefixes, num_ids, log_e = RepeatedPrefixes(), 0, 0.0
        for index in range(CONTROL_ROUNDS):
            result = self.sample(self.settings.load, index, prefixes, temperature=TEMPERATURES[name])
            num_ids += result["num_ids"]["all"]
            log_wealth += torch.tensor(result["log_wealth"], dtype=torch.float64)
            log_e = BETTORS.log_e_value(log_wealth)
            if log_e >= math.log(1 / self.settings.alpha):
                break
        is_found = log_e >= math.log(1 / self.settings.alpha)
        return {"found": is_found, "num_ids": num_ids, "evidence": f"e-value {e_value(log_e)}"}


def audit_server(
    reference: str,
    candidate: str,
    settings: ServerSettings,
    *,
    budget_s: float = 120.0,
    folder: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ServerCertificate:
    """Audit a server: does its speculation change its answers?

    Args:
        reference: The URL of a server without speculation.
        candidate: The URL of a server of the same model with it.
        settings: The prompts, and how much is asked.
        budget_s: Seconds of this run. Work ends earlier where nothing is left.
        folder: Where what is found is kept, so that the same call goes on from there; None: nowhere.
        on_progress: Called with what is done now, and the seconds that this run has taken.

    Returns:
        The certificate of all that was found, in this run and in earlier ones of the folder.

    Raises:
        ValueError: A server does not answer, or the folder holds another audit.
    """
    servers = {"reference": Server(reference, settings.model), "candidate": Server(candidate, settings.model)}
    header: dict[str, Any] = {name: server.url for name, server in servers.items()}
    header |= {
        "format": 1, "specdec": specdec.__version__, "model": servers["reference"].model,
        "prompts": zlib.crc32(repr(list(settings.prompts)).encode()), "max_new_tokens": settings.max_new_tokens,
        "load": settings.load, "num_logprobs": settings.num_logprobs, "alpha": settings.alpha, "seed": settings.seed,
    }  # fmt: skip
    evidence = Evidence(header, folder)
    audit = ServerAudit(servers["reference"], servers["candidate"], settings, evidence)
    audit.run(budget_s, on_progress)
    origin: dict[str, Any] = {"model": servers["reference"].model}
    for name, server in servers.items():
        origin[name] = server.url + (f" ({server.version})" if server.version else "")
    return certify_server(audit, origin | provenance("cpu"))


def certify_server(audit: ServerAudit, origin: dict[str, Any]) -> ServerCertificate:
    """The certificate of what has been found so far."""
    settings, evidence = audit.settings, audit.evidence
    variation, margin = audit.rounding
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    divergences = []
    for result in evidence.of("greedy").values():
        for count in result["counts"]:
            counts[count["server"], count["load"]][0] += count["texts"]
            counts[count["server"], count["load"]][1] += count["identical"]
        for found in result["divergences"]:
            size = 1 if found["load"] == 1 else settings.load
            first = found["prompt"] - (found["prompt"] - settings.first_prompt) % size
            command = settings.command and f"{settings.command} --first-prompt {first} --max-prompts {size}"
            is_rounding = None
            if found["margin"] is not None:
                is_rounding = abs(found["margin"]) <= MARGINS * max(found["spread"], margin)
            divergences.append(found | {"is_rounding": is_rounding, "command": command})
    certificate = ServerCertificate(
        greedy=[
            ServerRow(server, load, texts, identical, clopper_pearson(identical, texts))
            for (server, load), (texts, identical) in counts.items()
        ],
        variation=variation,
        limits=LIMITS if audit.shows_ids else [NO_IDS, *LIMITS],
        divergences=divergences,
        sampled=sum_up(
            evidence,
            BETTORS,
            GROUPS,
            {1: "one request at a time", settings.load: f"{settings.load} requests at a time"},
            call_of=lambda key: key[1],
            alpha=settings.alpha,
            tolerance=variation,
            shift="towards the most likely id (total variation, at later ids)",
            shifted_group="later",
        ),
        controls=control_rows(evidence, MISTAKES),
        seconds=sum(evidence.seconds.values()),
        provenance=origin,
    )
    faults = []
    if num_faults := sum(found["is_rounding"] is False for found in divergences):
        faults.append(
            f"{num_faults} of {certificate.num_texts} greedy texts differ from the reference's, not by rounding"
        )
    if certificate.sampled.is_rejected:
        faults.append("sampled ids are not drawn from the law of the reference")
    gaps = certificate.gaps(len(audit.mistakes))
    gaps += [row.evidence for row in certificate.controls if row.found is None]
    if not audit.shows_ids:
        gaps.append(NO_IDS)
    if num_open := sum(found["is_rounding"] is None for found in divergences):
        gaps.append(f"{num_open} of {certificate.num_texts} greedy texts differ, and the API does not show why")
    certificate.conclude(faults, gaps)
    return certificate


def total_variation(a: Law, b: Law) -> float:
    """Between two laws, as far as both list ids; all others count as one."""
    listed = a.logprobs.keys() & b.logprobs.keys()
    shares = [[math.exp(law.logprobs[token]) for token in listed] for law in (a, b)]
    rests = [max(0.0, 1 - math.fsum(share)) for share in shares]
    return (math.fsum(abs(x - y) for x, y in zip(*shares, strict=True)) + abs(rests[0] - rests[1])) / 2


def _margin(law: Law, first: int, second: int) -> float:
    return law.logprob(first) - law.logprob(second)


def _content(text: Completion) -> list[Any]:
    """What is compared: ids where the server shows them, else characters."""
    return list(text.text) if text.ids is None else list(text.ids)

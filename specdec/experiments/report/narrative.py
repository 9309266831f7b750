"""What figures mean, in sentences: for someone who has never seen the project, and with what must be minded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from specdec.drafters.resolve import AUTO
from specdec.experiments.records import PLAIN, SPECULATIVE, Record, Run
from specdec.experiments.report.figures import WhatIf, compare
from specdec.experiments.report.labels import (
    Reported,
    called,
    changes_from_first,
    choice_of,
    identical,
    is_interrupted,
    is_of_older_format,
    is_sampled,
    k_of,
)
from specdec.experiments.report.plots import interval, number, with_interval

SLOW = 3  # times what is usual


def sentence(one: Reported) -> str:
    """What was measured and what came of it, for someone who has never seen the project."""
    metrics = one.figures.metrics
    records = one.run.of(SPECULATIVE)
    texts = f"{count(len(records or one.run.of(PLAIN)), 'text')} of up to {one.sampling.get('max_new_tokens')} tokens"
    if not records:
        rate = with_interval(metrics["plain_tokens_per_s"])
        return f"The target model alone wrote {texts} at {rate} tokens a second; nothing was drafted, so nothing was accepted."
    speed = metrics["speedup"]
    between = f"95 % interval {interval(speed)}" if speed.low is not None else "one prompt gives no interval"
    if speed.value is None:
        rate = with_interval(metrics["tokens_per_s"])
        came = f"at {rate} tokens a second; plain decoding was not run beside it, so a speedup is not known"
    elif speed.low is not None and speed.high is not None and speed.low <= 1 <= speed.high:
        came = f"neither clearly faster nor slower than on its own: {speed.value:.2f} times as fast ({between})"
    else:
        came = (
            f"{speed.value:.2f} times as fast as on its own{', which is slower' if speed.value < 1 else ''} ({between})"
        )
    same, paired = identical(one.run)
    if paired:
        agreed = "every text is" if same == paired > 1 else "the text is" if same == paired else ""
        verdict = (
            f", and {agreed} the same, token for token" if agreed else f", but {paired - same} of {paired} texts differ"
        )
    else:
        verdict = "; texts are sampled, so they are not compared one by one" if is_sampled(one) else ""
    kept, tokens = metrics["draft_acceptance_rate"].value, metrics["tokens_per_step"].value
    outcome = (
        f" {number(kept, '%')} of the guesses were kept, so a step of the target gave {number(tokens)} tokens"
        " where it gives 1 on its own."
        if kept is not None
        else " It never had a guess to offer."
    )
    ahead = len(one.figures.histogram) - 1
    guessing = f" guessing up to {count(ahead, 'token')} ahead" if ahead else ""
    return f"With {drafts_with(one)}{guessing}, the target model wrote {texts} {came}{verdict}.{outcome}"


def terms(one: Reported) -> list[tuple[str, str]]:
    k = k_of(one.run)
    is_model = drafts_with(one) == "a draft model"
    return [
        ("Draft model", "a small, fast model that guesses the next tokens; the target checks all of them in one pass.")
        if is_model
        else (
            "Drafter",
            f"what guesses the next tokens, here {drafts_with(one)}; the target checks all of them in one pass.",
        ),
        ("K", f"how many tokens are guessed a step, here {'chosen step by step' if k == AUTO else k}."),
        (
            "Acceptance",
            "how many guesses the target keeps. A wrong one costs time, it never changes what the target says.",
        ),
    ]


def about(one: Reported) -> list[str]:
    """The run in a few words: models, K, sampling, prompts, machine."""
    parts = [f"target {called(one.config['target'])}"]
    if one.run.of(SPECULATIVE):
        parts.append(f"drafter {called(one.config['drafter'])}")
    parts += [plan(one), count(one.figures.prompts, "prompt"), count(len(one.figures.tasks), "task")]
    parts.append(f"batch {one.config.get('batch_size', 1)}")
    return parts + [
        str(one.run.header.provenance[name]) for name in ("device", "date") if name in one.run.header.provenance
    ]


def plan(one: Reported) -> str:
    temperature = one.sampling.get("temperature", 0)
    return f"K={k_of(one.run)}, {f'sampled at temperature {temperature:g}' if temperature else 'greedy'}"


def caveats(one: Reported) -> list[str]:
    """What a reader must know before trusting the figures."""
    run, caveats = one.run, []
    if is_interrupted(run):
        expected = one.config["workload"].get("limit") if isinstance(one.config["workload"], dict) else None
        of = f" of at most {expected}" if isinstance(expected, int) else ""
        caveats.append(
            f"This run was interrupted: {count(one.figures.prompts, 'prompt')}{of} and {count(len(run.records), 'record')} are"
            " here. Go on with resume=true and the same folder."
        )
    if is_of_older_format(run):
        caveats.append(
            f"This run was recorded in format {run.header.version}, whose counts include steps without a draft and whose mean"
            " acceptance length was 1 + accepted / steps. All figures here are made of its steps, by today's definitions; reports"
            " made by an earlier specdec show other values."
        )
    if one.figures.prompts == 1:
        caveats.append("One prompt gives no interval: nothing here says how another prompt would fare.")
    if run.header.provenance.get("dirty"):
        caveats.append(
            "The working tree had changes that its commit does not hold, so the commit alone does not repeat this run."
        )
    processes = run.header.provenance.get("processes", 1)
    if processes > 1:
        caveats.append(
            f"{processes} processes ran at once: where they shared a machine, each slowed the others' times."
        )
    if slow := _slow_calls(run.of(SPECULATIVE)) + _slow_calls(run.of(PLAIN)):
        caveats.append(
            f"{count(slow, 'call')} took more than {SLOW} times what calls of that length take here: the machine was busy with"
            " something else, so do not lean on the times."
        )
    if run.failures:
        caveats.append(f"{count(len(run.failures), 'call')} failed, in no figure here; the reasons stand below.")
    return caveats


def _slow_calls(records: Sequence[Record]) -> int:
    """Calls that took far longer than the medians of the run make of their prompt's and their text's length."""
    calls = {(record.turn, record.repetition, record.call): record for record in records if record.ids}.values()
    if not calls:
        return 0
    parts = [
        (r.num_prompt_tokens, r.seconds.prefill_s, len(r.steps), r.seconds.total_s - r.seconds.prefill_s) for r in calls
    ]
    prompt_s = median_low(seconds / length for length, seconds, _, _ in parts)
    step_s = median_low(seconds / steps for _, _, steps, seconds in parts)
    return sum(before + behind > SLOW * (length * prompt_s + steps * step_s) for length, before, steps, behind in parts)


def best_of(guesses: Sequence[WhatIf]) -> WhatIf | None:
    return max(
        (guess for guess in guesses if guess.speedup.value), key=lambda guess: guess.speedup.value or 0, default=None
    )


def suggestion(one: Reported) -> str:
    """Which K the figures suggest, and whether that is within noise."""
    guesses, own = one.figures.what_if, k_of(one.run)
    best = best_of(guesses)
    if best is None:
        return "Step times were not measured, so a speedup cannot be predicted."
    k, speed = best.num_draft_tokens, with_interval(best.speedup, "×")
    if (best.speedup.value or 0) <= 1:
        return f"No K pays here: the best, K={k}, is predicted to reach {speed} of plain decoding's speed."
    measured = one.figures.metrics["speedup"].value
    predicted = next((guess.speedup.value for guess in guesses if guess.num_draft_tokens == own), None)
    off = abs(predicted / measured - 1) if measured and predicted else 0.0
    if k == own and measured:
        said = [
            f"K={k}, which this run used, is predicted to be fastest: {speed}. Measured was {number(measured, '×')}."
        ]
    else:
        said = [f"K={k} is predicted to be fastest: {speed}."]
        if measured and predicted:
            told = f"For this run's own K={own} it is {number(predicted, '×')}, where {number(measured, '×')} was measured."
            said.append(told)
    rest = [guess for guess in guesses if guess is not best and guess.to_best.high is not None]
    near = [f"K={guess.num_draft_tokens}" for guess in rest if guess.to_best.high >= 1 - off]  # type: ignore[operator]
    if near:
        said.append(f"Within that error and the intervals, {listed(near)} may do as well.")
    elif rest:
        said.append("It is ahead of every other K by more than that error and the intervals.")
    elif best.speedup.low is None:
        said.append("One prompt cannot tell how sure that is.")
    fastest = max(one.measured, key=lambda run: run.speedup.value or 0, default=None)
    if fastest and len(one.measured) > 1 and fastest.speedup.value:
        runs = "runs here" if own != AUTO else "runs here with one K"
        told = f"Of the {runs}, K={fastest.num_draft_tokens} was fastest: {with_interval(fastest.speedup, '×')}."
        said.append(told)
    if k == guesses[-1].num_draft_tokens:
        said.append(f"K={k} is the largest that this run drafted: a larger one may be better still.")
    return " ".join(said)


def chosen(one: Reported) -> str:
    """How K chose itself, "" where it did not."""
    choice = choice_of(one.run)
    return f"K chose itself: {choice}, both against plain steps." if choice else ""


def compared(reported: Sequence[Reported]) -> list[tuple[str, str]]:
    """What the comparison comes to, and what to mind: each with the weight that it has on the page."""
    if len(reported) == 1:
        return []
    said = []
    fastest = max(reported, key=lambda one: one.figures.metrics["speedup"].value or 0)
    if speed := fastest.figures.metrics["speedup"].value:
        rivals = [
            one.label
            for one in reported
            if one is not fastest and not compare(fastest.run, one.run)["speedup"].is_clear
        ]
        tie = f", not clearly ahead of {listed(rivals)}" if rivals else ", clearly ahead of the others"
        said.append(("lead", f"Fastest over plain decoding is {fastest.label}, {number(speed, '×')}{tie}."))
    told = f"Differences are to {reported[0].label}, on the same prompts, with 95 % intervals; a mark stands where one leaves 0 out."
    said.append(("about", told))
    if any(is_of_older_format(one.run) for one in reported):
        older = "Runs of an older record format are compared by today's definitions: the figures of all are made of their steps."
        said.append(("about", older))
    if any(changes["plain_tokens_per_s"].is_clear for _, changes in changes_from_first(reported)):
        told = "Plain decoding ran at other speeds in some of these runs, so the machine did too: compare speedups, not times."
        said.append(("caveat", told))
    return said


def left_out(run: Run) -> list[str]:
    """Skipped prompts and failed calls, by reason."""
    skipped = Counter(line.reason for line in run.skipped)
    failed = Counter((line.engine, line.error) for line in run.failures)
    return [
        *(f"{count(times, 'prompt')} skipped: “{reason}”" for reason, times in skipped.most_common()),
        *(f"{count(times, 'call')} failed, {engine}: “{error}”" for (engine, error), times in failed.most_common()),
    ]


def drafts_with(one: Reported) -> str:
    drafter = one.config["drafter"]
    if isinstance(drafter, dict) and "path" in drafter:
        return "a draft model"
    return called(drafter)


def count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]

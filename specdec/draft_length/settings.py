"""The constants of AdaptiveK and of the profile that it starts from.

Measurements are those of benchmarks/LOG.md, "what auto K costs"; a number such as 0.99 is a speed relative to plain
decoding. Modules read `settings.ADAPTIVE_K` where they use a constant, so a test that replaces it changes all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DRAFT_TOKENS = 8  # the largest K that AdaptiveK uses: a longer draft gains little where acceptance is not near 1


@dataclass(frozen=True, slots=True)
class AdaptiveKSettings:
    """Weights are numbers of draft ids. A decay is the factor on what was counted before."""

    prior_acceptance: float = 0.7  # sum(min(p, q)) at a draft id of a drafter that has not been observed
    prior_weight: float = 4.0
    # Weight of the estimate of all rows in the estimate of one row. By replay of recorded texts, 4 gives 0.92 and 0.96
    # of the best constant K at batch 1 and 0.91 at batch 8; 12 gives 0.98, 0.97 and 0.96.
    shared_weight: float = 12.0
    # The first draft ids of each row, which count for all rows. If all ids counted, texts that accept little would
    # count less than others, since drafting ends early there: the mean was 0.93 where calls began at 0.85.
    shared_ids_per_row: int = 64
    row_decay: float = 0.97  # of a row's own acceptance, per draft id
    probe_decay: float = (
        0.7  # of a row's own acceptance, per probe: the text may have changed in the plain steps before it
    )
    shared_decay: float = 0.99  # of the acceptance of all rows, per step
    # Weight of the ratio of realized to expected acceptance with which a pair starts at each position of a draft.
    realized_weight: float = 16.0
    text_decay: float = 0.98  # of the lengths of texts, per text

    # The first step of a run that is measured; the ones before it find other data in the caches. After steps that
    # draft, plain steps take 1.07, 0.89, 0.82, 0.78 ms and reach 0.69 ms with the seventh; steps that draft are 10 %
    # slower at first.
    plain_run_steps: int = 8
    draft_run_steps: int = 4
    max_step_deviation: float = 0.25  # a step deviates from its estimate by at most this fraction of it
    slowdown_rate: float = 0.3  # fraction of a step's deviation by which the times of all K change
    step_rate: float = 0.3  # fraction of a deviation by which drafting changes relative to plain steps that it follows
    # Fraction of a deviation by which steps with so many draft ids change relative to others. As a comparison of each
    # step with the one before, short drafts would seem slow and long ones fast, since what follows a long one is slow.
    draft_rate: float = 0.05
    other_k_share: float = 0.75  # fraction of that change for a K of as many draft ids, in proportion for others
    catch_up_weight: float = 128.0  # of the profile's catch-up time, in ids that the drafter has not read
    catch_up_decay: float = 0.9  # of catch-up times, per step that measures one
    max_unread_tokens: int = 2  # a step whose drafter has more to read measures the catch-up time, not the step time

    # Drafting starts where plain decoding is expected to take longer by this factor, catching up included. With a
    # margin over the steps alone, the target as its own draft came to 0.91 to 0.93 in calls of 96 tokens, with this one
    # to 0.99. With the margin to go on as well, 1.10 where K=5 gives 1.16; to start alone, 1.16 to 1.30 where K=5 gives
    # 1.21 to 1.30.
    start_margin: float = 1.04

    first_plain_interval: int = 16  # steps that draft before a run of plain steps; doubles up to the last interval
    last_plain_interval: int = 512
    first_probe_interval: int = 8  # plain steps before a probe; doubles up to the last interval
    last_probe_interval: int = 256
    probe_budget: float = 0.01  # fraction of the time of all steps that probes may lose

    profile_grid: tuple[int, ...] = (1, 2, 3, 5, 8)  # K that are timed, besides 0 and the largest K
    profile_columns: int = 128  # of the prompts, from the right
    profile_rounds: int = 3
    profile_s: float = 1.5  # approximate seconds of a profile that compiles nothing


ADAPTIVE_K = AdaptiveKSettings()

"""The statistics of the certificate: intervals for shares, and anytime-valid tests of a sampling law by betting.

An e-process E_t is nonnegative with an expectation of at most 1 whenever the hypothesis holds, so the probability that
it ever reaches 1/alpha is at most alpha (Ville, 1939): it may be read after every draw, and a run may be stopped,
resumed and extended at will. Here E_t is the mean wealth of bettors against the hypothesis "each id is drawn from p":
Shafer, Testing by Betting (2021); Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by Betting
(2024). A bettor multiplies its wealth by 1 + stake * (z - E_p[z]) for a feature z in [0, 1] of the id. Wealth is kept
as logarithms, in float64.

Where no law is known, draws of two loops are compared: a permutation test of whether both have one law.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STAKES = tuple(sign * 0.99 / 2**power for power in range(8) for sign in (1, -1))  # 0.99 … 0.0077, both directions
EVENTS = ("rare", "impossible")  # features that bettors stake on in one direction, with large stakes
EVENT_STAKES = (0.5, 0.05, 0.005)  # shares of the largest stake that a rare event allows
Kind = tuple[str, str]  # a group of ids, and a feature of them
Bet = tuple[float, float, float]  # z, its mean under p, and the tolerance of that


def clopper_pearson(successes: int, trials: int, error: float = 0.05) -> tuple[float, float]:
    """The exact interval of a binomial share, at a two-sided error rate (Clopper and Pearson, 1934); (0, 1) of none."""

    def solve(is_too_small: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if is_too_small(middle) else (low, middle)
        return (low + high) / 2

    lower, upper = 0.0, 1.0
    if successes > 0:
        lower = solve(lambda p: 1 - binomial_cdf(successes - 1, trials, p) < error / 2)
    if successes < trials:
        upper = solve(lambda p: binomial_cdf(successes, trials, p) > error / 2)
    return lower, upper


def binomial_cdf(successes: int, trials: int, p: float) -> float:
    """P(at most `successes` of `trials`), each with probability p in (0, 1)."""
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(p) + (trials - k) * math.log1p(-p)
        for k in range(successes + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def bets_on_feature(z: Tensor, mean: Tensor, tolerance: Tensor) -> Tensor:
    """Log wealth factors of the bettors of STAKES on a feature: z, mean [N] in [0, 1] -> [S, N] float64.

    tolerance: [N], how far the expectation of z may lie from `mean` under the hypothesis, where p itself is known only
    up to rounding: the total variation between two computations of it.
    """
    stakes = torch.tensor(STAKES, dtype=torch.float64)[:, None] / (1 + tolerance)
    return torch.log1p(stakes * (z - mean) - stakes.abs() * tolerance)


class Bettors:
    """Bettors on features of ids in groups, which share one stake of wealth 1 in equal parts.

    features: by group. kinds: of each bettor.
    """

    def __init__(self, features: Mapping[str, Iterable[str]]) -> None:
        self.kinds: list[Kind] = [
            (group, feature)
            for group, names in features.items()
            for feature in names
            for _ in (EVENT_STAKES if feature in EVENTS else STAKES)
        ]

    def __len__(self) -> int:
        return len(self.kinds)

    def wager(self, bets: Mapping[Kind, Sequence[Bet]]) -> list[float]:
        """Log of the factor by which each bettor's wealth changes by these bets."""
        factors: dict[Kind, list[float]] = {}
        for kind, placed in bets.items():
            z, mean, tolerance = torch.tensor(placed, dtype=torch.float64).T
            if kind[1] in EVENTS:
                stakes = torch.tensor(EVENT_STAKES, dtype=torch.float64)[:, None] / (mean + tolerance + 1e-12)
                log_factors = torch.log1p(stakes * (z - mean - tolerance))
            else:
                log_factors = bets_on_feature(z, mean, tolerance)
            factors[kind] = log_factors.sum(1).tolist()
        changes: list[float] = []
        for kind, count in Counter(self.kinds).items():
            changes += factors.get(kind, [0.0] * count)
        return changes

    def log_e_value(self, log_wealth: Tensor, group: str | None = None) -> float:
        """Log of the e-value of all bettors, whose log wealth is [len(self)], or of a group's."""
        if group is not None:
            log_wealth = log_wealth[[index for index, kind in enumerate(self.kinds) if kind[0] == group]]
        return float(mean_log_wealth(log_wealth))


class RepeatedPrefixes:
    """Counts of the ids that were drawn after each prefix, over all calls of a kind."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def feature(
        self, prefix: tuple[int, ...], drawn: int, probs_of: Callable[[list[int]], list[float]]
    ) -> tuple[float, float]:
        """-> whether `drawn` is among the ids seen more often than probs_of says, and the probability of those."""
        seen = self.counts[prefix]
        tokens, total = list(seen), seen.total()
        expected = dict(zip(tokens, probs_of(tokens), strict=True))
        often = {token: p for token, p in expected.items() if seen[token] > total * p}
        seen[drawn] += 1
        return float(drawn in often), min(sum(often.values()), 1.0)


def mean_log_wealth(log_wealth: Tensor) -> Tensor:
    """Log of the mean wealth over bettors: [S, ...] -> [...]."""
    return torch.logsumexp(log_wealth, dim=0) - math.log(len(log_wealth))


def power(
    histogram: Sequence[int],
    shift: float,
    alpha: float,
    num_bettors: int,
    tolerance: float = 0.0,
    seed: int = 0,
    num_runs: int = 400,
) -> float:
    """The share of simulated runs that are rejected, where an indicator's probability is `shift` above its mean.

    histogram: how many draws had a mean in each of equal bins of [0, 1]; a run draws them in random order and reads the
    e-process 50 times. num_bettors: of the whole e-process; those on this indicator, STAKES, are some of them.
    tolerance: as in bets_on_feature, of all draws.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(histogram, dtype=torch.float64)
    means = (torch.arange(len(counts), dtype=torch.float64) + 0.5) / len(counts)
    steps = torch.linspace(0, 1, 51, dtype=torch.float64)[:, None]
    counts = (counts * steps).round().diff(dim=0).expand(num_runs, -1, -1)  # [R, 50, bins]
    ones = torch.binomial(counts, (means + shift).clamp(max=1).expand_as(counts).contiguous(), generator=generator)
    tolerances = torch.full_like(means, tolerance)
    gain, loss = (bets_on_feature(torch.full_like(means, z), means, tolerances) for z in (1.0, 0.0))  # [S, bins]
    log_wealth = (ones @ gain.T + (counts - ones) @ loss.T).cumsum(1)  # [R, 50, S]
    is_found = torch.logsumexp(log_wealth, dim=-1) >= math.log(num_bettors / alpha)
    return float(is_found.any(1).double().mean())


def smallest_shift(
    histogram: Sequence[int], alpha: float, num_bettors: int, tolerance: float = 0.0, wanted: float = 0.95
) -> float:
    """The smallest shift of an indicator's probability that such a run finds with probability `wanted`; 1 if none."""
    low, high = 1e-5, 1.0
    if power(histogram, high, alpha, num_bettors, tolerance) < wanted:
        return 1.0
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        is_found = power(histogram, middle, alpha, num_bettors, tolerance) >= wanted
        low, high = (low, middle) if is_found else (middle, high)
    return high


@dataclass(frozen=True)
class TwoSamples:
    """Are the draws of two loops from the same laws? A permutation test over several contexts.

    first, second: for each context the outcomes that each loop drew, equally many. The statistic is the sum, over
    contexts and outcomes, of the squared difference of the two counts, less its mean over permutations. Under the
    hypothesis, which of the pooled draws are the first loop's is random, so the p-value is exact whatever the law.
    """

    first: Sequence[Sequence[Hashable]]
    second: Sequence[Sequence[Hashable]]
    num_permutations: int = 4999
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [[len(draws) for draws in sample] for sample in (self.first, self.second)]
        if sizes[0] != sizes[1] or not all(sizes[0]) or not sizes[0]:
            raise ValueError(f"two samples hold equally many draws for each context, not {sizes[0]} and {sizes[1]}")

    @cached_property
    def _pooled(self) -> list[Tensor]:
        """[2N] int64 of each context: outcomes by number, the first loop's draws first."""
        return [_numbered([*a, *b]) for a, b in zip(self.first, self.second, strict=True)]

    @cached_property
    def statistic(self) -> float:
        return sum(
            float(
                squared_differences(_counts(pooled[None, : len(pooled) // 2], int(pooled.max()) + 1), pooled.bincount())
            )
            for pooled in self._pooled
        )

    @cached_property
    def _permuted(self) -> Tensor:
        """The statistic under random assignments of the pooled draws: [num_permutations] float64."""
        generator = torch.Generator().manual_seed(self.seed)
        statistics = torch.zeros(self.num_permutations, dtype=torch.float64)
        for pooled in self._pooled:
            order = torch.rand(self.num_permutations, len(pooled), generator=generator).argsort(1)
            totals = pooled.bincount()
            statistics += squared_differences(_counts(pooled[order[:, : len(pooled) // 2]], len(totals)), totals)
        return statistics

    @property
    def p_value(self) -> float:
        as_large = int((self._permuted >= self.statistic - 1e-9).sum())
        return (1 + as_large) / (1 + self.num_permutations)

    def smallest_shift(self, alpha: float, wanted: float = 0.95, num_runs: int = 400) -> float:
        """The smallest shift that as many draws would show with probability `wanted`; 1 if none.

        As the mean total variation over contexts, of a shift towards the most likely outcome of each: a share of the
        draws is replaced by it. By simulation, with the pooled draws as the law.
        """
        critical = float(torch.quantile(self._permuted, 1 - alpha))
        laws = [pooled.bincount().double() / len(pooled) for pooled in self._pooled]
        variation = math.fsum(1 - float(law.max()) for law in laws) / len(laws)  # where the share is 1

        def power(share: float) -> float:
            generator = torch.Generator().manual_seed(self.seed)
            statistics = torch.zeros(num_runs, dtype=torch.float64)
            for law, draws in zip(laws, self.first, strict=True):
                shifted = (1 - share) * law
                shifted[law.argmax()] += share
                first, second = (
                    _counts(torch.multinomial(p.expand(num_runs, -1), len(draws), True, generator=generator), len(p))
                    for p in (law, shifted)
                )
                statistics += squared_differences(first, first + second)
            return float((statistics > critical).double().mean())

        low, high = 1e-3, 1.0
        if power(high) < wanted:
            return 1.0
        while high / low > 1.03:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if power(middle) >= wanted else (middle, high)
        return high * variation


def squared_differences(counts: Tensor, totals: Tensor) -> Tensor:
    """Sum of squared differences of two samples' counts, less its mean over permutations: [..., M] -> [...].

    counts: of each outcome in the first sample; totals: in both, which are equally large.
    """
    totals = totals.double()
    size = totals.sum(-1, keepdim=True)
    return ((2 * counts - totals) ** 2 - totals * (size - totals) / (size - 1)).sum(-1)


def repetition_p_value(samples: Sequence[Sequence[Hashable]], num_permutations: int = 4999, seed: int = 0) -> float:
    """Is each draw independent of the one before it? A permutation test of how many equal it, over all contexts."""
    generator = torch.Generator().manual_seed(seed)
    repeated, permuted = 0, torch.zeros(num_permutations, dtype=torch.int64)
    for draws in samples:
        numbers = _numbered(draws)
        repeated += int((numbers[1:] == numbers[:-1]).sum())
        shuffled = numbers[torch.rand(num_permutations, len(numbers), generator=generator).argsort(1)]
        permuted += (shuffled[:, 1:] == shuffled[:, :-1]).sum(1)
    return (1 + int((permuted >= repeated).sum())) / (1 + num_permutations)


def _numbered(outcomes: Sequence[Hashable]) -> Tensor:
    """[N] int64: equal outcomes have equal numbers, from 0."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(draw, len(numbers)) for draw in outcomes])


def _counts(numbers: Tensor, num_outcomes: int) -> Tensor:
    """How often each number is in each row: [R, N] -> [R, num_outcomes] float64."""
    counts = torch.zeros(len(numbers), num_outcomes, dtype=torch.float64)
    return counts.scatter_add_(1, numbers, torch.ones((), dtype=torch.float64).expand_as(numbers))

"""Values and intervals as the report writes them."""

from __future__ import annotations

from specdec.experiments.report.estimates import Estimate

MAX_DIGITS = 4


def number(value: float | None, unit: str = "", change_of: float | None = None) -> str:
    """A value with about three digits, rates in per cent, "–" for None. change_of: what the value is a change of."""
    if value is None:
        return "–"
    is_change = change_of is not None
    if unit == "%":
        return f"{_fixed(100 * value, 1, is_change)}\u00a0{'points' if is_change else '%'}"
    text = _fixed(value, _digits(value if change_of is None else change_of), is_change)
    return text + ("×" if unit == "×" else f"\u00a0{unit}" if unit else "")


def interval(estimate: Estimate, unit: str = "", change_of: float | None = None) -> str:
    """The 95 % interval with the digits of the value, or more where its ends would be equal; "" where there is none."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return ""
    scale, digits = (100, 1) if unit == "%" else (1, _digits(estimate.value if change_of is None else change_of))
    low, high = scale * estimate.low, scale * estimate.high
    while round(low, digits) == round(high, digits) and digits < MAX_DIGITS:
        digits += 1
    ends = " to ".join(_fixed(end, digits, change_of is not None) for end in (low, high))
    return ends + ("\u00a0%" if unit == "%" and change_of is None else "")


def with_interval(estimate: Estimate, unit: str = "") -> str:
    """The value, and its interval in parentheses where there is one."""
    bounds = interval(estimate, unit)
    return number(estimate.value, unit) + (f" ({bounds})" if bounds else "")


def plural(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _digits(value: float) -> int:
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def _fixed(value: float, digits: int, signed: bool) -> str:
    value = round(value, digits) + 0.0  # no -0
    return f"{value:{'+' if signed and value else ''},.{digits}f}".replace("-", "−")

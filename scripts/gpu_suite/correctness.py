"""The checks of all kernels, those of the timing sections."""

from __future__ import annotations

from gpu_suite import attention, rejection_sampling, w4a16, w8a16
from gpu_suite.suite import Row, Section, Suite, failed

KERNEL_SECTIONS = (w4a16.SECTION, w8a16.SECTION, attention.SECTION, rejection_sampling.SECTION)


def run(suite: Suite) -> Row:
    rows = [row for section in KERNEL_SECTIONS for row in suite.check(section)]
    wrong = [f"{row['op']} {row['case']}" for row in rows if not row["ok"]]
    return {"checks": rows} | (failed(f"wrong: {'; '.join(wrong)}") if wrong else {})


SECTION = Section("correctness", run)

"""The certificate as one HTML page that needs no other file and no network: verdict first, then evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.audit.certificate import Certificate
from specdec.audit.findings import FAULTY, INCONCLUSIVE, LOSSLESS, ROUNDING, e_value
from specdec.audit.server import ServerCertificate
from specdec.audit.widths import Widths
from specdec.pages import environment

CELL = 18  # CSS pixels of a cell of the matrix
LEADS = {
    LOSSLESS: "As far as this run can tell, greedy texts are plain decoding's, and sampled ids have its distribution.",
    ROUNDING: "As far as this run can tell, texts differ by rounding alone, which changes plain decoding's as well.",
    FAULTY: "Speculation changes the answers of this model.",
    INCONCLUSIVE: "This run does not tell whether speculation changes the answers.",
}


def render_page(certificate: Certificate | ServerCertificate) -> str:
    """The page. Raises ValueError where jinja2 is missing."""
    values: dict[str, Any] = {"certificate": certificate, "lead": LEADS[certificate.verdict], "e_value": e_value}
    template = "server.html.jinja"
    if isinstance(certificate, Certificate):
        template = "certificate.html.jinja"
        values["matrix"] = None if certificate.widths is None else _matrix(certificate.widths)
    rendered = environment(Path(__file__).parent).get_template(template).render(values)
    return rendered.strip() + "\n"


def _matrix(widths: Widths) -> dict[str, Any]:
    """Cells of the picture: position, shade 0 … 1, text."""
    largest = max(widths.largest, 1e-30)
    cells = [
        {
            "x": 40 + CELL * column,
            "y": 8 + CELL * row,
            "shade": round(0.15 + 0.85 * value / largest, 3) if value else 0,
            "title": f"width {widths.widths[column]}, batch {widths.batches[row]}: "
            + ("equal" if value == 0 else f"{value:.3g} units"),
        }
        for row, values in enumerate(widths.differences)
        for column, value in enumerate(values)
    ]
    return {
        "cells": cells,
        "cell": CELL - 2,
        "columns": [(40 + CELL * i + CELL / 2 - 1, w) for i, w in enumerate(widths.widths)],
        "rows": [(8 + CELL * i + CELL / 2 + 3, b) for i, b in enumerate(widths.batches)],
        "width": 48 + CELL * len(widths.widths),
        "height": 48 + CELL * len(widths.batches),
    }

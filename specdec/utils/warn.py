"""Warnings that name the user's line, and notes that are none."""

from __future__ import annotations

import sys
import warnings

_OWN_PACKAGES = {"specdec", "specdec_kernels", "transformers", "torch", "accelerate", "contextlib"}


def warn(message: str) -> None:
    """Warn with the file and line of the nearest caller outside specdec and the libraries that call it.

    warnings.warn's `skip_file_prefixes` does this from Python 3.12 on.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in _OWN_PACKAGES and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def note(message: str) -> None:
    """Print a line to stderr, of what specdec found out and a person may want to check."""
    print(f"specdec: {message}", file=sys.stderr)

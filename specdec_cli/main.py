"""The command line: `specdec demo | generate | quantize | audit | experiment | train-drafter | report | plan`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from specdec_cli.arguments import parse

HYDRA_CONFIGS = {"experiment": "config", "train-drafter": "train"}
EXPERIMENT_MODULES = {"accelerate", "datasets", "hydra", "jinja2", "matplotlib", "omegaconf"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 where a check failed, 2 where the input cannot be used.

    A command's code is imported when it runs.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] in (["experiment"], ["train-drafter"]):  # hydra parses the rest
            code: int = _command("experiment").main(arguments[1:], HYDRA_CONFIGS[arguments[0]])
        else:
            options = parse(arguments)
            code = _command(options.module).run(options)
        return code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXPERIMENT_MODULES:
            raise
        print(f'specdec: {error.name} is not installed; pip install "specdec-lossless[experiments]"', file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"specdec: {error}", file=sys.stderr)
        return 2


def _command(module: str) -> Any:
    """A module of specdec_cli, with transformers' own progress bars and warnings off."""
    logging: Any = import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return import_module(f"specdec_cli.{module}")


if __name__ == "__main__":
    sys.exit(main())

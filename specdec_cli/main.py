"""The entry point of the command line: runs app.py, and says in one line what went wrong."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from specdec_cli.app import app

DEBUG = "--debug"
BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 70, 130  # exit codes
UsageError: type[Any] = typer.BadParameter.__mro__[1]  # typer's, in older versions click's
EXPERIMENT_MODULES = {"accelerate", "datasets", "hydra", "jinja2", "matplotlib", "numpy", "omegaconf", "scipy"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 where a check failed, 2 where the input cannot be used, 70 for a bug.

    A command's code is imported when it runs.
    """
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [argument for argument in given if argument != DEBUG]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return app(arguments, prog_name="specdec", standalone_mode=False) or 0
    except BrokenPipeError:  # the reader of the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing at exit fails again
        return 0
    except SystemExit as error:  # of hydra, which prints help of its own
        return int(error.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except UsageError as error:
        return _refuse_usage(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXPERIMENT_MODULES:
            return _report_bug(error, arguments, DEBUG in given)
        return _refuse(f'{error.name} is not installed; pip install "specdec-lossless[experiments]"')
    except (ValueError, OSError) as error:
        if DEBUG in given:
            traceback.print_exc()
        return _refuse(str(error))
    except Exception as error:
        if _is_out_of_memory(error):
            return _refuse(f"{error}; a 4-bit target (--quantize int4) or fewer rows and tokens need less")
        return _report_bug(error, arguments, DEBUG in given)


def _show_warning(message: Warning | str, *where: Any) -> None:
    """A warning as a line for a person: the place in the command line's own code says nothing to one."""
    print(f"specdec: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _refuse(message: str) -> int:
    """Say in one line why a command did not run, and what to do."""
    print(f"specdec: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _refuse_usage(error: Any) -> int:
    """The same for arguments that typer refuses; where none were given, it has printed the help."""
    message = error.format_message().rstrip(".")
    if not message:
        return BAD_INPUT
    context = error.ctx or typer.Context(get_command(app), info_name="specdec")
    if hasattr(context.command, "list_commands"):
        message += f"; commands are {', '.join(context.command.list_commands(context))}"
    return _refuse(f"{message}; `{context.command_path} --help` shows what can be given")


def _report_bug(error: Exception, arguments: list[str], shows_traceback: bool) -> int:
    """Say that something unexpected happened, and what a report of it needs."""
    if shows_traceback:
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(str(error).split())
    print(
        f"specdec: unexpected {type(error).__name__}: {what} ({Path(last.filename).name}, line {last.lineno})\n"
        "This is a bug. Please report it with the command, the output of `specdec env`, and the traceback"
        + (" above." if shows_traceback else f", which {DEBUG} shows."),
        file=sys.stderr,
    )
    return UNEXPECTED


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


if __name__ == "__main__":
    sys.exit(main())

"""`specdec experiment` and `train-drafter`: hydra's part, without torch, so that its help is printed at once."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdec_cli.errors import NotShown, PromptsFailed

LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray"}


def conf_dir() -> Path:
    """The folder of the configs: inside the installed package, or next to it in a checkout."""
    package = Path(find_spec("specdec").submodule_search_locations[0])  # type: ignore[union-attr, index]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main(arguments: list[str], config_name: str = "config") -> int:
    """Run hydra on overrides and flags (`-m`, `--cfg job`, …): 0, 1 where prompts failed, 2 for bad input.

    With `--config-name audit` the exit code of `specdec audit lossless`.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are raised here, not printed with a trace
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(_task)()
    except KeyboardInterrupt:
        return 130
    except PromptsFailed as error:
        print(f"specdec: {error}", file=sys.stderr)
        return 1
    except NotShown as error:
        return error.exit_code
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        if (missing := _missing_module(error)) is not None:
            raise missing from error
        print(f"specdec: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def _task(config: DictConfig) -> None:
    """One run, as hydra or one of its launchers calls it."""
    from transformers.utils import logging

    from specdec_cli.experiment import run_task

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    run_task(config)


def _run_stamp() -> str:
    """The time at which the main process named the run's folder, broadcast to the others."""
    from accelerate.utils import broadcast_object_list

    from specdec.experiments.run import processes

    processes()
    stamp = [time.strftime("%Y-%m-%d_%H-%M-%S")]
    broadcast_object_list(stamp)
    return stamp[0]


def _embedded(name: str) -> str:
    """The folder of a part of the embedded pair: target, draft or eagle3."""
    from specdec.utils import embedded

    return str(getattr(embedded, name.upper()))


def _missing_module(error: BaseException | None) -> ModuleNotFoundError | None:
    """The module whose absence led to an error."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return error


def _message(error: Exception) -> str:
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        return str(error.__cause__)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is no override: {str(error).partition(chr(10))[0]}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give it one on the command line: {error.full_key}=…"
    for plugin, extra in LAUNCHER_EXTRAS.items():
        if f"hydra/launcher/{plugin}" in str(error):
            return f'hydra\'s {plugin} launcher is not installed; pip install "specdec-lossless[{extra}]"'
    return str(error)


OmegaConf.register_new_resolver("run_stamp", _run_stamp, use_cache=True, replace=True)
OmegaConf.register_new_resolver("embedded", _embedded, replace=True)

"""Runs the suite: `python scripts/gpu_suite`."""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # Python puts this folder there
if not Path(sys.argv[0]).suffix:
    sys.argv[0] = os.path.join(sys.argv[0], "__main__.py")  # the provenance names a command that runs
if torch.cuda.is_available() or "--dry" in sys.argv:  # triton reads it when it is imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from gpu_suite.main import main  # noqa: E402

sys.exit(main())

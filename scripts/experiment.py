"""Which draft, which K, which workload, how fast, why: run an experiment and read its report.

    python scripts/experiment.py experiment=demo
    python scripts/experiment.py -m experiment=demo num_draft_tokens=1,2,4,8 sampling.temperature=0,0.7,1
    accelerate launch --cpu --num_processes 2 scripts/experiment.py experiment=demo

The same as `specdec experiment …`; `--help` lists the groups of conf/ and the config.
"""

import sys

from specdec_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["experiment", *sys.argv[1:]]))

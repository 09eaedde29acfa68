"""Train a GAN:  python trainer/run.py [RECIPE] [options]

Without a recipe the default one for this hardware is trained; without --data, on drawn cats.

    python trainer/run.py --dry-run                          what would happen, touching nothing
    python trainer/run.py --workers 0                        in this process, one GPU or the CPU
    python trainer/run.py r3gan-64 --data shards/cats64      through Ray Train, a worker per GPU
    python trainer/run.py --name mine --kimg 500             run it again to continue
    ray job submit --working-dir . -- python trainer/run.py  on a cluster
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a script this folder is sys.path[0], where its module names could hide others'. The root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.command import run_command
from trainer.driver import main

if __name__ == "__main__":
    run_command("run.py", main)

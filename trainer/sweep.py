"""Train many configurations as Ray Tune trials: ``python trainer/sweep.py [RECIPE] --try FIELD=SPACE [options]``."""

if __name__ == "__main__":
    import sys
    from pathlib import Path
    from typing import Any

    # As in run.py: the root belongs into sys.path instead of this folder, and imports stay in here.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from catgan.command import run_command
    from catgan.machine import spin_less

    spin_less()

    def main(argv: list[str]) -> dict[str, Any]:
        from trainer.sweeps.driver import main  # takes seconds, in which Ctrl-C is handled too

        return main(argv)

    run_command("sweep.py", main)

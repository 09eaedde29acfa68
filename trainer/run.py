"""Train a GAN: ``python trainer/run.py [RECIPE] [options]``, see ``--help``."""

if __name__ == "__main__":
    import sys
    from pathlib import Path
    from typing import Any

    # As a script this folder is sys.path[0], where its module names could hide others'. The root belongs there.
    # Imports stay in here since processes spawned from this one import this file again.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from catgan.command import run_command
    from catgan.machine import spin_less

    spin_less()

    def main(argv: list[str]) -> dict[str, Any]:
        from trainer.launch.driver import main  # takes seconds, in which Ctrl-C is handled too

        return main(argv)

    run_command("run.py", main)

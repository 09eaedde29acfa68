"""``catfid``: measure how far apart two sets of images are."""

from __future__ import annotations

from typing import Any

from catgan.command import run_command


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catfid`` with these arguments. Returns the JSON object for stdout."""
    from trainer.metrics.catfid.command import run  # takes seconds, in which Ctrl-C is handled too

    return run(argv)


def entry() -> None:
    run_command("catfid", main)


if __name__ == "__main__":
    entry()

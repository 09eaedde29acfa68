"""Sweeps that are made without training."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoints.storage import Storage
from trainer.recipes import resolve
from trainer.sweeps.options import parse_sweep
from trainer.sweeps.plan import Plan, make_plan, settings
from trainer.sweeps.state import Ledger, Point, Status, Trial

WORDS = ("--kimg", "9", "--eval.extractor", "efflite0", "--track.offline")


def make(*words: str) -> Plan:
    return make_plan(parse_sweep(["dcgan-cpu-32", *WORDS, *words]), resolve("dcgan-cpu-32", None, gpu=False), None)


def open_ledger(folder: Path, plan: Plan) -> Ledger:
    """The ledger of a sweep in ``folder``, which is made."""
    storage = Storage(folder)
    storage.make()
    ledger = Ledger(storage, settings(plan))
    ledger.open("the-sweep")
    return ledger


def add(ledger: Ledger, name: str, values: dict[str, str], distances: dict[float, float], status: Status) -> Trial:
    """A trial with these distances by kimg, which ended so."""
    of = name.partition("-")[0] if "-" in name else None
    ledger.add(Trial(name, values, 0, of))
    for kimg, value in distances.items():
        ledger.measured(name, "fd2k_efflite0", Point(kimg, value, 1.5))
    if status in ("done", "stopped", "failed"):
        ledger.ended(name, status, "the disk is full" if status == "failed" else "")
    return ledger.trials[name]

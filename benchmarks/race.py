"""Recipes against each other at equal training time on one machine: how good are the pictures of each?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import count, device, machine, positive
from measure import table as print_table
from race_data import check_size, open_at, train_files
from race_foreign import Foreign, parse_foreign, run_foreign
from race_judge import MIN_NUM, Judge, choose_split
from race_report import CURVES, TABLE, check_matplotlib, draw_curves, write_results, write_table
from race_schedule import Entrant, Race
from race_training import PLAIN, PLAIN_BATCH, Contestant, plain_contestant, recipe_contestant, train

from catgan.command import Parser, UserError, run_command
from trainer.config import Config
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images
from trainer.features.extractors import CHOICES, choose_extractor
from trainer.launch.checks import problems
from trainer.metrics.evaluate import Evaluator
from trainer.recipes import resolve

NAME = "race.py"
PRINTED = ("recipe", "distance", "distance_std", "distance_live", "kid", "precision", "recall", "kimg")

_DESCRIPTION = f"""\
Trains each recipe on the same pictures for the same minutes, one after the other on this machine, and measures at
equal intervals how good the generated pictures are. The clock stands still during evaluations, and all pictures are
in memory, so neither judging nor loading has a part in the result. With several seeds the order turns round from seed
to seed: a machine that slows down favours none.

  distance       Fréchet distance of the averaged weights (EMA), which are what a training ships; lower is better
  distance_live  the same of the live weights with batch norm's running statistics
  kid            kernel distance of the averaged weights; lower is better
  precision      share of the generated pictures that look like real ones; higher is better
  recall         share of the real pictures that look like generated ones: variety; higher is better

Recipes are those of trainer/run.py, and "{PLAIN}": the DCGAN loop of plain_dcgan.py (batch {PLAIN_BATCH}), which is
given the recipe dcgan's average. Cut off? The same command continues after the last finished training.

A foreign training script joins with --foreign. Its command is split into words as a shell would, but no shell runs it.
In the words {{data}} stands for a folder of PNG training pictures, {{out}} for an empty folder for its results,
{{seconds}} for its training time, {{seed}}, {{size}} and {{num}} for these numbers. It must leave gen.onnx (latents "z"
in, "image" out, as catexport writes it) or at least {{num}} PNG pictures in {{out}}, and may leave progress.json
with {{"images": N}}, the images it trained on. It is ended when it takes 1.2 times its seconds and a minute.

OUT gets results.json, {TABLE}, {CURVES} and sample grids NAME-seedS-II.png.
"""

_EXAMPLES = """\
examples:
  python benchmarks/race.py                                   the default recipe and the plain loop on drawn cats
  python benchmarks/race.py --data shards/cats64 --size 32 --recipes dcgan-cpu,r3gan-cpu,plain --minutes 10
  python benchmarks/race.py --data shards/cats64 --recipes dcgan-cpu --seeds 1 --minutes 1    a first look
  python benchmarks/race.py --data shards/cats64 --recipes r3gan \\
      --foreign 'theirs=python theirs/train.py --images {data} --results {out} --stop-after {seconds} --seed {seed}'
"""


class Track:
    """What all trainings of a race share. The pictures are read when the first training needs them."""

    def __init__(self, a: argparse.Namespace, manifest: Manifest, judge: Judge, out: Path, place: torch.device) -> None:
        self.minutes, self.intervals, self.num = a.minutes, a.intervals, a.num
        self.manifest, self.judge, self.out = manifest, judge, out
        self.place = place
        self._pictures: torch.Tensor | None = None

    def pictures(self) -> torch.Tensor:
        """All train pictures where the training happens, uint8 ``[n, 3, size, size]``."""
        if self._pictures is None:
            self._pictures = torch.cat(list(eval_images(self.manifest, "train"))).to(self.place)
        return self._pictures

    def train(
        self, name: str, make: Callable[[torch.Tensor, torch.device], Contestant], seed: int, label: str
    ) -> dict[str, Any]:
        pictures = self.pictures()
        torch.manual_seed(seed)
        contestant = make(pictures, self.place)
        return train(contestant, label, self.minutes, self.intervals, self.judge, partial(self._sheet, name, seed))

    def run_foreign(self, foreign: Foreign, seed: int, label: str) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainings before left reserved is the script's to use
        seconds = round(self.minutes * 60, 3)
        values = {
            "data": train_files(self.manifest, self.out),
            "out": (self.out / f"{foreign.name}-seed{seed}").absolute(),
            "seconds": int(seconds) if seconds.is_integer() else seconds,
            "seed": seed,
            "size": self.manifest.size,
            "num": self.num,
        }
        return run_foreign(foreign, values, label, self.minutes, self.judge, self._sheet(foreign.name, seed, 1))

    def _sheet(self, name: str, seed: int, i: int) -> Path:
        return self.out / f"{name}-seed{seed}-{i:02d}.png"


def main(argv: list[str]) -> dict[str, Any]:
    a = _parse(argv)
    place = device()
    foreigns = [parse_foreign(text) for text in a.foreign]
    data = Manifest.load(a.data) if a.data else None
    names = [name.strip() for name in a.recipes.split(",")] if a.recipes is not None else [None, PLAIN]
    size = a.size or (data.size if data else _size(names))
    check_size(size, data)
    recipes = [_recipe(name, size) for name in names]
    _refuse_twins([*(c.recipe if c else name for name, c in recipes), *(foreign.name for foreign in foreigns)])
    check_matplotlib()
    out = _folder(a.out)
    manifest = open_at(data, size)
    split = choose_split(manifest, a.split, a.num)
    judge = Judge(Evaluator(choose_extractor(a.extractor), manifest, a.num, split))
    track = Track(a, manifest, judge, out, place)
    entrants = [
        *(_entrant(track, name, config) for name, config in recipes),
        *(Entrant(f.name, {"command": f.command}, partial(track.run_foreign, f)) for f in foreigns),
    ]
    header = {
        "metric": judge.evaluator.name,
        "split": split,
        "n_real": judge.evaluator.num_real,
        "minutes": a.minutes,
        "size": size,
        "seeds": a.seeds,
        "dataset_digest": manifest.digest,
        "machine": machine(),
    }
    race = Race(entrants, header, a.intervals, a.num, out)
    failures = race.run(judge)
    record = race.record()
    if record["results"]:
        write_table(out, record)
        draw_curves(out, record, race.by_name())
        print_table(PRINTED, [[row[column] for column in PRINTED] for row in record["results"]])
    if failures:
        raise UserError("; ".join(failures))
    write_results(out, record, race.trainings)
    return record


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION, _EXAMPLES)
    add = parser.add_argument
    add("--data", metavar="SHARDS", help="folder of shards (default: drawn cats)")
    add("--size", type=count, metavar="N", help="side in pixels; larger pictures are shrunk (default: the shards')")
    add(
        "--recipes",
        metavar="A,B",
        help=f'recipes, separated by commas (default: this machine\'s default, and "{PLAIN}")',
    )
    add("--minutes", type=positive, default=5.0, metavar="M", help="training time of each (default: %(default)s)")
    add(
        "--seeds", type=count, default=3, metavar="N", help="trainings of each: seeds 0 to N - 1 (default: %(default)s)"
    )
    add("--intervals", type=count, default=5, metavar="N", help="evaluations of a training (default: %(default)s)")
    add("--num", type=count, default=2048, metavar="N", help="pictures per evaluation (default: %(default)s)")
    add("--extractor", choices=CHOICES, default="auto", help="network that judges (default: %(default)s, as run.py)")
    add(
        "--split",
        choices=("auto", "val", "train"),
        default="auto",
        help="real pictures to judge by; auto (default): val if it has --num of them, else train. Trained on: train",
    )
    add("--foreign", action="append", default=[], metavar="NAME=COMMAND", help="a foreign script; may be given again")
    add("--out", default="out/race", metavar="OUT", help="folder (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.num < MIN_NUM:
        raise UserError(f"--num {a.num}: precision and recall need at least {MIN_NUM} pictures")
    return a


def _size(names: Sequence[str | None]) -> int:
    """The size of drawn cats for these recipes: the first one's own."""
    name = next((name for name in names if name != PLAIN), None)
    return resolve(name, None, gpu=torch.cuda.is_available()).model.size


def _recipe(name: str | None, size: int) -> tuple[str, Config | None]:
    """The name of a row and the configuration of a recipe (None: this machine's default); the plain loop has none.

    Raises:
        UserError: there is no such recipe, or not of this size.
    """
    if name == PLAIN:
        return PLAIN, None
    if name == "":
        raise UserError(f"--recipes has an empty name: give names of run.py's recipes or {PLAIN}, separated by commas")
    config = resolve(name, size, gpu=torch.cuda.is_available())
    if config.model.size != size:
        raise UserError(f"{config.recipe}: the pictures are {size}x{size}; name recipes of that size, or give --size")
    if found := problems(config):
        raise UserError(f"{config.recipe} at {size}x{size}: {'; '.join(found)}")
    return name or config.recipe, config


def _refuse_twins(names: Sequence[str]) -> None:
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twins)} would take part twice: give each once")


def _folder(out: str) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; give another --out") from None
    return Path(out)


def _entrant(track: Track, name: str, config: Config | None) -> Entrant:
    if config is None:
        return Entrant(name, {"batch": PLAIN_BATCH}, partial(track.train, name, plain_contestant))
    return Entrant(name, config.to_dict(), partial(track.train, name, partial(recipe_contestant, config)))


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()

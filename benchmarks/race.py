"""Which recipe generates the best images after the same training time on this machine?

Trains each recipe on the same images for the same minutes, one after the other, and evaluates it at equal intervals.
The clock is stopped during evaluations and all images are in memory, so neither evaluating nor loading counts. Every
second seed trains the recipes in reverse order, so that a machine that slows down favours none.

Recipes are those of trainer/run.py, and "plain": the DCGAN loop of plain_dcgan.py with the EMA of the recipe dcgan.

All values are medians over the seeds. One seed is luck: the default is three.

  distance         Fréchet distance of the EMA generator, the one that a training exports; lower is better
  distance_worst   that of the worst seed
  distance_second  the same as `distance` in the features of a second network, opennsfw
  distance_live    that of the raw generator with batch norm's running statistics
  kid              kernel distance of the EMA generator; lower is better
  precision        share of the generated images that look like real ones; higher is better
  recall           share of the real images that look like generated ones (variety); higher is better

Other programs on this machine? Set OMP_NUM_THREADS=1: threads that wait for each other cost processor time.
Interrupted? The same command continues after the last finished training. The folder --out gets results.json, table.md,
curves.png and sample grids NAME-seedS-II.png.

examples:
  python benchmarks/race.py                    the default recipe and the plain loop on drawn cats
  python benchmarks/race.py --data shards/cats64 --recipes dcgan-cpu --seeds 1 --minutes 1      a first look
  python benchmarks/race.py --data shards/cats32 --recipes dcgan-cpu,r3gan-cpu,plain --minutes 10
  python benchmarks/race.py --size 32 --recipes biggan-cpu,dcgan-cpu     drawn cats by the pattern of their coats
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, count, device, machine, positive, table
from race_report import check_matplotlib, draw_curves, load_trainings, median_row, write_results, write_table
from race_training import MIN_NUM, Contestant, Scores, choose_split, plain_contestant, recipe_contestant, train

from catgan.command import Parser, UserError, run_command, say
from catgan.dataset import Manifest, Split
from trainer.config import Config, LoaderConfig
from trainer.data.open import open_data
from trainer.data.stream import eval_batches
from trainer.features.extractors import CHOICES, choose_extractor
from trainer.features.networks import EFFLITE0
from trainer.launch.checks import problems
from trainer.launch.classes import with_classes
from trainer.metrics.evaluate import Evaluator
from trainer.recipes import resolve

PLAIN = "plain"
PRINTED = ("recipe", "distance", "distance_worst", "distance_second", "kid", "precision", "recall", "kimg")
SECOND = "opennsfw"


def main(argv: list[str]) -> dict[str, Any]:
    a = _parse(argv)
    place = device()
    data = Manifest.load(a.data) if a.data else None
    recipes, size = _recipes(a.recipes, data.size if data else a.size)
    recipes = {name: config and with_classes(config, data) for name, config in recipes.items()}
    is_conditional = any(config and config.model.classes for config in recipes.values())
    check_matplotlib()
    out = _make_folder(a.out)
    manifest = data or open_data(None, size, LoaderConfig(), labelled=is_conditional)
    split = choose_split(manifest, a.split, a.num)
    first, second = (Evaluator(choose_extractor(name), manifest, a.num, split) for name in (a.extractor, SECOND))
    contained = [name for name, config in recipes.items() if config and config.projected.weight]
    if contained and first.extractor.name == EFFLITE0.name:
        say(f"{', '.join(contained)}: {EFFLITE0.name} is in its discriminator, so compare distance_second instead")
    scores = Scores(first, second)
    conditions = {
        "metric": first.name,
        "second": second.name,
        "split": split,
        "minutes": a.minutes,
        "size": size,
        "dataset_digest": manifest.digest,
        "machine": machine(),
    }
    header = conditions | {"n_real": first.num_real, "seeds": a.seeds}
    conditions |= {"intervals": a.intervals, "num": a.num, "code": _code_digest()}
    plan = [
        _settings(name, seed, recipes[name], conditions)
        for seed in range(a.seeds)
        for name in (recipes if seed % 2 == 0 else reversed(recipes))
    ]
    trainings = load_trainings(out)
    images: torch.Tensor | None = None
    labels = torch.empty(0)
    for i, settings in enumerate(plan, 1):
        name, seed = settings["recipe"], settings["seed"]
        label = f"{name} seed {seed}"
        if _find(trainings, settings):
            say(f"{label} is finished already, see {out}")
            continue
        if images is None:
            scores.prepare()
            batches = eval_batches(manifest, "train", labelled=is_conditional)
            images, labels = (torch.cat(part).to(place) for part in zip(*batches, strict=True))
        say(f"training {i} of {len(plan)}: {label}")
        contestant = _start(recipes[name], images, labels, manifest.splits["train"], seed)
        sheet = str(out / f"{name}-seed{seed}")
        result = train(contestant, label, a.minutes, a.intervals, scores, sheet)
        trainings.append({"settings": settings, **result})
        write_results(out, header, trainings)
    finished = [_find(trainings, settings) for settings in plan]
    raced = {name: [t for t in finished if t and t["settings"]["recipe"] == name] for name in recipes}
    record = header | {"results": [median_row(name, found) for name, found in raced.items()], "out": str(out)}
    write_results(out, record, trainings)
    write_table(out, record)
    draw_curves(out, record, raced)
    table(PRINTED, [[row[column] for column in PRINTED] for row in record["results"]])
    return record


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python benchmarks/race.py", __doc__)
    add = parser.add_argument
    add("--data", metavar="SHARDS", help="folder of shards (default: drawn cats)")
    add("--size", type=count, metavar="N", help="side of the drawn cats in pixels (default: the first recipe's)")
    add("--recipes", metavar="A,B", help="separated by commas (default: this machine's default recipe, and plain)")
    add("--minutes", type=positive, default=5.0, metavar="M", help="training time of each (default: %(default)s)")
    add("--seeds", type=count, default=3, metavar="N", help="train each with seeds 0 to N - 1 (default: %(default)s)")
    add("--intervals", type=count, default=5, metavar="N", help="evaluations of a training (default: %(default)s)")
    add("--num", type=count, default=2048, metavar="N", help="images per evaluation (default: %(default)s)")
    add("--extractor", choices=CHOICES, default="auto", help="metric network (default: %(default)s, as run.py)")
    add(
        "--split",
        choices=("auto", "val", "train"),
        default="auto",
        help="real images to evaluate against; auto: val if it has --num of them, else train (default: %(default)s)",
    )
    add("--out", default="out/race", metavar="OUT", help="folder (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.num < MIN_NUM:
        raise UserError(f"--num {a.num}: precision and recall need at least {MIN_NUM} images")
    if a.data and a.size:
        raise UserError("--size is for drawn cats; for shards of another size: catdata build SHARDS OUT --size N")
    return a


def _recipes(wanted: str | None, size: int | None) -> tuple[dict[str, Config | None], int]:
    """The configurations by name, None for the plain loop, and their size; if none is given, the first recipe's.

    Raises:
        UserError: no such recipe, not of this size, or given twice.
    """
    gpu = torch.cuda.is_available()
    names = [None, PLAIN] if wanted is None else [name.strip() for name in wanted.split(",")]
    if "" in names:
        raise UserError(f"--recipes has an empty name: give run.py's recipes or {PLAIN}, separated by commas")
    size = size or resolve(next((name for name in names if name != PLAIN), None), None, gpu).model.size
    found: dict[str, Config | None] = {}
    for name in names:
        config = resolve("dcgan" if name == PLAIN else name, size, gpu)
        if config.model.size != size:
            raise UserError(f"{config.recipe}: the images are {size}x{size}; name recipes of that size")
        if wrong := problems(config):
            raise UserError(f"{name or config.recipe} at {size}x{size}: {'; '.join(wrong)}")
        if name in found or (name != PLAIN and any(c and c.recipe == config.recipe for c in found.values())):
            raise UserError(f"--recipes has {name} twice: give each recipe once")
        found[name or config.recipe] = None if name == PLAIN else config
    return found, size


def _make_folder(out: str) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; give another --out") from None
    return Path(out)


def _start(config: Config | None, images: torch.Tensor, labels: torch.Tensor, split: Split, seed: int) -> Contestant:
    torch.manual_seed(seed)
    return recipe_contestant(config, images, labels, split) if config else plain_contestant(images)


def _settings(name: str, seed: int, config: Config | None, conditions: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a finished training to count, as JSON holds it (tuples become lists)."""
    settings = {"recipe": name, "seed": seed, **conditions, "config": config.to_dict() if config else None}
    return json.loads(json.dumps(settings))


def _find(trainings: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
    return next((training for training in trainings if training["settings"] == settings), None)


def _code_digest() -> str:
    """SHA-256 (hex, its start) of the code that trains: results of another version do not count."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted((ROOT / "trainer").rglob("*.py")), here / "race_training.py", here / "plain_dcgan.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run_command("race.py", main)

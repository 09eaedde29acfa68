"""A model of training's speed on GPUs that nobody has measured: the tables of docs/scaling.md and the sums in them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from step_work import Work, count_work

from catgan.command import Parser, run_command, say
from trainer.data.manifest import Manifest, Shard, Split
from trainer.data.stream import Reader
from trainer.recipes import FAMILIES

NAME = "scaling_model.py"
GPUS = (8, 64, 512)
IMAGES = (10**6, 10**9)

_DESCRIPTION = """\
Prints the tables of docs/scaling.md as Markdown: the parts of a step on 8, 64 and 512 GPUs for each family of recipes,
and what a million and a billion pictures need. The work of a step is counted on this machine; the speeds of GPUs and
networks are assumptions (`assumptions` in the JSON). Nothing is trained or timed.

examples:
  python benchmarks/scaling_model.py
  python benchmarks/scaling_model.py --size 128 --families dcgan r3gan
"""


@dataclass(frozen=True)
class Assumptions:
    """Speeds in bytes, FLOP or pictures per second, times in seconds."""

    flops: float = 989e12  # H100 SXM, dense bf16, by its data sheet
    utilisation: float = 0.3
    launch: float = 8e-6  # from one operation's start to the next one's, in PyTorch without graphs
    nvlink: float = 0.8 * 450e9  # each way, four fifths of the data sheet
    nvlink_hop: float = 3e-6
    network: float = 0.8 * 50e9  # 400 Gbit/s for each GPU
    network_hop: float = 10e-6
    gpus_per_node: int = 8
    cores_per_gpu: int = 12
    decode: float = 2300.0  # pictures of 64x64 by one core; by pixels for other sizes
    pcie: float = 25e9
    judge_flops: float = 11.4e9  # InceptionV3 at 299x299
    distance: float = 3.0  # eigenvalues of 2,048 x 2,048, one core of an AMD EPYC; the other ranks wait for rank 0
    bytes_per_image: float = 7000.0  # of 64x64, lossless WebP
    images_per_shard: int = 512


def ring(size: float, n: int, bandwidth: float, hop: float) -> float:
    """Seconds of an all-reduce of ``size`` bytes over ``n`` members of a ring (Patarasuk and Yuan 2009): each sends
    2(n-1)/n of the bytes, in 2(n-1) turns."""
    return 2 * (n - 1) / n * size / bandwidth + 2 * (n - 1) * hop


def all_reduce(size: float, gpus: int, a: Assumptions) -> float:
    """Rings in the nodes, then of each GPU's part between the nodes."""
    inside = min(gpus, a.gpus_per_node)
    return ring(size, inside, a.nvlink, a.nvlink_hop) + ring(
        size / inside, math.ceil(gpus / a.gpus_per_node), a.network, a.network_hop
    )


def step_parts(w: Work, gpus: int, per_gpu: float, a: Assumptions) -> dict[str, float]:
    """Seconds of a step's parts with ``per_gpu`` reals on each GPU. Nothing is assumed to overlap but launching and
    input with the GPU's work, of which only what exceeds it counts."""
    batch = per_gpu * gpus
    compute = per_gpu * w.flops / (a.flops * a.utilisation)
    launch = max(w.operations * a.launch - compute, 0.0)
    reading = per_gpu * w.reads / (a.decode * (64 / w.size) ** 2 * a.cores_per_gpu)
    judging = w.judged * (w.draw_flops + a.judge_flops) / (a.flops * a.utilisation) / gpus
    state = 4 * (4 * w.generator + 3 * w.discriminator)  # weights and two moments each, and the average
    return {
        "compute": compute,
        "launch": launch,
        "gradients": all_reduce(4 * (w.discriminator + w.generator / w.n_critic), gpus, a),
        "norms": w.norms * all_reduce(4096, gpus, a) if gpus > 1 else 0.0,
        "input": max(reading - compute - launch, 0.0),
        "evaluation": (judging + a.distance) * batch / w.snapshot,
        "checkpoint": state / a.pcie * batch / w.snapshot,
    }


def scaling(w: Work, gpus: int, per_gpu: float, a: Assumptions) -> dict[str, Any]:
    """A row: efficiency is the speed of each GPU over that of one GPU alone with the same number of pictures, without
    evaluations; `evaluation` is the share of the time that these take if every snapshot is evaluated."""
    parts, alone = step_parts(w, gpus, per_gpu, a), step_parts(w, 1, per_gpu, a)
    del alone["evaluation"]
    judging = parts.pop("evaluation")
    seconds = sum(parts.values())
    return {
        "family": w.family,
        "gpus": gpus,
        "per_gpu": per_gpu,
        "step_ms": 1e3 * seconds,
        "images_per_second": per_gpu * gpus / seconds,
        "efficiency": sum(alone.values()) / seconds,
        "evaluation": judging / (judging + seconds),
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "lost_to": max(("gradients", "norms", "input", "checkpoint"), key=lambda name: parts[name]),
    }


def manifest_bytes(shards: int, counted: int = 5000) -> tuple[float, float]:
    """Bytes of ``manifest.json``, and of a reader's memory in each process, for so many shards; by a small one."""
    names = [(f"train-{i:06d}.tar", f"{i:064x}") for i in range(counted)]
    record = [{"name": name, "images": 512, "sha256": sha, "bytes": 3_600_000} for name, sha in names]
    tracemalloc.start()
    made = tuple(Shard("".join([name]), 512, "".join([*sha]), 3_600_000 + i) for i, (name, sha) in enumerate(names))
    reader = Reader(Manifest("/data", 64, {"train": Split(made)}, 0, (), {}, ""), "train")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader.shards) == counted
    return len(json.dumps(record, indent=2)) / counted * shards, used / counted * shards


def input_needs(images: int, a: Assumptions) -> dict[str, float]:
    """What a set of 64x64 needs."""
    shards = math.ceil(images / a.images_per_shard)
    text, memory = manifest_bytes(shards)
    return {
        "shards": shards,
        "gb_stored": images * a.bytes_per_image / 1e9,
        "gb_decoded": images * 3 * 64 * 64 / 1e9,
        "manifest_mb": text / 1e6,
        "reader_mb": memory / 1e6,
        "epochs_of_5000_kimg": 5e6 / images,
        "core_hours_decoding_once": images / a.decode / 3600,
        # Each rank reads its share of the reals in its own process, so by one core.
        **{f"hours_of_statistics_{n}": images / n / a.decode / 3600 for n in GPUS},
    }


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    a, assumed = parser.parse_args(argv), Assumptions()
    works = [count_work(family, a.size) for family in a.families]
    _markdown(
        ("family", "G, millions", "D, millions", "GFLOP/image", "operations", "norms", "batch"),
        [
            (
                w.family,
                *(f"{n / 1e6:.1f}" for n in (w.generator, w.discriminator)),
                f"{w.flops / 1e9:.2f}",
                *map(round, (w.operations, w.norms, w.batch)),
            )
            for w in works
        ],
    )
    fixed = [scaling(w, n, w.batch / n, assumed) for w in works for n in GPUS if w.batch >= n]
    grown = [scaling(w, n, w.batch, assumed) for w in works for n in GPUS]
    for title, rows in (("the recipe's batch, split", fixed), ("the recipe's batch on each GPU", grown)):
        say(f"\n{title}\n")
        _markdown(
            ("family", "GPUs", "images per GPU", "step, ms", "images/s", "efficiency", "most time", "lost to", "eval"),
            [
                (
                    *(r["family"], r["gpus"], f"{r['per_gpu']:g}", f"{r['step_ms']:.1f}"),
                    *(f"{r['images_per_second']:,.0f}", f"{r['efficiency']:.0%}", r["bottleneck"], r["lost_to"]),
                    f"{r['evaluation']:.0%}",
                )
                for r in rows
            ],
        )
    needs = {n: input_needs(n, assumed) for n in IMAGES}
    say("\npictures of 64x64\n")
    names = list(needs[IMAGES[0]])
    _markdown(("", *(f"{n:,}" for n in IMAGES)), [(k, *(f"{needs[n][k]:,.4g}" for n in IMAGES)) for k in names])
    return {
        "work": [asdict(w) for w in works],
        "split": fixed,
        "grown": grown,
        "input": needs,
        "assumptions": asdict(assumed),
    }


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for row in (columns, ["---"] * len(columns), *rows):
        say("| " + " | ".join(map(str, row)) + " |")


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()

"""Favourites in the report of a run: images of the latest grid that the reader marks, and the command with their seeds.

The page's script adds the buttons over the images, see ``web/favourites.js``.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from PIL import Image

from infer.grid import grid_shape
from trainer.report.history import History
from trainer.report.markup import text


def favourites(run: History, grid: Path, kimg: int) -> str:
    """The part of the page below the grids; empty if it is unknown which seed an image has.

    Args:
        grid: the latest grid that is on the page. Its images have the seeds from 0 on, row by row.
        kimg: its position, rounded down.
    """
    if run.config.get("model", {}).get("classes"):
        return ""  # an image depends on its class too
    count, size = (run.config.get(room, {}).get(name) for room, name in (("track", "grid"), ("model", "size")))
    if not isinstance(count, int) or not isinstance(size, int) or count < 1:
        return ""
    rows, columns = grid_shape(count)
    with Image.open(grid) as image:
        if image.size != (columns * size, rows * size):  # of a training that was continued with another --track.grid
            return ""
    onnx = run.folder / "best" / "gen.onnx"
    notes = []
    best = run.best(run.metric_names[0]) if run.metric_names else None
    if best is not None and int(best["kimg"]) != kimg:
        notes.append(
            f"The command uses the best generator, of {best['kimg']:g} kimg; its images differ from those of this grid."
        )
    if not onnx.is_file():
        notes.append("The file does not exist yet: a training writes it at its end.")
    return (
        f'<div class="favourites" data-columns="{columns}" data-rows="{rows}" data-count="{count}"'
        f' data-command="{text(f"catinfer --onnx {shlex.quote(str(onnx))} --seeds ")}" hidden><h3>Favourites</h3>'
        '<p class="hint">Click images of the latest grid to mark them, or go to one with the arrow keys and press the'
        f" space bar. The page's address keeps them. {text(' '.join(notes))}</p>"
        '<p>Seeds: <output id="seeds"></output></p><div class="command"><input id="command" readonly'
        ' aria-label="Command that generates the favourites" spellcheck="false"><button type="button" id="copy">Copy'
        '</button><button type="button" id="clear">Clear</button></div></div>'
    )

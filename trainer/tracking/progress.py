"""How far a training is, as rank 0 knows at each tick, and its line in a log."""

from __future__ import annotations

import math
from dataclasses import dataclass

from catgan.command import say


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    nimg: int
    """Images seen."""
    total: int
    """Images seen at the end."""
    values: dict[str, float]
    """Means since the last tick, under MLflow's names; empty before the first tick."""
    seconds_left: float = 0.0

    @property
    def speed(self) -> str:
        return f"{self.values['speed/images_per_second']:.0f} images/s"

    @property
    def losses(self) -> str:
        # Some ticks of a recipe with several critic steps have no step of the generator.
        d, g = self.values["loss/discriminator"], self.values.get("loss/generator", math.nan)
        return f"loss D {d:7.4f} G {g:7.4f}"

    @property
    def time_left(self) -> str:
        """As in "4:09" or "1:02:03"."""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_line(progress: Progress) -> None:
    """Print the tick as one line, nothing before the first tick."""
    if not progress.values:
        return
    say(
        f"kimg {progress.nimg / 1000:8.2f}/{progress.total / 1000:g}  {progress.speed:>15}  {progress.losses}"
        f"  D(real) {progress.values['d/real']:+6.2f} D(fake) {progress.values['d/fake']:+6.2f}"
        f"  left {progress.time_left}"
    )

"""Options that are legal and change nothing: a warning names them."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import Config, Schedule
from trainer.launch.options import values

_OPTIONS_OF = {
    "progan": ("--grow.start", "--grow.hold-kimg", "--grow.fade-kimg"),
    "r3gan": ("--model.blocks", "--model.expansion", "--model.group-width"),
    "stylegan2": ("--model.mapping-layers",),
}


def without_effect(config: Config) -> list[str]:
    """One sentence for each value that differs from the default and changes nothing."""
    own, default = values(config), values(Config(config.recipe))
    return [
        f"{_given(name, own[name])} has no effect {reason}"
        for names, is_used, reason in _conditions(config)
        if not is_used
        for name in names
        if own[name] != default[name]
    ]


def _conditions(config: Config) -> list[tuple[Sequence[str], bool, str]]:
    """Options, whether they are used, and why not."""
    arch, loss, augment, projected = config.model.arch, config.loss, config.augment, config.projected
    return [
        *(
            (names, arch == other, f"with --model.arch {arch}: it is an option of {other}")
            for other, names in _OPTIONS_OF.items()
        ),
        (
            ("--augment.policy",),
            augment.p.is_used or augment.target > 0,
            "with --augment.p 0, the probability of each transform",
        ),
        (("--augment.target-kimg",), augment.target > 0, "without --augment.target"),
        (
            ("--projected.start-kimg", "--projected.strides", "--projected.lr"),
            projected.weight > 0,
            "with --projected.weight 0: there is no second discriminator",
        ),
        (
            ("--projected.weight",),
            projected.start_kimg < config.kimg,
            f"with --kimg {config.kimg:g}: the second discriminator joins after {projected.start_kimg:g} kimg",
        ),
        (("--optim.beta1",), config.optim.name == "adam", f"with --optim.name {config.optim.name}"),
        (("--loss.r2",), loss.gamma.is_used, "with --loss.gamma 0"),
    ]


def _given(name: str, value: object) -> str:
    """The option as on the command line; of a schedule, its start."""
    if isinstance(value, Schedule):
        value = value.start
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    if value is False:
        return name.replace(".", ".no-", 1)
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"

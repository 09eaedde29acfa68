"""Which names of experiments, models and runs MLflow takes."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from trainer.tracking.server import configure

# Of columns in MLflow's tables (mlflow/store/*/dbmodels/models.py): SQLite takes longer names, PostgreSQL refuses them.
_EXPERIMENT_LENGTH = 256
_MODEL_LENGTH = 256
_RUN_LENGTH = 250

_CONTROL, _SURROGATE = "Cc", "Cs"  # a surrogate stands for a byte that is not UTF-8


def problem_with_names(experiment: str, model: str, run_name: str | None) -> list[str]:
    """A sentence for each name that MLflow, or the database of its server, refuses. None for ``run_name``: any name."""
    configure()
    from mlflow.utils import validation  # on use: it takes a second

    found = [
        _problem("--track.experiment", experiment, _EXPERIMENT_LENGTH, validation._validate_experiment_name),
        problem_with_model(model),
    ]
    if run_name is not None:
        found.append(_problem("--name", run_name, _RUN_LENGTH))
    return [problem for problem in found if problem is not None]


def problem_with_model(model: str, option: str = "--track.model") -> str | None:
    """The same for the name of a model, which ``option`` gives; None: it is taken."""
    configure()
    from mlflow.utils import validation

    rules = ", not blank, without / and :, not . or .."
    return _problem(option, model, _MODEL_LENGTH, validation._validate_model_name, rules)


def _problem(
    option: str, name: str, length: int, validate: Callable[[str], None] | None = None, rules: str = ""
) -> str | None:
    from mlflow.exceptions import MlflowException

    shown = repr(name) if len(name) <= 80 else f"of {len(name)} characters"
    if any(unicodedata.category(character) in (_CONTROL, _SURROGATE) for character in name):
        return f"{option} {shown}: MLflow takes no control characters and no characters that are not UTF-8"
    try:
        if validate is not None:
            validate(name)
        if 1 <= len(name) <= length:
            return None
    except MlflowException:
        pass
    return f"{option} {shown}: MLflow takes 1 to {length} characters{rules}"

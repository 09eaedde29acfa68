from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from trainer.tracking.names import problem_with_names

ALLOWED = ["catgan", "my cats", "a'b\"c", "Kätzchen 猫", "50%", "a?b#c", "x" * 250]
REFUSED = ["", "\0", "two\nlines", "\x1b[31m", "\udcff", "x" * 257]


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_names(client: MlflowClient, name: str) -> None:
    assert problem_with_names(name, name, name) == []
    experiment = client.create_experiment(f"{name[:200]} of the test")
    assert client.create_run(experiment, run_name=name).info.run_name == name
    assert client.create_registered_model(name).name == name


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names(name: str) -> None:
    experiment, model, run = problem_with_names(name, name, name)
    assert experiment.startswith("--track.experiment ")
    assert model.startswith("--track.model ")
    assert run.startswith("--name ")
    assert problem_with_names("catgan", "catgan", None) == []


@pytest.mark.parametrize("name", [".", "..", "a/b", "a:b", " "])
def test_models_have_rules_of_their_own(client: MlflowClient, name: str) -> None:
    (problem,) = problem_with_names(name, name, name)
    assert (
        problem == f"--track.model {name!r}: MLflow takes 1 to 256 characters, not blank, without / and :, not . or .."
    )
    with pytest.raises(MlflowException):
        client.create_registered_model(name)


def test_a_long_name_is_not_printed() -> None:
    (problem,) = problem_with_names("x" * 10_000, "catgan", "mine")
    assert problem == "--track.experiment of 10000 characters: MLflow takes 1 to 256 characters"

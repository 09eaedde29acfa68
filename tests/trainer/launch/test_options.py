"""Options change the values of a recipe, and a mistake is reported in one line."""

import pytest

from catgan.command import UserError
from trainer.config import Schedule
from trainer.launch.options import parse, parse_workers, schedules, split_recipe, value_of
from trainer.recipes import resolve

RECIPE = resolve("dcgan-cpu-32", None, gpu=False)
SCHEDULES = ["--loss.gamma", "--augment.p", "--augment.noise", "--optim.g-lr", "--optim.d-lr", "--optim.beta2"]


def test_options_change_a_recipe():
    changes = ["--kimg", "3", "--model.z-dim", "5", "--augment.policy", "colour", "cutout", "--augment.p.end", "0.5"]
    options = parse([*changes, "--data", "x", "--dry-run"], RECIPE, "")
    config = options.config()
    assert (config.kimg, config.model.z_dim, config.augment.policy, config.augment.p.end) == (
        3.0,
        5,
        ("colour", "cutout"),
        0.5,
    )
    assert (options.data, options.dry_run, options.recipe) == ("x", True, "dcgan-cpu-32")
    assert config.batch == RECIPE.batch
    assert config.optim == RECIPE.optim


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--kimg"], ["--kimg"]),
        (["--kimg", "1", "dcgan-cpu-64"], ["dcgan-cpu-64", "the recipe is the first word"]),
        (["--batch", "1.5"], ["--batch", "'1.5' is not a whole number;"]),
        (["--kimg", "x", "--batch", "8"], ["--kimg", "'x' is not a number;"]),
        (["--model.g-head", "foo"], ["--model.g-head", "'foo'", "'conv', 'dense'"]),
        (["--eval.nun", "5"], ["--eval.nun", "did you mean --eval.num?"]),
        (["--kimgs", "5"], ["--kimgs", "did you mean --kimg?"]),
        (["--z-dim", "5"], ["--z-dim", "did you mean --model.z-dim?"]),
        (["--track.tick_kmig", "5"], ["--track.tick_kmig", "did you mean --track.tick-kimg?"]),
        (["--augment.policy.end=1"], ["--augment.policy.end", "--augment.p?"]),
        (["--quiet"], ["--quiet"]),
        (["--recipe", "x"], ["--recipe", "the recipe is the first word"]),
    ],
)
def test_a_mistake_is_one_line_with_the_option(
    argv: list[str], parts: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "60")  # tyro wraps its message
    with pytest.raises(UserError) as caught:
        parse(argv, RECIPE, "")
    message = str(caught.value)
    assert "\n" not in message
    for part in (*parts, "; --help lists the options"):
        assert part in message, part
    assert capfd.readouterr() == ("", "")


def test_schedules_are_found_in_the_configuration():
    assert sorted(schedules(RECIPE)) == sorted(SCHEDULES)
    assert schedules(RECIPE)["--optim.beta2"] == RECIPE.optim.beta2


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_constant_schedule_is_one_option(name: str):
    ramp = [f"{name}.start", "1", f"{name}.end", "0", f"{name}.kimg", "9"]
    for constant in ([name, "0.25"], [f"{name}=0.25"], [name.replace("-lr", "_lr"), "0.25"]):
        config = parse([*ramp, *constant, "--batch", "8"], RECIPE, "").config()
        assert schedules(config) == schedules(RECIPE) | {name: Schedule(0.25, 0.25, 0.0)}
        assert config.batch == 8


def test_a_ramp_may_follow_a_constant():
    config = parse(["--optim.g-lr", "1e-3", "--optim.g-lr.end", "1e-5", "--optim.g-lr.kimg", "5"], RECIPE, "").config()
    assert config.optim.g_lr == Schedule(1e-3, 1e-5, 5.0)


@pytest.mark.parametrize(
    "argv", [["--optim.g-lr", "x"], ["--optim.g-lr=x"], ["--optim.g-lr"], ["--optim.g-lr", "--batch"]]
)
def test_a_schedule_that_is_no_number_is_one_line(argv: list[str]):
    with pytest.raises(UserError, match=r"--optim.g-lr (x|--batch)?: give one number") as caught:
        parse(argv, RECIPE, "")
    assert "\n" not in str(caught.value)


def test_help_describes_the_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], RECIPE, "A description.")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in ("A description.", "--model.g-width", "--resume", "--data", "drawn cats", "Global batch"):
        assert part in text, part


@pytest.mark.parametrize(("text", "workers"), [("0", 0), ("3", 3), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_workers(text: str, workers: object):
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["-1", "x", "4:1", "0:2", "1:", "1.5", ""])
def test_unusable_workers(text: str):
    with pytest.raises(UserError, match="MIN:MAX"):
        parse_workers(text)


def test_the_recipe_is_the_first_word():
    assert split_recipe(["r3gan-64", "--kimg", "1"]) == ("r3gan-64", ["--kimg", "1"])
    assert split_recipe(["--kimg", "1"]) == (None, ["--kimg", "1"])
    assert split_recipe([]) == (None, [])


@pytest.mark.parametrize(
    ("argv", "value"), [(["--data", "a"], "a"), (["--x", "--data=b"], "b"), (["--data"], None), ([], None)]
)
def test_value_of(argv: list[str], value: str | None):
    assert value_of(argv, "--data") == value

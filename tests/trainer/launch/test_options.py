"""The command line over a recipe: values arrive typed, and every mistake is named in one line."""

import pytest

from catgan.command import UserError
from trainer.launch.options import parse, parse_workers, split_recipe, value_of
from trainer.recipes import resolve

RECIPE = resolve("dcgan-cpu-32", None, gpu=False)


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


def test_all_mistakes_come_in_one_line():
    with pytest.raises(UserError) as caught:
        parse(["--kimg", "x", "--modle.z-dim", "3", "--model.g-head", "foo", "--batch", "8"], RECIPE, "")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("--kimg", "'x'", "--modle.z-dim", "--model.g-head", "'foo'", "'conv', 'dense'", "--help"):
        assert part in message, part
    assert "--batch" not in message


@pytest.mark.parametrize("argv", [["--kimg"], ["stray"], ["--batch", "1.5"]])
def test_single_mistakes(argv: list[str]):
    with pytest.raises(UserError, match=argv[0]):
        parse(argv, RECIPE, "")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--eval.nun", "--eval.num"),
        ("--kimgs", "--kimg"),
        ("--z-dim", "--model.z-dim"),
        ("--track.tick_kmig", "--track.tick-kimg"),
        ("--augment.policy.end=1", "--augment.p.end"),
    ],
)
def test_a_slip_is_told_what_was_meant(given: str, meant: str):
    with pytest.raises(UserError, match=rf"there is no option .*did you mean .*{meant}\b") as caught:
        parse([given, "5", "--batch", "8"], RECIPE, "")
    assert "batch" not in str(caught.value)
    for other, words in (("--quiet", "--quiet; --help"), ("--recipe", "the first word")):
        with pytest.raises(UserError, match=f"there is no option .*{words}"):
            parse([other, "x"], RECIPE, "")


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], RECIPE, "What it does.")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in ("What it does.", "--model.g-width", "--resume", "--data", "drawn cats", "Global batch"):
        assert part in text, part


@pytest.mark.parametrize(("text", "workers"), [("0", 0), ("3", 3), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_workers(text: str, workers: object):
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["-1", "x", "4:1", "0:2", "1:", "1.5", ""])
def test_unusable_workers(text: str):
    with pytest.raises(UserError, match="MIN:MAX"):
        parse_workers(text)


def test_recipe_is_the_leading_word():
    assert split_recipe(["r3gan-64", "--kimg", "1"]) == ("r3gan-64", ["--kimg", "1"])
    assert split_recipe(["--kimg", "1"]) == (None, ["--kimg", "1"])
    assert split_recipe([]) == (None, [])


@pytest.mark.parametrize(
    ("argv", "value"), [(["--data", "a"], "a"), (["--x", "--data=b"], "b"), (["--data"], None), ([], None)]
)
def test_value_of(argv: list[str], value: str | None):
    assert value_of(argv, "--data") == value

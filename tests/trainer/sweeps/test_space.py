"""What ``--try`` gives: parsing, refusals, draws and grids."""

import math
from itertools import product

import pytest

from catgan.command import UserError
from trainer.launch.options import parse, values
from trainer.recipes import resolve
from trainer.sweeps.space import Choice, Range, corners, draw, grid, num_combinations, parse_space, words

RECIPE = resolve("dcgan-cpu-32", None, gpu=False)


def space(*texts: str) -> list:
    return parse_space(texts, RECIPE)


def test_choices_and_ranges_with_the_types_of_their_fields():
    assert space("optim.g-lr=1e-4, 2e-4") == [Choice("optim.g-lr", ("1e-4", "2e-4"))]
    assert space("loss.gamma=log:0.02..2") == [Range("loss.gamma", 0.02, 2.0, True, False)]
    assert space("batch=8..64") == [Range("batch", 8.0, 64.0, False, True)]
    assert space("--optim.d_lr=0..1") == [Range("optim.d-lr", 0.0, 1.0, False, False)], "as options are written"
    assert space("optim.g-lr.kimg=1..2") == [Range("optim.g-lr.kimg", 1.0, 2.0, False, False)], "part of a schedule"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optim.glr=1,2", "did you mean optim.g-lr"),
        ("batch", "give FIELD=a,b,c"),
        ("batch=", "give FIELD=a,b,c"),
        ("batch=8,,16", "empty or given twice"),
        ("batch=8,8", "empty or given twice"),
        ("batch=16..8", "less than the second"),
        ("batch=8.5..16", "whole limits"),
        ("optim.g-lr=log:0..1", "begins above 0"),
        ("optim.g-lr=log:1,2", "needs a range"),
        ("optim.g-lr=a..b", "not a range of numbers"),
        ("optim.g-lr=0..inf", "finite"),
        ("optim.g-lr=nan..1", "finite"),
        ("loss.name=0..1", "not a number"),
        ("compile=0..1", "not a number"),
        ("kimg=1,2", "equal kimg"),
        ("seed=1,2", "--confirm"),
        ("eval.num=64,128", "one metric"),
        ("track.grid=1,2", "for all of them"),
        ("recipe=a,b", "first word"),
    ],
)
def test_what_cannot_be_tried_is_refused_in_one_line(text: str, part: str):
    with pytest.raises(UserError, match=part) as refused:
        space(text)
    assert text in str(refused.value)


def test_a_field_is_tried_once():
    with pytest.raises(UserError, match="nothing to try"):
        space()
    with pytest.raises(UserError, match="given twice"):
        space("batch=8,16", "batch=32,64")
    with pytest.raises(UserError, match=r"optim\.g-lr and --try optim\.g-lr\.end"):
        space("optim.g-lr=1e-4,2e-4", "optim.g-lr.end=0,1e-5")


def test_words_give_the_options_those_values():
    chosen = {
        "optim.g-lr": "3e-4",
        "batch": "8",
        "loss.name": "hinge",
        "loss.share-batch": str(not RECIPE.loss.share_batch).lower(),
        "augment.flip": str(RECIPE.augment.flip).lower(),
        "augment.policy": "colour translation",
    }
    options = values(parse(words(chosen, RECIPE), RECIPE, ""))
    assert (options["--optim.g-lr"].start, options["--optim.g-lr"].end) == (3e-4, 3e-4)
    assert options["--batch"] == 8
    assert options["--loss.name"] == "hinge"
    assert options["--loss.share-batch"] is not RECIPE.loss.share_batch
    assert options["--augment.flip"] is RECIPE.augment.flip
    assert options["--augment.policy"] == ("colour", "translation")
    with pytest.raises(UserError, match="true, false or both"):
        words({"compile": "maybe"}, RECIPE)


def test_a_grid_has_every_combination_once():
    dimensions = space("batch=8,16", "loss.name=bce,hinge", "ema.half-life-kimg=1,2,3")
    combinations = [tuple(one.values()) for one in grid(dimensions)]
    assert combinations == list(product(("8", "16"), ("bce", "hinge"), ("1", "2", "3")))
    assert num_combinations(dimensions) == 12
    with pytest.raises(UserError, match="a grid needs values"):
        grid(space("batch=8,16", "optim.g-lr=0..1"))


def test_draws_differ_repeat_by_their_seed_and_do_not_depend_on_their_number():
    dimensions = space("optim.g-lr=log:1e-5..1e-1", "batch=8,16,32")
    drawn = draw(dimensions, 40, seed=3)
    assert len({tuple(one.items()) for one in drawn}) == 40
    assert draw(dimensions, 40, seed=3) == drawn
    assert draw(dimensions, 12, seed=3) == drawn[:12], "more trials can be added"
    assert draw(dimensions, 12, seed=4) != drawn[:12]
    finite = space("batch=8,16,32", "loss.name=bce,hinge")
    assert sorted(map(str, draw(finite, 6, seed=0))) == sorted(map(str, grid(finite)))
    assert draw(finite, 2, seed=0) == draw(finite, 6, seed=0)[:2]
    for one, count in ((finite, 7), (space("batch=8..9"), 3)):
        with pytest.raises(UserError, match=f"--trials {count}"):
            draw(one, count, seed=0)


def test_logarithmic_draws_are_uniform_in_the_logarithm_and_within_the_limits():
    (one,) = space("optim.g-lr=log:1e-5..1e-1")
    drawn = [float(v["optim.g-lr"]) for v in draw([one], 400, seed=0)]
    assert all(1e-5 <= value <= 1e-1 for value in drawn)
    decades = [sum(10.0**e <= value < 10.0 ** (e + 1) for value in drawn) for e in range(-5, -1)]
    # Each decade has 100 of 400 with a standard deviation of 8.7.
    assert all(abs(count - 100) < 40 for count in decades), decades
    assert all(math.isclose(float(f"{value:.4g}"), value) for value in drawn), "short enough to read"


def test_corners_have_each_value_and_limit():
    found = list(corners(space("batch=8,16,32", "optim.g-lr=0.1..0.5")))
    assert {one["batch"] for one in found} == {"8", "16", "32"}
    assert {one["optim.g-lr"] for one in found} == {"0.1", "0.5"}

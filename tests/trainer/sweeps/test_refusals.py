"""``trainer/sweep.py`` without Ray: its plan, and mistakes, which are one line and write nothing."""

import sys
from pathlib import Path

import pytest

from catgan.command import UserError, run_command
from tests.trainer.launch.runs import save_checkpoint
from trainer.recipes import resolve
from trainer.sweeps import driver
from trainer.sweeps.options import parse_sweep
from trainer.sweeps.plan import make_plan
from trainer.sweeps.resources import Need, Node, decide_need, num_at_once

OFFLINE = ("--eval.extractor", "efflite0", "--track.offline")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch):
    """Neither is one joined nor one started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver, "connect_ray", lambda *_, **__: pytest.fail("connects to Ray"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "nothing to try"),
        (("--try", "batch=8,16", "--trials", "5", "--algorithm", "random"), "2 combinations only"),
        (("--try", "batch=8,16", "--trials", "5", "--algorithm", "tpe"), "2 combinations only"),
        (("--try", "batch=8..10", "--trials", "5", "--algorithm", "tpe"), "only 3 different ones"),
        (("--try", "batch=8,16", "--trials", "2", "--algorithm", "grid"), "--trials with --algorithm grid"),
        (("--try", "batch=8..16", "--algorithm", "grid"), "a grid needs values"),
        (("--try", "batch=8,16", "--algorithm", "best"), "invalid choice"),
        (("--try", "batch=8,0"), "--batch 0: give 1 or more"),
        (("--try", "optim.g-lr=1e-4,x"), "--try optim.g-lr=x: --optim.g-lr x"),
        (("--try", "loss.gamma=0.1,1"), "--loss.gamma or --loss.gp with --model.d-norm batch"),
        (("--try", "projected.weight=0,1", "--eval.extractor", "auto"), "different networks"),
        (("--try", "batch=8,16", "--workers", "2"), "--workers-per-trial"),
        (("--try", "batch=8,16", "--resume", "never"), "continues by its --name"),
        (("--try", "batch=8,16", "--no-such-option", "1"), "no-such-option"),
        (("--try", "batch=8,16", "--confirm", "3"), "--confirm 3: give NxM"),
        (("--try", "batch=8,16", "--confirm", "3x1"), "give 2 or more"),
        (("--try", "batch=8,16", "--reduction", "0.5"), "--reduction 0.5"),
        (("--try", "batch=8,16", "--first-rung", "9", "--kimg", "4"), "--first-rung 9"),
        (("--try", "batch=8,16", "--gpus-per-trial", "0.5"), "there is no GPU"),
        (("--try", "batch=8,16", "--gpus-per-trial", "1", "--workers-per-trial", "2"), "cannot share a GPU"),
        (("--try", "batch=8,16", "--workers-per-trial", "64"), "--workers 64 with --batch"),
        (("--try", "batch=8,16", "--cpus-per-trial", "4000"), "no trial fits: each needs 4000 CPUs"),
        (("--try", "batch=8,16", "--kimg", "-1"), "--kimg -1"),
        (("--try", "batch=8,16", "--data", "{tmp}/nothing"), "catdata"),
        (("--try", "batch=8,16", "--name", "a/b"), "--name 'a/b'"),
        (("--try", "batch=8,16", "--trials"), "--trials"),
        (("--try", "batch=8,16", "--optim.freeze-d", "1"), "--optim.freeze-d 1 without --init-from"),
        (("--try", "optim.freeze-d=0,1"), "--optim.freeze-d 1 without --init-from"),
        (("--try", "batch=8,16", "--init-from", "{tmp}/nothing"), "--init-from"),
    ],
)
def test_a_mistake_is_one_line_with_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
):
    given = [word.format(tmp=tmp_path) for word in arguments]
    own = () if "--eval.extractor" in arguments else OFFLINE
    with pytest.raises(SystemExit) as ended:
        run_command("sweep.py", driver.main, ["dcgan-cpu-32", "--out", str(tmp_path), *own, *given, "--dry-run"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert part in said.err, said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert list(tmp_path.iterdir()) == []


def test_weights_to_start_from_are_checked_once_for_all_trials(shards: Path, tmp_path: Path):
    def made(recipe: str, *words: str):
        sweep = parse_sweep(["--kimg", "9", "--try", "batch=8,16", *OFFLINE, *words])
        return make_plan(sweep, resolve(recipe, None, gpu=False), None)

    with pytest.raises(UserError, match="without --init-from"):
        made("dcgan-cpu-few-32", "--optim.freeze-d", "1")
    source = save_checkpoint(tmp_path / "run", shards, 8)
    tiny = ("--model.g-width", "4", "--model.d-width", "4", "--init-from", str(source))
    assert made("dcgan-cpu-few-32", "--optim.freeze-d", "1", *tiny).num_trials == 2


def test_a_missing_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        driver.main(["--out", str(tmp_path), "--try", "batch=8,16", "--algorithm", "tpe", *OFFLINE])


def test_a_dry_run_prints_trials_resources_and_cost_and_writes_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--data", str(shards), "--out", str(tmp_path / "out"), "--try", "optim.g-lr=log:1e-4..1e-3", *OFFLINE]
    options += ["--kimg", "9", "--trials", "5", "--confirm", "2x3", "--cpus-per-trial", "1", "--dry-run"]
    plan = driver.main(options)
    said = capsys.readouterr().err
    assert [f"t{i:02d}  optim.g-lr={v['optim.g-lr']}" in said for i, v in enumerate(plan["values"])] == [True] * 5
    assert "each with 1 CPU," in said
    assert plan["rungs"] == [1.0, 3.0]
    assert "stopped at 0.992, 2.976 kimg" in said
    assert plan["most_kimg"] == 9 * (5 + 2 * 3)
    assert "at most 99 kimg in all" in said
    assert driver.main(options)["values"] == plan["values"]
    assert list(tmp_path.iterdir()) == []


def test_each_rung_has_an_evaluation():
    recipe = resolve("dcgan-cpu-32", None, gpu=False)

    def made(*words: str):
        return make_plan(parse_sweep(["--try", "batch=8,16", "--kimg", "9", *words]), recipe, None)

    assert (made().base.track.snapshot_kimg, made().base.track.tick_kimg) == (1.0, 1.0)
    track = made("--first-rung", "5").base.track
    assert (track.snapshot_kimg, track.tick_kimg) == (5.0, pytest.approx(5 / 3, rel=1e-5)), "a whole number of ticks"
    assert made("--track.snapshot-kimg", "3").base.track.snapshot_kimg == 3.0, "the user's choice"
    assert made("--reduction", "0").base.track == recipe.track
    assert made("--reduction", "0").rungs is None
    command = made().command({"batch": "8"}, 0, "/runs/s", "t00", 36, None)
    assert command.count("--kimg") == 1
    assert command.endswith("--batch 8 --kimg 36 --out /runs/s --name t00")


def test_options_before_and_after_and_with_equals_signs():
    one = parse_sweep(["r3gan-32", "--batch", "8", "--try", "a=1", "--at_once=2", "--try=b=2,3", "--augment.flip"])
    assert (one.recipe, one.tries, one.at_once) == ("r3gan-32", ("a=1", "b=2,3"), 2)
    assert one.words == ("--batch", "8", "--augment.flip")


def test_how_many_trials_fit():
    two = [Node(8, 2), Node(8, 2)]
    assert num_at_once(Need(1, 2, 1), two) == 4
    assert num_at_once(Need(1, 1, 0.5), two) == 8, "two share a GPU"
    assert num_at_once(Need(1, 1, 0.4), two) == 8, "a part of a GPU is of one GPU"
    assert num_at_once(Need(1, 4, 0.5), two) == 4, "CPUs are the limit"
    assert num_at_once(Need(2, 2, 2), two) == 2
    assert num_at_once(Need(4, 4, 4), two) == 1, "over both machines"
    for need, part in ((Need(8, 8, 8), "--workers-per-trial 4"), (Need(1, 20, 1), "--cpus-per-trial 8")):
        with pytest.raises(UserError, match=f"{part} fits"):
            num_at_once(need, two)


def test_what_a_trial_gets():
    gpus, cpus = [Node(16, 2)], [Node(8, 0)]
    assert decide_need(gpus, 1, 1, 4, None, None) == Need(1, 2, 1)
    assert decide_need(gpus, 1, 3, 4, None, 0.5) == Need(1, 4, 0.5)
    assert decide_need(cpus, 1, 0, 4, None, None) == Need(1, 2, 0), "an equal share of the machine"
    assert decide_need(cpus, 1, 0, 100, None, None) == Need(1, 1, 0)
    assert decide_need(cpus, 2, 0, 4, 6, None) == Need(2, 6, 0)

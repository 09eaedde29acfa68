"""What is remembered of a sweep, which trial comes next, and which is stopped."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.implementations.local import LocalFileSystem

from catgan.command import UserError
from tests.trainer.launch.runs import save_checkpoint
from tests.trainer.sweeps.sweeps import add, make, open_ledger
from trainer.checkpoints.storage import Bucket, Storage
from trainer.loop import plan as steps_of
from trainer.sweeps.driver import _Sweep
from trainer.sweeps.plan import positions, settings
from trainer.sweeps.sampler import Tree
from trainer.sweeps.space import num_combinations
from trainer.sweeps.state import Ledger, Point, Rungs, Trial
from trainer.sweeps.table import Table
from trainer.sweeps.tuning import Scheduler

TRY = ("--try", "batch=8,16,32", "--try", "optim.g-lr=log:1e-4..1e-2", "--trials", "4")


def test_a_ledger_is_read_again_as_it_was(tmp_path: Path):
    plan = make(*TRY)
    ledger = open_ledger(tmp_path / "s", plan)
    add(ledger, "t00", {"batch": "8", "optim.g-lr": "1e-3"}, {1.0: 90.0, 9.0: 40.0}, "done")
    add(ledger, "t01", {"batch": "16", "optim.g-lr": "2e-3"}, {1.0: 95.0}, "stopped")
    add(ledger, "t02", {"batch": "8", "optim.g-lr": "3e-3"}, {}, "failed")
    add(ledger, "t03", {"batch": "8", "optim.g-lr": "4e-3"}, {1.0: 80.0}, "running")
    with (tmp_path / "s" / "sweep.jsonl").open("a") as file:
        file.write('{"kind": "point", "na')  # as a killed writer leaves it
    again = Ledger(Storage(tmp_path / "s"), settings(plan))
    assert (again.id, again.metric) == ("the-sweep", "fd2k_efflite0")
    assert [trial.status for trial in again.trials.values()] == ["done", "stopped", "waiting", "waiting"]
    assert again.trials["t00"].points == {1.0: Point(1.0, 90.0, 1.5), 9.0: Point(9.0, 40.0, 1.5)}
    again.measured("t00", "fd2k_efflite0", Point(1.0, 1.0, None))
    assert again.trials["t00"].points[1.0].value == 90.0, "what is known is not measured again"

    left = [trial.name for trial in _Sweep(plan, again, "")._search()]
    assert left == ["t02", "t03"], "failed and unfinished ones, none that is over, and no new one"
    more = [trial.name for trial in _Sweep(make(*TRY[:-1], "6"), again, "")._search()]
    assert more == ["t02", "t03", "t04", "t05"], "more trials may be asked for"
    assert Ledger(Storage(tmp_path / "s"), settings(plan)).trials["t05"].values == make(*TRY[:-1], "6").listed()[5]


def test_a_sweep_of_an_older_version_continues_with_the_default_of_a_new_option(tmp_path: Path):
    plan = make(*TRY)
    open_ledger(tmp_path / "s", plan)
    journal = tmp_path / "s" / "sweep.jsonl"
    record = json.loads(journal.read_text())
    del record["settings"]["--optim.beta1"]
    journal.write_text(json.dumps(record) + "\n")
    assert Ledger(Storage(tmp_path / "s"), settings(plan)).id == "the-sweep"
    record["settings"]["--track.uri"] = "http://me:secret@h:1"  # as earlier versions wrote it
    journal.write_text(json.dumps(record) + "\n")
    plan = make(*TRY, "--track.uri", "http://me:other@h:1")
    assert Ledger(Storage(tmp_path / "s"), settings(plan)).id == "the-sweep"
    assert "other" not in str(settings(plan))
    with pytest.raises(UserError, match=r"--track.uri http://h:1, now None"):
        Ledger(Storage(tmp_path / "s"), settings(make(*TRY)))
    record["settings"]["--track.uri"] = "None"
    journal.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"--optim.beta1 0\.5, now 0\.6\b"):
        Ledger(Storage(tmp_path / "s"), settings(make(*TRY, "--optim.beta1", "0.6")))


def test_the_best_that_were_trained_to_the_end_are_repeated_once(tmp_path: Path):
    plan = make(*TRY, "--confirm", "2x2")
    ledger = open_ledger(tmp_path / "s", plan)
    for i, (distance, status) in enumerate([(40.0, "done"), (30.0, "done"), (20.0, "stopped"), (35.0, "done")]):
        values = {"batch": "8", "optim.g-lr": f"{i + 1}e-3"}
        add(ledger, f"t{i:02d}", values, {1.0 if status == "stopped" else 9.0: distance}, status)
    again = list(_Sweep(plan, ledger, "")._confirm())
    assert [(t.name, t.of, t.seed) for t in again] == [
        ("t01-s1", "t01", 1),
        ("t03-s1", "t03", 1),
        ("t01-s2", "t01", 2),
        ("t03-s2", "t03", 2),
    ]
    ledger.ended("t01-s1", "done")
    assert [t.name for t in _Sweep(plan, ledger, "")._confirm()] == ["t03-s1", "t01-s2", "t03-s2"]


def test_a_sweep_is_continued_with_the_same_options_only(tmp_path: Path, shards: Path):
    open_ledger(tmp_path / "s", make(*TRY))
    with pytest.raises(UserError, match="--kimg 9, now 12"):
        Ledger(Storage(tmp_path / "s"), settings(make(*TRY, "--kimg", "12")))
    with pytest.raises(UserError, match="--try"):
        Ledger(Storage(tmp_path / "s"), settings(make("--try", "batch=8,16")))
    Ledger(Storage(tmp_path / "s"), settings(make(*TRY[:-1], "9", "--at-once", "1", "--confirm", "0")))
    save_checkpoint(tmp_path / "run", shards, 8)
    with pytest.raises(UserError, match="is a run, not a sweep"):
        Ledger(Storage(tmp_path / "run"), settings(make(*TRY)))
    (tmp_path / "s" / "sweep.jsonl").write_text('{"kind": "point", "name": "t77", "kimg": 1, "value": 2}\n')
    with pytest.raises(UserError, match="damaged"):
        Ledger(Storage(tmp_path / "s"), settings(make(*TRY)))


def test_rungs():
    assert Rungs(1.0, 3.0, 9.0).kimg == [1.0, 3.0], "at the end nobody is stopped"
    assert Rungs(1.0, 3.0, 10.0).kimg == [1.0, 3.0, 9.0]
    assert Rungs(5.0, 2.0, 5.0).kimg == []


def test_trials_are_stopped_at_rungs_by_equal_kimg():
    stopped: list[str] = []
    scheduler = Scheduler(Rungs(1.0, 2.0, 4.0), stopped.append, lambda _: 0.5)

    def trial(name: str) -> SimpleNamespace:
        one = SimpleNamespace(trial_id=name, config={"task": SimpleNamespace(name=name)})
        scheduler.on_trial_add(None, one)  # type: ignore[arg-type]
        return one

    def report(one: SimpleNamespace, kimg: float, distance: float, **others: object) -> None:
        assert scheduler.on_trial_result(None, one, {"kimg": kimg, "distance": distance} | others) == "CONTINUE"

    # A trial that was over before: at 1 and 2 kimg it had 50 and 30.
    scheduler.remember(Trial("t00", {}, 0, points={k: Point(k, v, None) for k, v in {1.0: 50.0, 2.0: 30.0}.items()}))
    good, bad, late = trial("good"), trial("bad"), trial("late")
    report(good, 1.0, 40.0)
    report(bad, 1.0, 60.0)
    assert stopped == ["bad"], "worse than half at the same rung, although better than nobody's later distance"
    report(late, 1.0, 99.0, is_known=True)
    assert stopped == ["bad"], "this decision was made when it was new"
    report(late, 2.0, 31.0)
    assert stopped == ["bad", "late"]
    report(good, 1.5, 1000.0)
    report(good, 2.0, 29.0)
    report(good, 4.0, 1000.0)
    assert stopped == ["bad", "late"], "neither between rungs nor at the end"


@pytest.mark.parametrize("batch", [8, 24, 64, 100, 512])
@pytest.mark.parametrize("words", [("--kimg", "20"), ("--kimg", "7"), ("--kimg", "31", "--reduction", "2")])
def test_the_evaluation_next_to_a_rung_is_decided_on(batch: int, words: tuple[str, ...]):
    """Steps are whole, so that it may be just below the rung."""
    plan = make("--try", "optim.g-lr=1e-4,1e-3", "--batch", str(batch), *words)
    _, snapshot, total = steps_of(plan.base.config())
    length, rungs = snapshot * batch / 1000, plan.rungs
    evaluations = [step * batch / 1000 for step in range(snapshot, total + 1, snapshot)]
    assert rungs is not None
    assert len(rungs.kimg) >= 2
    expected = [next(kimg for kimg in evaluations if kimg >= rung - length / 2) for rung in rungs.kimg]
    assert list(positions(plan.base, rungs).values()) == pytest.approx(expected)
    for rung, at in zip(rungs.kimg, expected, strict=True):
        assert abs(at - rung) <= length / 2 + 1e-9
        stopped: list[str] = []
        scheduler = Scheduler(rungs, stopped.append, lambda _: length)
        good, bad = (SimpleNamespace(trial_id=n, config={"task": SimpleNamespace(name=n)}) for n in ("good", "bad"))
        for trial in (good, bad):
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        for kimg in evaluations:
            scheduler.on_trial_result(None, good, {"kimg": kimg, "distance": 10.0})
        before = max((kimg for kimg in expected if kimg < at), default=0.0)
        for kimg in evaluations:
            scheduler.on_trial_result(None, bad, {"kimg": kimg, "distance": 9.0 if kimg <= before else 11.0})
            assert bool(stopped) == (kimg >= at), f"rung {rung:g} at {kimg:g} instead of {at:g}"
            if stopped:
                break
        assert stopped == ["bad"]


def test_two_rungs_before_one_evaluation_are_one_decision():
    stopped: list[str] = []
    scheduler = Scheduler(Rungs(1.0, 2.0, 16.0), stopped.append, lambda _: 4.0)
    for name, early, late in (("good", 10.0, 9.0), ("bad", 9.0, 30.0)):
        trial = SimpleNamespace(trial_id=name, config={"task": SimpleNamespace(name=name)})
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        scheduler.on_trial_result(None, trial, {"kimg": 4.0, "distance": early})
        scheduler.on_trial_result(None, trial, {"kimg": 5.0, "distance": late})
    assert stopped == [], "at 5 kimg there is no rung, and those at 1 and 2 are passed"


def test_tpe_proposes_what_was_good_and_the_same_again(tmp_path: Path):
    plan = make("--try", "optim.g-lr=log:1e-5..1e-1", "--try", "batch=8,16", "--algorithm", "tpe", "--trials", "40")
    ledger = open_ledger(tmp_path / "s", plan)
    tree = Tree(plan.dimensions, seed=0)
    for i in range(30):
        values = tree.propose(ledger.trials)
        far = abs(math.log10(float(values["optim.g-lr"])) + 3) + (values["batch"] == "16")
        add(ledger, f"t{i:02d}", values, {9.0: 10 + far}, "done")
    assert num_combinations(plan.dimensions) > 1e9
    add(ledger, "t30", {"optim.g-lr": "0.001", "batch": "8"}, {1.0: 80.0}, "stopped")
    add(ledger, "t31", {"optim.g-lr": "0.001", "batch": "8"}, {}, "failed")
    late = list(ledger.trials.values())[20:30]
    near = sum(1e-4 <= float(trial.values["optim.g-lr"]) <= 1e-2 for trial in late)
    assert near >= 8, "half of the logarithmic range; by chance 5"
    assert tree.propose(ledger.trials) == Tree(plan.dimensions, seed=0).propose(ledger.trials)


@pytest.mark.parametrize(
    ("space", "count"), [(("batch=8,16,32", "optim.d-lr=1e-4,1e-3"), 6), (("batch=8..10", "optim.d-lr=1e-4,1e-3"), 6)]
)
def test_tpe_proposes_nothing_twice(tmp_path: Path, space: tuple[str, str], count: int):
    plan = make("--try", space[0], "--try", space[1], "--algorithm", "tpe", "--trials", str(count))
    ledger = open_ledger(tmp_path / "s", plan)
    tree = Tree(plan.dimensions, seed=0)
    for i in range(count):
        add(ledger, f"t{i:02d}", tree.propose(ledger.trials), {9.0: 10.0 + i}, "done")
    tried = [tuple(sorted(trial.values.items())) for trial in ledger.trials.values()]
    assert len(set(tried)) == count
    with pytest.raises(UserError):
        tree.propose(ledger.trials)


def test_the_table_shows_values_distance_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = make(*TRY)
    ledger = open_ledger(tmp_path / "s", plan)
    add(ledger, "t00", {"batch": "8", "optim.g-lr": "1e-3"}, {9.0: 40.0}, "done")
    trial = add(ledger, "t01", {"batch": "16", "optim.g-lr": "2e-3"}, {1.0: 95.0, 3.0: 60.123}, "running")
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    trial.status, trial.started, trial.started_at = "running", 900.0, 1.0
    head, first, second = (line.split() for line in Table(ledger, plan.fields, 9.0).lines())
    assert head == ["trial", "batch", "g-lr", "seed", "kimg", "fd2k_efflite0", "left"]
    assert first == ["t00", "8", "1e-3", "0", "9/9", "40.00", "done"]
    assert second == ["t01", "16", "2e-3", "0", "3/9", "60.12", "running", "5:00"], "2 kimg in 100 s, 6 are left"


def test_a_ledger_in_a_bucket_is_found_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bucket is a folder behind the interface of S3's file system."""
    monkeypatch.setattr(
        "trainer.checkpoints.storage.filesystem", lambda url: (LocalFileSystem(True), f"{tmp_path}/b/s")
    )
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "one"))
    plan = make(*TRY)
    bucket = Bucket("s3://cats/s")
    bucket.make()
    ledger = Ledger(bucket, settings(plan))
    ledger.open("the-sweep")
    add(ledger, "t00", {"batch": "8", "optim.g-lr": "1e-3"}, {9.0: 40.0}, "done")
    add(ledger, "t01", {"batch": "8", "optim.g-lr": "2e-3"}, {1.0: 50.0}, "running")  # not uploaded yet
    ledger.write("sweep.html", b"page")
    assert (tmp_path / "b" / "s" / "sweep.html").read_bytes() == b"page"
    assert list(Ledger(Bucket("s3://cats/s"), settings(plan)).trials) == ["t00", "t01"], "here the longer one counts"

    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "two"))
    assert list(Ledger(Bucket("s3://cats/s"), settings(plan)).trials) == ["t00"]
    ledger.push()
    assert list(Ledger(Bucket("s3://cats/s"), settings(plan)).trials) == ["t00", "t01"]

    (tmp_path / "b" / "s" / "sweep.jsonl").unlink()
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "three"))
    Bucket("s3://cats/s").make()
    other = Ledger(Bucket("s3://cats/s"), settings(plan))
    other.open("another-sweep")
    other.push()
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "one"))
    again = Ledger(Bucket("s3://cats/s"), settings(plan))
    assert (again.id, again.trials) == ("another-sweep", {}), "the bucket has another sweep, though a shorter one"
    assert "the-sweep" in (again.storage.work / "sweep.replaced.jsonl").read_text()

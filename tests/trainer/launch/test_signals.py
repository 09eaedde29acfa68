"""Ctrl-C and SIGTERM: of ``stop_requests`` alone, and sent to all processes of a training, as a terminal does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.checkpoints import checkpoint
from trainer.distributed.context import LocalContext
from trainer.launch.signals import Stopped, stop_requests

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_requests_a_stop(number: signal.Signals, name: str, capsys: pytest.CaptureFixture[str]):
    context, before = LocalContext(), signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stop_requests(context.stop):  # noqa: PT012
        os.kill(os.getpid(), number)
        assert context.request() == "stop"
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err.startswith(f"{name}: saving a checkpoint at the next tick")
    assert signal.getsignal(number) == before
    assert LocalContext().request() is None


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(first: signal.Signals):
    with pytest.raises(KeyboardInterrupt), stop_requests(lambda: None):  # noqa: PT012
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("goes on")


def test_a_second_sigterm_ends_at_once():
    program = "import os; from trainer.launch.signals import stop_requests; from signal import *\n"
    program += "with stop_requests(lambda: os.kill(os.getpid(), SIGTERM)): os.kill(os.getpid(), SIGINT)"
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE).returncode == -signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests(lambda: pytest.fail("asked to stop")):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class Group:
    """``trainer/run.py`` with a process group of its own, which gets signals as from a terminal."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.run_dir, self.log = folder / "a", folder / "log"
        command = [sys.executable, ROOT / "trainer" / "run.py", "--out", folder, "--name", "a", "--track.offline"]
        command += ["--eval.extractor", "efflite0", "--eval.num", "32", "--model.g-width", "8", "--model.d-width", "8"]
        command += ["--batch", "8", "--track.tick-kimg", "0.064", "--kimg", "1000", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def check_end(self, status: int) -> None:
        """It ended with ``status`` after the checkpoint that it tells of, and leaves no process."""
        assert self.process.wait(120) == status, self.said()
        assert "Traceback" not in self.said()
        (name,) = [folder.name for folder in checkpoint.find_all(self.run_dir)]
        kimg = checkpoint.position(name) / 1000
        assert f"stopped after a checkpoint; to continue from {kimg:g} kimg, give --name a\n" in self.said()
        deadline = time.monotonic() + 30
        while self.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def is_alive(self) -> bool:
        """Whether any process of the group is."""
        try:
            self.send(0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    started: list[Group] = []

    def begin(*arguments: object) -> Group:
        started.append(Group(tmp_path, *arguments))
        return started[-1]

    yield begin
    for group in started:
        with contextlib.suppress(ProcessLookupError):
            group.send(signal.SIGKILL)
        group.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_training(start: Callable[..., Group], shards: Path, number: signal.Signals):
    group = start("--data", shards, "--workers", 0, "--loader.workers", 2)
    group.wait_for("left")
    group.send(number)
    group.check_end(128 + number)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_on_ray_saves_a_checkpoint_first(
    start: Callable[..., Group], shards: Path, number: signal.Signals
):
    group = start("--data", shards, "--workers", 2)
    group.wait_for("left")
    group.send(number)
    group.check_end(128 + number)

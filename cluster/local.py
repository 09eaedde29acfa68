"""A Ray cluster on this machine:  python -m cluster.local start|status|stop

    python -m cluster.local start                  one node with all CPUs and GPUs, dashboard on loopback
    python -m cluster.local start --nodes 3        three nodes (raylets) that share the machine's CPUs
    python -m cluster.local status                 its nodes
    python -m cluster.local stop                   end the processes that start began, and no others

Each node is a ``ray start --block`` in a session of its own, so that ``stop`` knows what belongs to this cluster;
``ray stop`` would end every Ray process of the user.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from catgan.command import UserError, run_command, say
from catgan.files import atomic_write

# A short path: Ray puts Unix sockets below it, and their paths may have 107 characters.
DEFAULT_DIR = Path("/tmp") / f"catgan-ray-{os.getuid()}"
# Training puts next to nothing into the object store; Ray's default is 30 % of the memory, per node.
OBJECT_STORE_BYTES = 200 * 2**20
# What Ray appends, session, sockets and all, takes about 75 characters of the 107.
MAX_DIR_BYTES = 32
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Node:
    """A ``ray start --block``. The time tells it from a later process with the same id."""

    pid: int
    created: float


@dataclass(frozen=True)
class Cluster:
    """What ``start`` began; kept in ``cluster.json`` for ``status`` and ``stop``."""

    address: str
    """``host:port`` for RAY_ADDRESS."""
    dashboard: str
    """URL for RAY_API_SERVER_ADDRESS."""
    cpus: int
    """CPUs of each node."""
    nodes: tuple[Node, ...]

    def save(self, folder: Path) -> None:
        atomic_write(folder / "cluster.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def load(folder: Path) -> Cluster | None:
        """The cluster recorded in ``folder``; None if there is none."""
        try:
            values = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        return Cluster(**values | {"nodes": tuple(Node(**node) for node in values["nodes"])})


def start(folder: Path, *, nodes: int = 1, cpus: int | None = None, port: int = 6379, dashboard: int = 8265) -> Cluster:
    """Start a cluster of ``nodes`` raylets with ``cpus`` CPUs each and wait until it takes jobs.

    Ray's state, logs and ``cluster.json`` lie in ``folder``. All GPUs belong to the first node.

    Raises:
        UserError: one runs already, a port is taken, or Ray did not come up; nothing is left running then.
    """
    cpus = cpus or max((os.cpu_count() or 1) // nodes, 1)
    _own(folder)
    if (old := Cluster.load(folder)) and any(_processes(node) for node in old.nodes):
        raise UserError(
            f"a cluster runs already at {old.dashboard}; stop it (python -m cluster.local stop) or give --dir"
        )
    for option, number in (("--port", port), ("--dashboard-port", dashboard)):
        if _taken(number):
            raise UserError(f"{option} {number} is taken by another program; give {option} a free one")
    _make_token()
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", cpus, ())
    head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    more = [f"--address={cluster.address}", "--num-gpus=0"]
    try:
        for i in range(nodes):
            node = _spawn(cluster, folder, i, more if i else head)
            cluster = Cluster(cluster.address, cluster.dashboard, cpus, (*cluster.nodes, node))
            cluster.save(folder)
            _wait_for_nodes(folder, cluster)
    except BaseException:
        stop(folder)
        raise
    return cluster


def stop(folder: Path) -> int:
    """End the processes of the cluster recorded in ``folder``; returns how many there were, 0 if none ran."""
    cluster = Cluster.load(folder)
    if cluster is None:
        return 0
    found = [process for node in cluster.nodes for process in _processes(node)]
    # The first node last: without it the others would wait for it to come back.
    for leader in reversed([process for process in found if process.pid in {node.pid for node in cluster.nodes}]):
        _signal(leader, signal.SIGTERM)
    left = _wait_until_gone(found)
    for process in left:
        _signal(process, signal.SIGKILL)
    left = _wait_until_gone(left)
    assert not left, f"still alive after SIGKILL: {left}"
    (folder / "cluster.json").unlink()
    return len(found)


def nodes_up(cluster: Cluster) -> int:
    """Nodes that Ray's own state calls alive; 0 as long as the dashboard does not answer."""
    command = [RAY, "list", "nodes", f"--address={cluster.dashboard}", "--format=json", "--filter=state=ALIVE"]
    answer = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if answer.returncode or not answer.stdout.startswith(b"["):
        return 0  # Before the first node is there, Ray succeeds and answers in prose.
    return len(json.loads(answer.stdout))


def _spawn(cluster: Cluster, folder: Path, index: int, arguments: list[str]) -> Node:
    # A folder for each node: in a common one, a node clears away the working folder of another's job.
    command = [RAY, "start", "--block", "--disable-usage-stats", f"--temp-dir={folder / f'ray{index}'}"]
    command += [f"--num-cpus={cluster.cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", *arguments]
    with (folder / f"node{index}.log").open("wb") as log:
        # A session of its own: Ctrl-C in this terminal must not reach it, and its members can be found again.
        process = subprocess.Popen(
            command,
            cwd=folder,
            # Ray Train's actors look for the dashboard, and without its address at all of this machine's clusters.
            env=_environment() | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Node(process.pid, psutil.Process(process.pid).create_time())


def _wait_for_nodes(folder: Path, cluster: Cluster) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (up := nodes_up(cluster)) < len(cluster.nodes):
        log = folder / f"node{len(cluster.nodes) - 1}.log"
        if not all(_processes(node) for node in cluster.nodes):
            raise UserError(f"a node ended while starting; the last lines of {log}: {_tail(log)}")
        if time.monotonic() > deadline:
            raise UserError(f"{up} of {len(cluster.nodes)} nodes up after {START_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.5)


def _environment() -> dict[str, str]:
    """What nodes, and through them jobs, see: ``python`` is this Python, and no other cluster is in the way."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    # Nodes listen on every interface of the machine, whatever the dashboard does, and whoever reaches them runs code.
    environment.setdefault("RAY_AUTH_MODE", "token")
    # Who stops this cluster means it: by default a node waits 30 seconds for its jobs to end.
    environment.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    return environment


def _make_token() -> None:
    """Have Ray make the user's token (~/.ray/auth_token) unless there is one, or the environment brings its own."""
    environment = _environment()
    if environment["RAY_AUTH_MODE"] != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys():
        return
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, stdout=subprocess.DEVNULL, check=True)


def _processes(node: Node) -> list[psutil.Process]:
    """The members of a node's session and their descendants (jobs have sessions of their own)."""
    if psutil.pid_exists(node.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(node.pid).create_time() != node.created:
                return []  # The id went to another process, which it cannot while the session has members.
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == node.pid:
                found |= {process, *process.children(recursive=True)}
    return sorted(filter(_alive, found), key=lambda process: process.pid)


def _alive(process: psutil.Process) -> bool:
    """A zombie is not: in a container whose first process does not reap orphans it stays one for ever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of ``processes`` that are still alive after ``STOP_TIMEOUT_S``."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := [process for process in processes if _alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _own(folder: Path) -> None:
    """Make ``folder``, for this user only; refuse somebody else's, which could hold a forged ``cluster.json``."""
    if len(os.fsencode(folder)) > MAX_DIR_BYTES:
        raise UserError(
            f"--dir {folder} is too long for Ray's sockets: give a path of {MAX_DIR_BYTES} characters or less"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as error:
        raise UserError(f"--dir {folder}: {error.strerror}; give a folder you can write to") from None
    if owner != os.getuid():
        raise UserError(f"--dir {folder} belongs to another user; give a folder of your own")


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-400:]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        "python -m cluster.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="start|status|stop")
    for name in ("start", "status", "stop"):
        command = commands.add_parser(name)
        command.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="state and logs (default: %(default)s)")
        if name == "start":
            command.add_argument("--nodes", type=_positive, default=1, help="raylets to start (default: 1)")
            command.add_argument("--cpus", type=_positive, help="CPUs per node (default: the machine's, shared out)")
            command.add_argument("--port", type=_positive, default=6379, help="of the cluster (default: 6379)")
            command.add_argument("--dashboard-port", type=_positive, default=8265, help="default: 8265")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of 1 or more")
    return int(text)


def main(argv: list[str]) -> dict[str, Any]:
    """Run one of the commands; returns the JSON object for stdout."""
    options = _parse(argv)
    folder: Path = options.dir.absolute()
    if options.command == "stop":
        return {"stopped": stop(folder)}
    if options.command == "start":
        say(f"starting {options.nodes} node(s); logs in {folder}")
        cluster: Cluster | None = start(
            folder, nodes=options.nodes, cpus=options.cpus, port=options.port, dashboard=options.dashboard_port
        )
    else:
        cluster = Cluster.load(folder)
    if cluster is None:
        return {"running": False, "dir": str(folder)}
    up = nodes_up(cluster)
    say(f"{up} of {len(cluster.nodes)} node(s) up with {cluster.cpus} CPU(s) each")
    if up:
        say("with .venv activated:")
        say(f"  export RAY_API_SERVER_ADDRESS={cluster.dashboard} RAY_AUTH_MODE={_environment()['RAY_AUTH_MODE']}")
        say("  ray job submit --working-dir . -- python trainer/run.py")
    described = {"address": cluster.address, "dashboard": cluster.dashboard, "cpus": cluster.cpus, "dir": str(folder)}
    return {"running": up > 0, "nodes": up, **described}


if __name__ == "__main__":
    run_command("cluster.local", main)

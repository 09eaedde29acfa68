"""A Ray cluster on this machine.

python -m cluster.local start              one node with all CPUs and GPUs, dashboard on loopback
python -m cluster.local start --nodes 3    three nodes (raylets) that share the machine's CPUs
python -m cluster.local status             show whether its nodes are up
python -m cluster.local stop               end the processes of this cluster, and no others
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from catgan.command import Parser, UserError, dispatch, number, run_command, say
from catgan.files import atomic_write
from catgan.location import local_path
from catgan.machine import shorten_tmpdir, spin_less

NAME = "python -m cluster.local"
# A short path, since Ray puts Unix sockets below it, whose paths are limited to 107 bytes.
DEFAULT_DIR = Path("/tmp") / f"catgan-ray-{os.getuid()}"
MAX_DIR_BYTES = 32  # Ray appends about 75 bytes
# Training stores almost nothing in the object store; Ray's default is 30 % of the memory, per node.
OBJECT_STORE_BYTES = 200 * 2**20
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Node:
    """A process ``ray start --block`` in a session of its own, by which ``stop`` finds its processes.

    ``ray stop`` is not used, since it ends every Ray process of the user.

    Attributes:
        pid: its process id, which is also the id of its session.
        created: its start time, which distinguishes it from a later process with the same id.
    """

    pid: int
    created: float


@dataclass(frozen=True)
class Cluster:
    """A cluster that ``start`` started, recorded in ``cluster.json`` for ``status`` and ``stop``.

    Attributes:
        address: ``host:port`` for RAY_ADDRESS.
        dashboard: URL for RAY_API_SERVER_ADDRESS.
        cpus: CPUs per node.
        nodes: the head first.
    """

    address: str
    dashboard: str
    cpus: int
    nodes: tuple[Node, ...]

    def save(self, folder: Path) -> None:
        atomic_write(folder / "cluster.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def load(folder: Path) -> Cluster | None:
        """The cluster recorded in ``folder``, or None. Raises UserError if the folder is another user's."""
        if folder.exists():
            _check_owner(folder)
        try:
            values = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        return Cluster(**values | {"nodes": tuple(Node(**node) for node in values["nodes"])})


def start(folder: Path, *, nodes: int = 1, cpus: int | None = None, port: int = 6379, dashboard: int = 8265) -> Cluster:
    """Start a cluster and wait until it accepts jobs.

    Args:
        folder: for ``cluster.json``, Ray's state and logs.
        nodes: number of raylets. All GPUs belong to the first one.
        cpus: CPUs per node; by default the nodes share those of the machine.
        port: of the cluster, on 127.0.0.1.
        dashboard: the dashboard's port.

    Raises:
        UserError: a cluster is running already, a port is in use, or Ray did not start. No process is left running.
    """
    cpus = cpus or max((os.cpu_count() or 1) // nodes, 1)
    _make_folder(folder)
    if (old := Cluster.load(folder)) and any(_processes(node) for node in old.nodes):
        raise UserError(f"a cluster is running already at {old.dashboard}; stop it ({NAME} stop) or give --dir")
    for option, value in (("--port", port), ("--dashboard-port", dashboard)):
        if _is_in_use(value):
            raise UserError(f"{option} {value} is in use by another program; give {option} a free port")
    _make_token()
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", cpus, ())
    head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    others = [f"--address={cluster.address}", "--num-gpus=0"]
    try:
        for i in range(nodes):
            node = _start_node(cluster, folder, i, others if i else head)
            cluster = replace(cluster, nodes=(*cluster.nodes, node))
            cluster.save(folder)
            _wait_for_nodes(folder, cluster)
    except BaseException:
        stop(folder)
        raise
    return cluster


def stop(folder: Path) -> int:
    """End the processes of the cluster recorded in ``folder``. Returns their number, 0 if no cluster was running."""
    cluster = Cluster.load(folder)
    if cluster is None:
        return 0
    found = [process for node in cluster.nodes for process in _processes(node)]
    # The head last: without it the other nodes would wait for it to return.
    for leader in reversed([process for process in found if process.pid in {node.pid for node in cluster.nodes}]):
        _signal(leader, signal.SIGTERM)
    left = _wait_until_ended(found)
    for process in left:
        _signal(process, signal.SIGKILL)
    left = _wait_until_ended(left)
    assert not left, f"still running after SIGKILL: {left}"
    (folder / "cluster.json").unlink()
    return len(found)


def nodes_up(cluster: Cluster) -> int:
    """The number of nodes that Ray reports as alive; 0 while the dashboard does not answer."""
    command = [RAY, "list", "nodes", f"--address={cluster.dashboard}", "--format=json", "--filter=state=ALIVE"]
    answer = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if answer.returncode or not answer.stdout.startswith(b"["):
        return 0  # before the first node is registered, Ray succeeds with a text that is not JSON
    return len(json.loads(answer.stdout))


def _start_node(cluster: Cluster, folder: Path, index: int, arguments: list[str]) -> Node:
    # A folder per node: nodes that share one delete the working folders of each other's jobs.
    command = [RAY, "start", "--block", "--disable-usage-stats", f"--temp-dir={folder / f'ray{index}'}"]
    command += [f"--num-cpus={cluster.cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", *arguments]
    # Any free port: without its agent, whose port another Ray on this machine may have, a node starts no jobs.
    command.append("--dashboard-agent-listen-port=0")
    with (folder / f"node{index}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            # Ray Train's actors look for the dashboard; without an address they ask every cluster on this machine.
            env=_environment() | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in this terminal does not reach it, and `stop` finds its processes
        )
    return Node(process.pid, _start_of(process.pid))


def _start_of(pid: int) -> float:
    """When a process was started: on Linux in ticks since the machine was, which setting the clock does not change."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return psutil.Process(pid).create_time()
    return float(stat.rpartition(")")[2].split()[19])  # field 22; the name in parentheses may contain anything


def _wait_for_nodes(folder: Path, cluster: Cluster) -> None:
    """Wait until all nodes are up. Raises ``UserError`` if one ends or does not come up in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (up := nodes_up(cluster)) < len(cluster.nodes):
        log = folder / f"node{len(cluster.nodes) - 1}.log"
        if not all(_processes(node) for node in cluster.nodes):
            tail = " ".join(log.read_text(errors="replace").split())[-400:]
            raise UserError(f"a node ended while starting; the end of {log}: {tail}")
        if time.monotonic() > deadline:
            raise UserError(f"{up} of {len(cluster.nodes)} nodes are up after {START_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.5)


def _environment() -> dict[str, str]:
    """The environment of the nodes and of their jobs: ``python`` is this Python, and no other cluster is configured."""
    shorten_tmpdir()  # the dashboard of a node uses sockets there
    spin_less()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    # Unlike the dashboard, nodes listen on every interface of the machine, and a connection can run code.
    environment.setdefault("RAY_AUTH_MODE", "token")
    # By default a node that is stopped waits 30 seconds for its jobs to end.
    environment.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    # `ray job stop` kills a job after this time, by default 3 seconds; a training needs time for a checkpoint.
    environment.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "60")
    return environment


def _make_token() -> None:
    """Create the user's token (~/.ray/auth_token) unless it exists or the environment has one."""
    environment = _environment()
    if environment["RAY_AUTH_MODE"] != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys():
        return
    command = [RAY, "get-auth-token", "--generate"]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"Ray cannot make a token in ~/.ray ({reason}); set RAY_AUTH_TOKEN_PATH to a file of yours that holds one"
        )


def _processes(node: Node) -> list[psutil.Process]:
    """The processes of a node's session and their descendants (jobs have sessions of their own)."""
    if psutil.pid_exists(node.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            # An earlier version recorded the time.
            if node.created not in (_start_of(node.pid), psutil.Process(node.pid).create_time()):
                return []  # another process has the id now, which is impossible while the session has processes
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == node.pid:
                found |= {process, *process.children(recursive=True)}
    return sorted(filter(_is_running, found), key=lambda process: process.pid)


def _is_running(process: psutil.Process) -> bool:
    """False for a zombie: in a container whose first process does not reap orphans it remains for ever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until_ended(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of ``processes`` that are still running after ``STOP_TIMEOUT_S``."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := [process for process in processes if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _is_in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _make_folder(folder: Path) -> None:
    """Make ``folder`` for this user only. Raises UserError."""
    if len(os.fsencode(folder)) > MAX_DIR_BYTES:
        raise UserError(f"--dir {folder} is too long for Ray's sockets: give a path of at most {MAX_DIR_BYTES} bytes")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir {folder}: {error.strerror}; give a folder you can write to") from None
    _check_owner(folder)


def _check_owner(folder: Path) -> None:
    """Refuse another user's folder: its ``cluster.json`` could be forged, to get this user's token, or to end any of
    this user's processes."""
    if folder.lstat().st_uid != os.getuid():
        raise UserError(f"--dir {folder} belongs to another user; give a folder of your own")


def _parser(command: str, description: str) -> Parser:
    parser = Parser(f"{NAME} {command}", description)
    parser.add_argument("--dir", type=local_path, default=DEFAULT_DIR, help="state and logs (default: %(default)s)")
    return parser


def _start(argv: list[str]) -> dict[str, Any]:
    parser = _parser("start", "Start a Ray cluster on this machine and wait until it accepts jobs.")
    port = number(int, 1, 65535)
    parser.add_argument("--nodes", type=number(int, 1, 100), default=1, help="raylets to start (default: 1)")
    parser.add_argument("--cpus", type=number(int, 1, 10_000), help="CPUs per node (default: the machine's, shared)")
    parser.add_argument("--port", type=port, default=6379, help="of the cluster (default: 6379)")
    parser.add_argument("--dashboard-port", type=port, default=8265, help="default: 8265")
    options = parser.parse_args(argv)
    folder = options.dir.absolute()
    say(f"starting {options.nodes} node(s); logs in {folder}")
    cluster = start(folder, nodes=options.nodes, cpus=options.cpus, port=options.port, dashboard=options.dashboard_port)
    return _report(cluster, folder)


def _status(argv: list[str]) -> dict[str, Any]:
    options = _parser("status", "Show whether the cluster's nodes are up.").parse_args(argv)
    folder = options.dir.absolute()
    cluster = Cluster.load(folder)
    return _report(cluster, folder) if cluster else {"running": False, "dir": str(folder)}


def _stop(argv: list[str]) -> dict[str, Any]:
    options = _parser("stop", "End the processes of the cluster, and no others.").parse_args(argv)
    return {"stopped": stop(options.dir.absolute())}


def _report(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Say how many nodes are up and how to submit a job. Returns the JSON object for stdout."""
    up = nodes_up(cluster)
    say(f"{up} of {len(cluster.nodes)} node(s) up with {cluster.cpus} CPU(s) each")
    if up:
        say("with .venv activated:")
        say(f"  export RAY_API_SERVER_ADDRESS={cluster.dashboard} RAY_AUTH_MODE={_environment()['RAY_AUTH_MODE']}")
        say("  ray job submit --working-dir . -- python trainer/run.py")
    described = {"address": cluster.address, "dashboard": cluster.dashboard, "cpus": cluster.cpus, "dir": str(folder)}
    return {"running": up > 0, "nodes": up, **described}


def main(argv: list[str]) -> dict[str, Any]:
    """Run one of the commands. Returns the JSON object for stdout."""
    return dispatch(NAME, __doc__, {"start": _start, "status": _status, "stop": _stop}, argv)


if __name__ == "__main__":
    run_command("cluster.local", main)

"""Connecting to a Ray cluster, or starting one on this machine. What goes wrong is one line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from catgan.command import UserError
from catgan.machine import cores, shorten_tmpdir

Workers = int | tuple[int, int]
"""A number of workers, or the minimum and maximum of an elastic training."""

# Switch off Ray's deduplicated and coloured log lines, Ray Train's second copy of each print, and metrics without a
# reader. A snapshot waits until its report is collected, up to the health check interval (Ray's default: two seconds);
# a shorter interval wakes several processes more often, which slows down workers on CPUs.
_ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}

_PROBE_SECONDS = 5.0
_LINES_OF_LOG = 10  # a message of Ray's own is shorter


def cluster_address() -> str | None:
    """RAY_ADDRESS, which is set in submitted jobs; None: Ray would start a cluster on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address not in ("", "local") else None


def connect_ray(workers: Workers, show_logs: bool = True) -> None:
    """Connect to the cluster at RAY_ADDRESS. Without one, start a cluster on this machine that ends with this process.
    Does nothing if this process is connected.

    Args:
        show_logs: print what workers print.

    Raises:
        UserError: there is no such cluster, or it refuses; no cluster can be started here; it is too small.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _connect(most, show_logs)
    import ray

    resources = ray.cluster_resources()
    unit = resource_unit()
    available = int(resources.get(unit, 0))
    if available < least:  # Ray Train would wait for them silently
        raise UserError(f"--workers {least}: the Ray cluster has {available} {unit}s; ask for fewer or add nodes")


def cluster_gpus() -> int:
    """Number of GPUs of the Ray cluster at RAY_ADDRESS. Raises UserError, see ``connect_ray``."""
    connect_ray(0)
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def resource_unit() -> str:
    """What a worker needs one of: "GPU" if the cluster has any, else "CPU"."""
    import ray

    return "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"


def _connect(max_workers: int, show_logs: bool = True) -> None:
    address = cluster_address()
    if address is not None:
        # Attempts of a second to reach the cluster, whose address is tried before: each one writes to stderr.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is not None:
        _join(address, show_logs)
    else:
        _start(max_workers, show_logs)
    # As of a process without a handler. Ray's handler exits with 15.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _join(address: str, show_logs: bool) -> None:
    import ray

    problem = f"no connection to a Ray cluster at RAY_ADDRESS={address}"
    advice = (
        "give HOST:PORT of a running cluster's head, such as head:6379, or unset RAY_ADDRESS to start a cluster on this"
        " machine"
    )
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} is not the address of a cluster's head: {advice}; the dashboard's address (http://)"
            " is for `ray job submit` and belongs in RAY_API_SERVER_ADDRESS, and Ray Client (ray://) cannot train"
        )
    _check_answers(address, problem, advice)
    with _as_user_error(problem, f"{advice}; Ray and Python must have its versions, and RAY_AUTH_MODE=token its token"):
        ray.init(address, logging_level=logging.ERROR, log_to_driver=show_logs)


def _check_answers(address: str, problem: str, advice: str) -> None:
    """Check within seconds that a cluster can be reached at ``address`` and that this machine is part of it: Ray would
    try for minutes.

    Raises:
        UserError: it cannot.
    """
    import grpc
    from ray._private import services

    try:
        target = services.canonicalize_bootstrap_address(address) or ""  # "auto" finds a cluster of this machine
        host, _, port = target.rpartition(":")
        socket.create_connection((host.strip("[]"), port), _PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{problem} ({reason}): {advice}") from error
    if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
        channel = grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)])
        try:
            grpc.channel_ready_future(channel).result(_PROBE_SECONDS)
        except grpc.FutureTimeoutError:
            raise UserError(f"{problem} (another program answers there): {advice}") from None
        finally:
            channel.close()
    if not services.find_node_ids():
        raise UserError(
            f"{problem} (this machine is not one of its nodes): start the training on one, with `ray job submit`, or"
            f" add this machine, with `ray start --address={address}`"
        )


def _start(max_workers: int, show_logs: bool) -> None:
    import ray

    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not preempted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ray Train's actors query the dashboard. Without an address they search for one among all clusters of this machine,
    # and fail if they find that of another training, too.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    shorten_tmpdir("/ray/session_2000-12-31_23-59-59_123456_1234567/sockets/plasma_store.1")
    advice = "--workers 0 trains without it; RAY_TMPDIR names another folder for its files"
    with _as_user_error("Ray cannot be started on this machine", advice), _without_sigterm():
        ray.init(
            "local",  # without it Ray would join a cluster that `ray start` has started here
            dashboard_port=port,
            num_cpus=max(cores(), max_workers),
            object_store_memory=200 << 20,  # no large objects are stored; the default is a third of the memory
            include_dashboard=True,  # on loopback; without it Ray Train logs every second that it is missing
            logging_level=logging.ERROR,
            log_to_driver=show_logs,
        )


@contextlib.contextmanager
def _without_sigterm() -> Iterator[None]:
    """Processes that are started inside the block inherit that SIGTERM is blocked, as Ray does with SIGINT itself. So
    Ray lives until the training has saved a checkpoint, if all processes get the signal (``scancel``,
    ``systemctl stop``). Ray ends its processes with SIGKILL where SIGTERM does not, some seconds later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _as_user_error(problem: str, advice: str) -> Iterator[None]:
    """Raise what ``ray.init`` raises as UserError. Ray's core writes to stderr meanwhile, which is dropped."""
    with tempfile.TemporaryFile() as log:
        try:
            with _stderr_in(log):
                yield
        except (Exception, SystemExit) as error:  # of many types; Exception itself if the dashboard does not start
            log.seek(0)
            reason = "wrong or missing token" if b"InvalidAuthToken" in log.read() else _reason(error)
            raise UserError(f"{problem} ({reason}): {advice}") from error


@contextlib.contextmanager
def _stderr_in(file: IO[bytes]) -> Iterator[None]:
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _reason(error: BaseException) -> str:
    """What an error of ``ray.init`` says in its innermost cause, in one line; of a log or traceback the last line."""
    while error.__cause__ and error.__cause__ is not error:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(" ".join(lines if len(lines) < _LINES_OF_LOG else lines[-1:]).split())[:300]

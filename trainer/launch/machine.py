"""Whether this machine has what a training needs, before anything starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from catgan.command import UserError
from catgan.files import cache_path
from catgan.location import local_path
from trainer.checkpoints.storage import Bucket, Storage
from trainer.features import opennsfw
from trainer.features.extractors import MIN_FID, OFFLINE
from trainer.features.networks import INCEPTION
from trainer.features.weights import INCEPTION_SHA256, Unavailable, find_inception, sha256
from trainer.launch.options import Options


def check_machine(options: Options, storage: Storage, elsewhere: bool) -> None:
    """Check that this machine has what training needs: folders to write in, weights of the metric network. Writes
    nothing, except that it downloads weights for a training that cannot do without.

    Args:
        elsewhere: training runs on a cluster, whose machines may have other files.

    Raises:
        UserError: something is missing.
    """
    _check_writable(cache_path(), "the cache folder", "set CATGAN_CACHE to another")
    if not isinstance(storage, Bucket):
        _check_writable(storage.work, "the run's folder", "give another --out")
    if options.loader.cache:
        _check_writable(local_path(options.loader.cache), "--loader.cache", "give another folder")
    if not elsewhere:
        _check_metric_network(options)


def _check_writable(folder: Path, what: str, advice: str) -> None:
    """Try to create a file in ``folder``, or in the nearest folder above it that exists."""
    try:
        while not folder.exists():
            folder = folder.absolute().parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {what}: {folder} ({error.strerror}); {advice}") from error


def _check_metric_network(options: Options) -> None:
    wanted = options.eval
    is_named = bool(wanted.weights or os.environ.get("CATGAN_INCEPTION_WEIGHTS"))
    if wanted.extractor == "opennsfw":
        opennsfw.find_weights("--eval.extractor opennsfw")
    if wanted.extractor == "auto" and options.projected.weight and not is_named:
        opennsfw.find_weights("--projected.weight without --eval.weights")
    is_too_few = wanted.extractor == "auto" and not wanted.weights and wanted.num < MIN_FID
    if wanted.extractor in OFFLINE or is_too_few:
        return
    if not is_named and (wanted.extractor == "auto" or options.dry_run):
        return  # it is downloaded if need be
    try:
        path = find_inception(wanted.weights)
    except Unavailable as reason:
        raise UserError(f"--eval.extractor inception: no weights ({reason}); give --eval.weights or another") from None
    if sha256(path) != INCEPTION_SHA256:
        INCEPTION.load(path)  # raises UserError
    elif wanted.num < MIN_FID:
        raise UserError(
            f"--eval.num {wanted.num}: FID needs at least {MIN_FID}; give more, or --eval.extractor efflite0"
        )

"""``catexport``: write a trained generator as one ONNX file.

PyTorch is imported after the arguments are checked, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from catgan.command import UserError, run_command
from export.options import NAME, Options, parse


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catexport`` with these arguments. Returns the JSON object for stdout."""
    options = parse(argv)
    uri = _mlflow_uri(options) if options.needs_mlflow else None
    if options.web is not None:
        from export.page import check_folder, write_page

        check_folder(options.web)
        if options.source.endswith(".onnx"):
            write_page(Path(options.source), options.web)
            return {"web": str(options.web)}
    from export.pipeline import run

    return run(options, uri)


def _mlflow_uri(options: Options) -> str:
    """MLflow's tracking server, which is known to respond."""
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "which MLflow? Give --tracking-uri (http://HOST:PORT, sqlite:///PATH.db) or MLFLOW_TRACKING_URI"
        )
    from trainer.tracking.server import check_reachable, resolve_uri

    uri = resolve_uri(uri, Path())
    check_reachable(uri)
    return uri


def entry() -> None:
    # As Ctrl-C, so that temporary folders are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(NAME, main)

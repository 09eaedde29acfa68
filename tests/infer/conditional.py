"""Tiny class-conditional ONNX generators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from infer.latents import latents
from infer.session import Generator
from tests.infer.conftest import SIZE, Z_DIM, build

NAMES = ("black", "tabby", "white")
OFFSETS = np.random.default_rng(5).standard_normal((8, Z_DIM)).astype(np.float32)
"""What a label adds to z: an image of ``conditional()`` is that of ``build()`` for ``z + OFFSETS[label]``."""


def conditional(
    names: Sequence[str] = NAMES,
    *,
    psi: bool = False,
    label: str = "label",
    kind: int = TensorProto.INT64,
    dims: Sequence[int | str] | None = ("batch",),
    place: int = 1,
    entry: str | None = "names",
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """The tiny generator with an embedding of labels, and with ``psi`` a second input that scales z after it.

    ``label``, ``kind``, ``dims`` and ``place`` make the input invalid in one way each. ``entry`` is the text of the
    entry "classes"; None for none; "names" for the list of ``names``.
    """
    model = build()
    graph = model.graph
    if psi:
        graph.input.append(helper.make_tensor_value_info("psi", TensorProto.FLOAT, []))
    graph.input.insert(place, helper.make_tensor_value_info(label, kind, dims))
    nodes = list(graph.node)
    del graph.node[:]
    graph.initializer.append(numpy_helper.from_array(OFFSETS, "offsets"))
    graph.node.append(helper.make_node("Cast", [label], ["index"], to=TensorProto.INT64))
    graph.node.append(helper.make_node("Gather", ["offsets", "index"], ["offset"]))
    graph.node.append(helper.make_node("Add", ["z", "offset"], ["sum"]))
    if psi:
        graph.node.append(helper.make_node("Mul", ["sum", "psi"], ["scaled"]))
    nodes[0].input[0] = "scaled" if psi else "sum"
    graph.node.extend(nodes)
    given = {} if entry is None else {"classes": json.dumps(names) if entry == "names" else entry}
    helper.set_model_props(model, {"z_dim": str(Z_DIM), "size": str(SIZE), **given, **(metadata or {})})
    return model


def write(folder: Path, *args: Any, **options: Any) -> Path:
    """The file ``cats.onnx`` in ``folder`` with ``conditional(...)``."""
    path = folder / "cats.onnx"
    path.write_bytes(conditional(*args, **options).SerializeToString())
    return path


def expected(onnx_file: Path, seeds: Sequence[int], labels: Sequence[int] | int, psi: float = 1.0) -> np.ndarray:
    """What the conditional generator makes, by ``onnx_file``, the unconditional one."""
    return Generator(onnx_file, "cpu")(latents(seeds, Z_DIM) * np.float32(psi) + OFFSETS[labels])

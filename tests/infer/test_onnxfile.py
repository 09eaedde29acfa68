from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infer import onnxfile
from infer.command import UserError
from infer.onnxfile import read_model


def test_every_path_to_a_tensor_is_known() -> None:
    """The hand-written table against the schema of the installed onnx package."""
    messages = {d.full_name: d for d in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()}

    def nested(name: str) -> dict[int, str]:
        fields = messages[name].fields
        return {
            f.number: f.message_type.full_name
            for f in fields
            if f.message_type and f.message_type.full_name in messages
        }

    leading = {"onnx.TensorProto"}
    while grown := {m for m in messages if m not in leading and leading & set(nested(m).values())}:
        leading |= grown
    short = {name: name.removeprefix("onnx.").removesuffix("Proto") for name in leading}
    expected = {short[m]: {n: short[t] for n, t in nested(m).items() if t in leading} for m in leading}
    assert expected == onnxfile._NESTED


def test_returns_the_bytes_of_the_file(onnx_file: Path) -> None:
    assert read_model(onnx_file) == onnx_file.read_bytes()


@pytest.mark.parametrize("length", [0, 1, 10, 100, -1])
def test_a_file_cut_short_is_refused(onnx_file: Path, length: int) -> None:
    onnx_file.write_bytes(onnx_file.read_bytes()[:length])
    with pytest.raises(UserError, match="not an ONNX model, or cut short"):
        read_model(onnx_file)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"\x80\x02}q", b"\xff" * 99, b"\0" * 9],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an ONNX model"):
        read_model(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_model(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="not a file"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_model(tmp_path / ("x" * 300))


def test_a_file_too_large_is_refused_unread(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxfile, "MAX_BYTES", onnx_file.stat().st_size - 1)
    with pytest.raises(UserError, match="below 2 GiB"):
        read_model(onnx_file)


def _in_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def _in_constant(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_branch(model: onnx.ModelProto, tensor: TensorProto) -> None:
    branch = helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["condition"], ["c"], then_branch=branch, else_branch=branch))


def _in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("local", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))


@pytest.mark.parametrize("place", [_in_initializer, _in_constant, _in_branch, _in_function])
@pytest.mark.parametrize("external", [True, False])
def test_external_tensors_are_found_anywhere(
    onnx_file: Path, place: Callable[[onnx.ModelProto, TensorProto], None], external: bool
) -> None:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "t")
    if external:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
    model = onnx.load_model(onnx_file)
    place(model, tensor)
    onnx_file.write_bytes(model.SerializeToString())
    if external:
        with pytest.raises(UserError, match="keeps weights in other files"):
            read_model(onnx_file)
    else:
        read_model(onnx_file)

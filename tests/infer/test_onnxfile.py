from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from catgan.command import UserError
from infer import onnxfile
from infer.onnxfile import read_model


def test_every_message_is_walked_or_refused_or_known_to_be_harmless() -> None:
    """The hand-written tables against the schema of the installed onnx package: a new kind of message that could
    hold a tensor or a graph must be decided about."""
    messages = {
        d.full_name.removeprefix("onnx."): d for d in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()
    }
    messages |= {f"TypeProto.{nested.name}": nested for nested in messages["TypeProto"].nested_types} | {
        "TensorShapeProto.Dimension": messages["TensorShapeProto"].nested_types[0]
    }

    def schema_name(name: str) -> str:
        first, dot, rest = name.partition(".")
        return name + "Proto" if name + "Proto" in messages else f"{first}Proto{dot}{rest}" if dot else name

    # Declarations and notes: neither tensors nor graphs are in them.
    harmless = {"StringStringEntryProto", "ValueInfoProto", "TypeProto", "TensorAnnotation", "OperatorSetIdProto"}
    harmless |= {"DeviceConfigurationProto", "NodeDeviceConfigurationProto", "TensorProto.Segment"}
    for name, walked in onnxfile._NESTED.items():
        for f in messages[schema_name(name)].fields:
            if f.message_type is None:
                assert f.number not in walked
                continue
            target = f.message_type.full_name.removeprefix("onnx.")
            if f.number in walked:
                assert target == schema_name(walked[f.number]), (name, f.name)
            else:
                assert (name, f.number) in onnxfile._REFUSED or target in harmless, (name, f.name)


def test_returns_the_bytes_of_the_file(onnx_file: Path) -> None:
    assert read_model(onnx_file).data == onnx_file.read_bytes()


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


@pytest.mark.parametrize("place", [_in_initializer, _in_constant])
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


def _loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def _function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("local", "f", ["a"], ["b"], [node], [helper.make_opsetid("", 17)]))


def _training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.append(2**60)


def _sequence(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))


def _hollow(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="h", data_type=TensorProto.FLOAT, dims=[2**20, 2**20]))


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="h", data_type=TensorProto.FLOAT, dims=[-1, -1]))


def _many_nodes(model: onnx.ModelProto) -> None:
    model.graph.node.extend([helper.make_node("Neg", ["a"], ["b"])] * (onnxfile.MAX_NODES + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_loop, "graphs inside operators"),
        (_function, "functions of its own"),
        (_training, "training steps"),
        (_sparse, "sparse weights"),
        (_sequence, "no tensors"),
        (_hollow, r"tensor 'h' declares the shape \[1048576, 1048576\], but does not hold"),
        (_negative, r"tensor 'h' declares the shape \[-1, -1\]"),
        (_many_nodes, "more than 10,000 operators"),
    ],
)
def test_what_no_generator_needs_is_refused(
    onnx_file: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = onnx.load_model(onnx_file)
    change(model)
    onnx_file.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=message):
        read_model(onnx_file)


@pytest.mark.parametrize(
    "content",
    [
        b"\x08\x08" * 1_000_000,  # the IR version, again and again
        onnxfile._bytes(7, onnxfile._bytes(1, b"") * 1_000_000),  # empty nodes
        onnxfile._bytes(7, onnxfile._bytes(5, onnxfile._bytes(1, b"\1" * 1_000_000))),  # packed dimensions
    ],
)
def test_reading_costs_little_whatever_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no generator is that large"):
        read_model(path)


def test_a_graph_in_two_parts_is_refused(onnx_file: Path) -> None:
    """protobuf would merge them: the second could add dimensions to what the first holds."""
    onnx_file.write_bytes(onnx_file.read_bytes() * 2)
    with pytest.raises(UserError, match="Model has field 7 twice"):
        read_model(onnx_file)


def test_a_field_of_another_kind_does_not_hide_the_operator(onnx_file: Path) -> None:
    """protobuf passes over a type of 8 bytes that is not text; so must we, or it would disguise the one before."""
    disguise = onnxfile._encoded(4 << 3 | 1) + b"Identity"
    node = onnxfile._texts((1, "a"), (2, "b"), (4, "RandomNormalLike")) + disguise
    onnx_file.write_bytes(onnxfile._bytes(7, onnxfile._bytes(1, node)))
    assert onnx.load_model(onnx_file).graph.node[0].op_type == "RandomNormalLike"
    assert read_model(onnx_file).nodes[0].op_type == "RandomNormalLike"


def test_the_outline_is_small_and_infers_every_shape(onnx_file: Path) -> None:
    outline = onnx.load_from_string(read_model(onnx_file).outline)
    assert [i.name for i in outline.graph.initializer] == ["shape"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in outline.graph.input}
    assert shapes == {"z": [1, 16], "w": [16, 64], "k": [4, 3, 4, 4]}
    assert {"floats", "flat", "small", "large", "image"} < {o.name for o in outline.graph.output}

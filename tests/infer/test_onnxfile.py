from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product, starmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from catgan.command import UserError
from infer import onnxfile
from infer.onnxfile import read_model

ONNX = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
# Messages without tensors or graphs in them, which need not be decoded.
HARMLESS = {
    *("TypeProto", "ValueInfoProto", "TensorAnnotation", "OperatorSetIdProto", "StringStringEntryProto"),
    *("TensorProto.Segment", "DeviceConfigurationProto", "NodeDeviceConfigurationProto"),
}


def _descriptor(message: str) -> Any:
    """The installed onnx package's description of a message of ``onnxfile``."""
    first, *inner = message.split(".")
    found = ONNX[f"{first}Proto"] if f"{first}Proto" in ONNX else ONNX["TypeProto"].nested_types_by_name[first]
    return found.nested_types_by_name[inner[0]] if inner else found


@pytest.mark.parametrize("message", onnxfile._FIELDS)
def test_the_schema_is_that_of_onnx(message: str) -> None:
    fields = _descriptor(message).fields_by_number
    for number, (name, kind) in onnxfile._FIELDS[message].items():
        field = fields[number]
        assert field.name == name or (message, name) == ("TensorShape.Dimension", "value")
        is_list = field.is_repeated
        if kind in onnxfile._FIELDS:
            assert field.message_type == _descriptor(kind)
            assert (name in onnxfile._ONCE) is not is_list
        elif kind == "str":
            assert field.type == field.TYPE_STRING
        elif kind != "bytes":
            assert field.type in (field.TYPE_INT32, field.TYPE_INT64, field.TYPE_ENUM)
            assert (kind == "ints") is is_list


@pytest.mark.parametrize("message", onnxfile._FIELDS)
def test_every_inner_message_is_decoded_or_refused_or_harmless(message: str) -> None:
    """A field of a newer onnx package that could hold a tensor or a graph must be added to the schema."""
    for number, field in _descriptor(message).fields_by_number.items():
        if field.message_type is not None and number not in onnxfile._REFUSED.get(message, ()):
            name = field.message_type.full_name.removeprefix("onnx.")
            assert number in onnxfile._FIELDS[message] or name in HARMLESS, field.full_name


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


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_model(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="not a file"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_model(tmp_path / ("x" * 300))


def test_a_file_that_is_too_large_is_refused_unread(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (_sequence, "not tensors"),
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
        onnxfile._field(7, onnxfile._field(1, b"") * 1_000_000),  # empty nodes
        onnxfile._field(7, onnxfile._field(5, onnxfile._field(1, b"\1" * 1_000_000))),  # packed dimensions
    ],
)
def test_time_and_memory_of_reading_are_bounded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no generator is that large"):
        read_model(path)


def test_a_graph_in_two_parts_is_refused(onnx_file: Path) -> None:
    """protobuf would merge them: the second part could add dimensions to a shape of the first."""
    onnx_file.write_bytes(onnx_file.read_bytes() * 2)
    with pytest.raises(UserError, match="Model has field 7 twice"):
        read_model(onnx_file)


def test_a_field_of_another_wire_type_does_not_hide_the_operator(onnx_file: Path) -> None:
    """protobuf ignores an operator type of 8 bytes that is not text. If it counted here, it would hide the real one."""
    disguise = onnxfile._encoded(4 << 3 | 1) + b"Identity"
    node = b"".join(starmap(onnxfile._field, ((1, "a"), (2, "b"), (4, "RandomNormalLike")))) + disguise
    onnx_file.write_bytes(onnxfile._field(7, onnxfile._field(1, node)))
    assert onnx.load_model(onnx_file).graph.node[0].op_type == "RandomNormalLike"
    assert read_model(onnx_file).nodes[0].op_type == "RandomNormalLike"


def _file(extra: dict[str, bytes]) -> bytes:
    """A file with one message of each kind; ``extra`` is appended to the messages of its keys."""
    inner = dict.fromkeys(onnxfile._FIELDS, b"") | extra

    def message(kind: str, *fields: tuple[int, int | str | bytes]) -> bytes:
        return b"".join(starmap(onnxfile._field, fields)) + inner[kind]

    tensor = message("Tensor", (1, 2), (2, TensorProto.FLOAT), (8, "t"), (9, bytes(400)))
    attribute = message("Attribute", (1, "kernel_shape"), (5, tensor), (8, 3), (8, 5))
    node = message("Node", (1, "z"), (2, "image"), (4, "Conv"), (5, attribute), (7, ""))
    shape = message("TensorShape", (1, message("TensorShape.Dimension", (1, 7))))
    value = message("ValueInfo", (1, "z"), (2, message("Type", (1, message("Type.Tensor", (1, 1), (2, shape))))))
    graph = message("Graph", (1, node), (5, tensor), (11, value), (12, value))
    entry = message("StringStringEntry", (1, "size"), (2, "8"))
    return message("Model", (1, 8), (7, graph), (8, onnxfile._field(2, 17)), (14, entry))


@pytest.mark.parametrize("message", onnxfile._FIELDS)
def test_any_further_field_is_refused_or_read_as_protobuf_reads_it(tmp_path: Path, message: str) -> None:
    """What onnxruntime sees is what is checked here, for each field number and wire type in each message."""
    path, accepted = tmp_path / "gen.onnx", 0
    contents = [(0, onnxfile._encoded(i)) for i in (0, 1, 2, 2**32, 2**63)] + [(1, bytes(8)), (5, bytes(4))]
    contents += [(2, onnxfile._encoded(len(c)) + c) for c in (b"", b"\0", b"\2\1", b"\x08\0", b"z")]
    for number, (wire_type, content) in product(range(1, 30), contents):
        data = _file({message: onnxfile._encoded(number << 3 | wire_type) + content})
        path.write_bytes(data)
        try:
            theirs, ours = onnx.load_from_string(data), read_model(path)
        except (DecodeError, UserError):
            continue
        accepted += 1
        graph, outline = theirs.graph, onnx.load_from_string(ours.outline)
        read = [(n.op_type, n.domain, n.inputs, n.outputs) for n in ours.nodes]
        assert read == [(n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node]
        kernels = [[max(i, 1) for a in n.attribute if a.name == "kernel_shape" for i in a.ints] for n in graph.node]
        assert [n.kernel_area for n in ours.nodes] == list(map(math.prod, kernels))
        assert ours.shapes == {t.name: list(t.dims) for t in graph.initializer}
        for value in (value for value in graph.input if value.name not in ours.shapes):
            (declared,) = (v.type.tensor_type for v in outline.graph.input if v.name == value.name)
            assert declared.elem_type == value.type.tensor_type.elem_type
            dims = [d.dim_value if d.HasField("dim_value") else 1 for d in value.type.tensor_type.shape.dim]
            assert [d.dim_value for d in declared.shape.dim] == dims
        assert list(outline.graph.node[: len(graph.node)]) == list(graph.node)
        assert (outline.ir_version, list(outline.opset_import)) == (theirs.ir_version, list(theirs.opset_import))
    assert accepted > 200


@pytest.mark.parametrize(
    "dimension",
    [
        onnxfile._field(1, 0) + onnxfile._field(2, "batch"),  # of a oneof the last field counts
        onnxfile._field(1, b"\0"),  # a packed list, which protobuf ignores where it expects one integer
    ],
)
def test_a_hidden_empty_batch_does_not_hide_the_work(onnx_file: Path, dimension: bytes) -> None:
    """With a batch of 0 in the outline all shapes would be empty and all work free, whereas onnxruntime sees a batch of
    any size."""
    model = onnx.load_model(onnx_file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "x" * (len(dimension) - 2)
    old = model.graph.input[0].type.tensor_type.shape.dim[0].SerializeToString()
    onnx_file.write_bytes(model.SerializeToString().replace(old, dimension, 1))
    assert not onnx.load_model(onnx_file).graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    outline = onnx.load_from_string(read_model(onnx_file).outline)
    assert [d.dim_value for d in outline.graph.input[0].type.tensor_type.shape.dim] == [1, 16]


def test_the_outline_is_small_and_infers_every_shape(onnx_file: Path) -> None:
    outline = onnx.load_from_string(read_model(onnx_file).outline)
    assert [i.name for i in outline.graph.initializer] == ["shape"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in outline.graph.input}
    assert shapes == {"z": [1, 16], "w": [16, 64], "k": [4, 3, 4, 4]}
    assert {"floats", "flat", "small", "large", "image"} < {o.name for o in outline.graph.output}

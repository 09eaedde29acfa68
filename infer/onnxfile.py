"""Reads an ONNX file from any source and checks it before onnxruntime sees it.

This protects users who open generators that they found on the web, since onnxruntime trusts a model. A generator is one
self-contained, feed-forward graph, so everything else that ONNX allows is refused: weights in other files (onnxruntime
opens any path that a model names; for a model given as bytes it searches the working directory, seen with 1.31.1),
graphs inside operators (endless loops), functions, sparse weights, shapes without the data for them.

The messages are decoded here, without copying the weights, since protobuf's own decoder does not limit the number of
messages: two bytes of a file can take a hundred in memory. The ``onnx`` package is not a dependency of inference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catgan.command import UserError

MAX_BYTES = 2**31 - 1  # protobuf's own limit for one message
MAX_FIELDS = 200_000  # of the decoded messages; bounds time and memory of reading (ProGAN at 128 pixels has 1,660)
MAX_NODES = 10_000
MAX_RANK = 8
_SMALL = 64  # elements; a tensor of this size or less may hold a shape and stays in the outline

# What is decoded of onnx/onnx.proto (IR version 13): for each message the number, name and type of its fields. The
# integers of "ints" are a list, packed or not. All other fields are skipped.
_SCHEMA = {
    "Model": "1 ir_version int, 7 graph Graph, 8 opset_import bytes, 14 metadata_props StringStringEntry",
    "StringStringEntry": "1 key str, 2 value str",
    "Graph": "1 node Node, 5 initializer Tensor, 11 input ValueInfo, 12 output ValueInfo",
    "Node": "1 input str, 2 output str, 4 op_type str, 5 attribute Attribute, 7 domain str",
    "Attribute": "1 name str, 5 t Tensor, 8 ints ints",
    "Tensor": "1 dims ints, 2 data_type int, 8 name str, 13 external_data bytes, 14 data_location int",
    "ValueInfo": "1 name str, 2 type Type",
    "Type": "1 tensor_type Type.Tensor",
    "Type.Tensor": "1 elem_type int, 2 shape TensorShape",
    "TensorShape": "1 dim TensorShape.Dimension",
    "TensorShape.Dimension": "1 value int, 2 value str",  # dim_value, dim_param: a oneof, so the last one counts
}
_FIELDS = {
    message: {int(number): (name, kind) for number, name, kind in map(str.split, fields.split(", "))}
    for message, fields in _SCHEMA.items()
}
# protobuf merges a repetition of these, so a shape could have more dimensions than each of its parts shows.
_ONCE = {"graph", "t", "type", "tensor_type", "shape"}
# Fields that no generator needs.
_REFUSED = {
    "Model": {20: "training steps", 25: "functions of its own"},
    "Graph": {15: "sparse weights"},
    "Attribute": {
        **dict.fromkeys((6, 11), "graphs inside operators (loops or branches)"),
        **dict.fromkeys((22, 23), "sparse weights"),
        10: "lists of tensors as attributes",
    },
    "Type": dict.fromkeys((4, 5, 7, 8, 9), "inputs or outputs that are not tensors"),
}


class _Malformed(Exception):
    """The bytes do not follow protobuf's wire format, or not the ONNX schema."""


class _Refused(Exception):
    """A valid ONNX model with a part that no generator needs."""


@dataclass(frozen=True)
class Node:
    """One operator: its type, its domain ("" for the standard) and the names of its inputs and outputs.

    ``kernel_area`` is the product of the attribute ``kernel_shape``, or 1.
    """

    op_type: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    kernel_area: int


@dataclass(frozen=True)
class ModelFile:
    """A self-contained model.

    Attributes:
        data: the file's bytes.
        nodes: the operators.
        shapes: of the tensors in the file, by name.
        outline: a small ONNX model of the same operators, for inferring all other shapes. Its batch is 1, large
            tensors are inputs (their values do not matter), and all outputs of operators are outputs without declared
            shapes (the file's own declarations are not trusted), each with its rank beside it, see ``rank_of``.
        metadata: text entries, by name.
    """

    data: bytes
    nodes: list[Node]
    shapes: dict[str, list[int]]
    outline: bytes
    metadata: dict[str, str]


def rank_of(name: str) -> str:
    """The outline's output whose length is the rank of ``name``: onnxruntime reports the same shape for a scalar and
    for a tensor of unknown shape."""
    return f"rank of {name}"


def read_model(path: Path) -> ModelFile:
    """Read and check the ONNX file ``path``. Raises ``UserError`` unless it holds one self-contained graph."""
    try:
        if not path.exists():
            raise UserError(
                f"{path}: no such file; give the gen.onnx of a finished training, make one: catexport RUN, or take a"
                " built-in one: catinfer --list"
            )
        if not path.is_file():
            raise UserError(f"{path}: not a file; give the gen.onnx itself")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size / 2**30:.1f} GiB; a generator is one ONNX file below 2 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _checked(data)
    except (_Malformed, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not an ONNX model, or cut short ({error}); export or copy it again") from error
    except _Refused as error:
        raise UserError(f"{path}: {error}") from error


class _Message(defaultdict[str, list[Any]]):
    """The values of the decoded fields, by name and in order; ``data[start:end]`` of the file is the message."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        super().__init__(list)
        self.start, self.end = start, end

    def last(self, field: str, default: Any) -> Any:
        """The value of a field that is not a list: of repetitions the last one counts."""
        return self[field][-1] if self[field] else default

    def inner(self, field: str) -> _Message:
        """The message in a field that is not a list, or an empty one."""
        message: _Message = self.last(field, _Message(0, 0))
        return message

    @property
    def name(self) -> str:
        name: str = self.last("name", "")
        return name


class _Decoder:
    """Decodes messages with at most ``MAX_FIELDS`` fields in total; an integer of a packed list counts as a field."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields_left = MAX_FIELDS

    def message(self, kind: str, start: int, end: int) -> _Message:
        """The message of type ``kind`` between two positions."""
        message, position, seen = _Message(start, end), start, set()
        while position < end:
            self._count_field()
            key, position = self._integer(position, end)
            number, wire_type, begin = key >> 3, key & 7, position
            match wire_type:
                case 0:
                    _, position = self._integer(position, end)
                case 1 | 5:  # 8 or 4 bytes
                    position += 8 if wire_type == 1 else 4
                case 2:
                    length, begin = self._integer(position, end)
                    position = begin + length
                case _:
                    raise _Malformed(f"field of unknown type {wire_type} at byte {begin}")
            if position > end:
                raise _Malformed(f"field at byte {begin} ends {position - end} bytes too late")
            if not 0 < number < 2**29:
                raise _Malformed(f"field of impossible number {number} at byte {begin}")
            if number in _REFUSED.get(kind, ()):
                raise _Refused(f"has {_REFUSED[kind][number]}, which no generator needs; make it with catexport")
            if number in _FIELDS[kind]:
                name, field_type = _FIELDS[kind][number]
                if name in _ONCE and name in seen:
                    raise _Malformed(f"{kind} has field {number} twice")
                seen.add(name)
                message[name] += self._values(field_type, wire_type, begin, position)
        return message

    def _values(self, field_type: str, wire_type: int, start: int, end: int) -> list[Any]:
        """The values in one field; none if the wire type is not that of ``field_type``, as protobuf ignores it then."""
        match field_type, wire_type:
            case ("int" | "ints", 0) | ("ints", 2):
                values = []
                while start < end:
                    if wire_type == 2:
                        self._count_field()
                    value, start = self._integer(start, end)
                    values.append((value + 2**63) % 2**64 - 2**63)
                return values
            case "bytes", 2:
                return [self._data[start:end]]
            case "str", 2:
                return [self._data[start:end].decode()]
            case _, 2 if field_type in _FIELDS:
                return [self.message(field_type, start, end)]
        return []

    def _integer(self, position: int, end: int) -> tuple[int, int]:
        """The variable-length integer at ``position``, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                break
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise _Malformed(f"integer without an end at byte {position}")

    def _count_field(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _Refused(f"more than {MAX_FIELDS:,} entries; no generator is that large")


def _checked(data: bytes) -> ModelFile:
    model = _Decoder(data).message("Model", 0, len(data))
    graph = model.last("graph", None)
    if graph is None:
        raise _Malformed("no graph inside")
    if len(graph["node"]) > MAX_NODES:
        raise _Refused(f"more than {MAX_NODES:,} operators; no generator is that large")
    for node in graph["node"]:
        for attribute in node["attribute"]:
            for tensor in attribute["t"]:
                _check_tensor(tensor)
    for tensor in graph["initializer"]:
        _check_tensor(tensor)
    for value in graph["output"]:
        _declared(value)
    shapes = {tensor.name: tensor["dims"] for tensor in graph["initializer"]}
    metadata = {entry.last("key", ""): entry.last("value", "") for entry in model["metadata_props"]}
    nodes = [_node(node) for node in graph["node"]]
    return ModelFile(data, nodes, shapes, _outline(data, model, graph), metadata)


def _check_tensor(tensor: _Message) -> None:
    if tensor["external_data"] or any(tensor["data_location"]):
        raise _Refused("keeps weights in other files, which is refused; export it as one file")
    dims = tensor["dims"]
    # No type takes less than half a byte per element.
    if len(dims) > MAX_RANK or min(dims, default=1) < 0 or math.prod(dims) > 2 * (tensor.end - tensor.start):
        raise _Refused(
            f"tensor {tensor.name[:40]!r} declares the shape {dims[:MAX_RANK]}, but does not hold that many values"
        )


def _declared(value: _Message) -> tuple[int, list[int]]:
    """Type and shape of a graph's input or output; 1 for a dimension without a number (the batch)."""
    tensor = value.inner("type").inner("tensor_type")
    sizes = [dimension.last("value", "") for dimension in tensor.inner("shape")["dim"]]
    dims = [size if isinstance(size, int) else 1 for size in sizes]
    if len(dims) > MAX_RANK or min(dims, default=1) < 0:
        raise _Refused(f"{value.name[:40]!r} has the shape {dims[:MAX_RANK]}, which no image or latent has")
    return tensor.last("elem_type", 0), dims


def _node(node: _Message) -> Node:
    kernels = [a["ints"] for a in node["attribute"] if a.name == "kernel_shape"]
    area = math.prod(max(size, 1) for size in kernels[-1][:16]) if kernels else 1
    return Node(node.last("op_type", ""), node.last("domain", ""), node["input"], node["output"], area)


def _outline(data: bytes, model: _Message, graph: _Message) -> bytes:
    """See ``ModelFile``. The numbers are those of ``_SCHEMA``."""
    parts = [_field(1, data[node.start : node.end]) for node in graph["node"]]
    for name in [name for node in graph["node"] for name in node["output"] if name]:
        parts.append(_field(1, _field(1, name) + _field(2, rank_of(name)) + _field(4, "Shape")))
        parts += [_field(12, _field(1, output)) for output in (name, rank_of(name))]
    tensors = {value.name: _input(value.name, *_declared(value)) for value in graph["input"]}
    for tensor in graph["initializer"]:
        if math.prod(tensor["dims"]) <= _SMALL:
            tensors[tensor.name] = _field(5, data[tensor.start : tensor.end])
        else:
            tensors[tensor.name] = _input(tensor.name, tensor.last("data_type", 0), tensor["dims"])
    header = [_field(1, version) for version in model["ir_version"]] + [_field(8, o) for o in model["opset_import"]]
    return b"".join([*header, _field(7, b"".join([_field(2, "outline"), *parts, *tensors.values()]))])


def _input(name: str, data_type: int, dims: list[int]) -> bytes:
    """An input of the outline."""
    shape = b"".join(_field(1, _field(1, dim)) for dim in dims)
    return _field(11, _field(1, name) + _field(2, _field(1, _field(1, data_type) + _field(2, shape))))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field in protobuf's wire format."""
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    content = value.encode() if isinstance(value, str) else value
    return _encoded(number << 3 | 2) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    """A variable-length integer."""
    value %= 2**64
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])

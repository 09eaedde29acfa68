"""Reading an ONNX file that may come from anywhere, before onnxruntime sees it.

A generator is one self-contained, feed-forward graph. What ONNX allows beyond that is refused here: weights in other
files (onnxruntime opens whatever a model names; for a model given as bytes it looks in the working directory, seen
with 1.31.1), graphs inside operators (loops without an end), functions, sparse weights, shapes without the data for
them. The few protobuf messages that matter are walked by hand: the ``onnx`` package is no dependency of inference.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from catgan.command import UserError

MAX_BYTES = 2**31 - 1  # protobuf's own limit for one message
MAX_FIELDS = 200_000  # of the walked messages; bounds time and memory of reading (ProGAN at 128 pixels has 1,660)
MAX_NODES = 10_000
MAX_RANK = 8
_SMALL = 64  # Elements. A tensor no larger may hold a shape, and stays in the outline.

# Message -> field number -> message of that field: what is walked (onnx/onnx.proto, IR version 13).
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "OperatorSetId", 14: "StringStringEntry"},
    "OperatorSetId": {},
    "StringStringEntry": {},
    "Graph": {1: "Node", 5: "Tensor", 11: "ValueInfo", 12: "ValueInfo"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor"},
    "Tensor": {},
    "ValueInfo": {2: "Type"},
    "Type": {1: "Type.Tensor"},
    "Type.Tensor": {2: "TensorShape"},
    "TensorShape": {1: "TensorShape.Dimension"},
    "TensorShape.Dimension": {},
}
# What a generator has no need for.
_REFUSED: dict[tuple[str, int], str] = {
    ("Model", 20): "training steps",
    ("Model", 25): "functions of its own",
    ("Graph", 15): "sparse weights",
    ("Attribute", 6): "graphs inside operators (loops or branches)",
    ("Attribute", 11): "graphs inside operators (loops or branches)",
    ("Attribute", 10): "lists of tensors as attributes",
    ("Attribute", 22): "sparse weights",
    ("Attribute", 23): "sparse weights",
    ("Type", 4): "inputs or outputs that are no tensors",
    ("Type", 5): "inputs or outputs that are no tensors",
    ("Type", 7): "inputs or outputs that are no tensors",
    ("Type", 8): "inputs or outputs that are no tensors",
    ("Type", 9): "inputs or outputs that are no tensors",
}
# These occur once. protobuf merges repeated ones, by which a tensor could have other dimensions than those seen here.
_ONCE = {("Model", 7), ("Attribute", 5), ("ValueInfo", 2), ("Type", 1), ("Type.Tensor", 2)}


class _Malformed(Exception):
    """The bytes do not follow protobuf's wire format, or not the ONNX schema."""


class _Refused(Exception):
    """An ONNX model, but with something in it that a generator does not need."""


@dataclass
class Node:
    """One operator: its type, its domain ("" for the standard) and the names of what it reads and writes."""

    op_type: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    kernel_area: int = 1  # of the attribute kernel_shape


@dataclass(frozen=True)
class ModelFile:
    """A self-contained model.

    Attributes: ``data``, the file's bytes; ``nodes``; ``shapes`` of the tensors kept in it, by name; ``outline``, a
    small ONNX model of the same operators for inferring all other shapes. In it the batch is 1, large tensors are
    inputs (their values do not matter), and everything that an operator gives is an output without declared shape
    (the file's own declarations are not trusted), with its rank beside it (see ``rank_of``).
    """

    data: bytes
    nodes: list[Node]
    shapes: dict[str, list[int]]
    outline: bytes


def rank_of(name: str) -> str:
    """The output of the outline whose length is the rank of ``name``: onnxruntime tells the shape of a scalar and a
    shape that it does not know alike."""
    return f"rank of {name}"


def read_model(path: Path) -> ModelFile:
    """The self-contained ONNX file ``path``; a ``UserError`` for anything else."""
    try:
        if not path.exists():
            raise UserError(
                f"{path}: no such file; give the gen.onnx of a training that has ended, or make one: catexport RUN"
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
        return _Walk(data).model()
    except (_Malformed, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not an ONNX model, or cut short ({error}); export or copy it again") from error
    except _Refused as error:
        raise UserError(f"{path}: {error}") from error


class _Walk:
    """One pass over the bytes of a ModelProto."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields_left = MAX_FIELDS
        self._nodes: list[Node] = []
        self._shapes: dict[str, list[int]] = {}
        self._tensors: dict[str, bytes] = {}  # name -> the tensor, or for a large one an input of its shape
        self._inputs: dict[str, bytes] = {}

    def model(self) -> ModelFile:
        header, graph, has_graph = [], [], False
        for number, start, stop, value in self._fields("Model", 0, len(self._data)):
            match number, value:
                case 1, int(version):
                    header.append(_number(1, version))
                case 7, None:
                    has_graph = True
                    graph = self._graph(start, stop)
                case 8, None:
                    header.append(_bytes(8, self._data[start:stop]))
                case 14, None:
                    for _, begin, end, entry in self._fields("StringStringEntry", start, stop):
                        if entry is None:
                            self._text(begin, end)
        if not has_graph:
            raise _Malformed("no graph inside")
        computed = [name for node in self._nodes for name in node.outputs if name]
        graph += [_bytes(1, _texts((1, name), (2, rank_of(name)), (4, "Shape"))) for name in computed]
        outputs = [_bytes(12, _texts((1, shown))) for name in computed for shown in (name, rank_of(name))]
        inputs = [self._tensors.get(name, value) for name, value in self._inputs.items()]
        tensors = [value for name, value in self._tensors.items() if name not in self._inputs]
        outline = b"".join([*graph, *inputs, *tensors, *outputs])
        outline = b"".join([*header, _bytes(7, _texts((2, "outline")) + outline)])
        return ModelFile(self._data, self._nodes, self._shapes, outline)

    def _graph(self, begin: int, end: int) -> list[bytes]:
        """The nodes as they are; nodes, tensors and inputs are noted."""
        nodes = []
        for number, start, stop, value in self._fields("Graph", begin, end):
            match number, value:
                case 1, None:
                    if len(self._nodes) == MAX_NODES:
                        raise _Refused(f"more than {MAX_NODES:,} operators; no generator is that large")
                    self._nodes.append(self._node(start, stop))
                    nodes.append(_bytes(1, self._data[start:stop]))
                case 5, None:
                    name, dims, data_type = self._tensor(start, stop)
                    self._shapes[name] = dims
                    if math.prod(dims) <= _SMALL:
                        self._tensors[name] = _bytes(5, self._data[start:stop])
                    else:
                        self._tensors[name] = _input(name, data_type, dims)
                case 11, None:
                    name, dims, data_type = self._value_info(start, stop)
                    self._inputs[name] = _input(name, data_type, dims)
                case 12, None:
                    self._value_info(start, stop)
        return nodes

    def _node(self, begin: int, end: int) -> Node:
        node = Node()
        for number, start, stop, value in self._fields("Node", begin, end):
            match number, value:
                case 1, None:
                    node.inputs.append(self._text(start, stop))
                case 2, None:
                    node.outputs.append(self._text(start, stop))
                case 4, None:
                    node.op_type = self._text(start, stop)
                case 5, None:
                    name, integers = self._attribute(start, stop)
                    if name == "kernel_shape":
                        node.kernel_area = math.prod(max(i, 1) for i in integers[:16])
                case 7, None:
                    node.domain = self._text(start, stop)
        return node

    def _attribute(self, begin: int, end: int) -> tuple[str, list[int]]:
        name, integers = "", []
        for number, start, stop, value in self._fields("Attribute", begin, end):
            match number, value:
                case 1, None:
                    name = self._text(start, stop)
                case 5, None:
                    self._tensor(start, stop)
                case 8, _:
                    integers += self._integers(start, stop, value)
        return name, integers

    def _tensor(self, begin: int, end: int) -> tuple[str, list[int], int]:
        """(name, dims, data_type) of a tensor whose values are inside it."""
        name, dims, data_type = "", [], 0
        for number, start, stop, value in self._fields("Tensor", begin, end):
            match number, value:
                case 1, _:
                    dims += self._integers(start, stop, value)
                case 2, int(data_type):
                    pass
                case 8, None:
                    name = self._text(start, stop)
                case (13, None) | (14, int()) if value != 0:
                    raise _Refused("keeps weights in other files, which is refused; export it as one file")
        # No type takes less than half a byte per element.
        if len(dims) > MAX_RANK or min(dims, default=1) < 0 or math.prod(dims) > 2 * (end - begin):
            raise _Refused(
                f"tensor {name[:40]!r} declares the shape {dims[:MAX_RANK]}, but does not hold that many values"
            )
        return name, dims, data_type

    def _value_info(self, begin: int, end: int) -> tuple[str, list[int], int]:
        """(name, dims, data_type) of an input or output; 1 for a dimension without a number (the batch)."""
        name, dims, data_type = "", [], 0
        pending = deque([("ValueInfo", begin, end)])
        while pending:  # breadth first: all the dimensions come last, in their order
            message, *at = pending.popleft()
            dimension = 1
            for number, start, stop, value in self._fields(message, *at):
                match message, number, value:
                    case "ValueInfo", 1, None:
                        name = self._text(start, stop)
                    case "Type.Tensor", 1, int(data_type):
                        pass
                    case "TensorShape.Dimension", 1, int():
                        (dimension,) = self._integers(start, stop, value)
                    case "TensorShape.Dimension", 2, None:
                        self._text(start, stop)
                    case _, _, None if number in _NESTED[message]:
                        pending.append((_NESTED[message][number], start, stop))
            if message == "TensorShape.Dimension":
                dims.append(dimension)
        if len(dims) > MAX_RANK or min(dims, default=1) < 0:
            raise _Refused(f"{name[:40]!r} has the shape {dims[:MAX_RANK]}, which no picture or latent has")
        return name, dims, data_type

    def _text(self, start: int, stop: int) -> str:
        return self._data[start:stop].decode()

    def _integers(self, start: int, stop: int, value: int | None) -> list[int]:
        """A repeated integer's values, whether they stand in one field each or packed into one."""
        values = [] if value is None else [value]
        while value is None and start < stop:
            number, start = _varint(self._data, start, stop)
            values.append(number)
            self._spend()
        return [v - 2**64 if v >= 2**63 else v for v in values]

    def _spend(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _Refused(f"more than {MAX_FIELDS:,} entries; no generator is that large")

    def _fields(self, message: str, position: int, end: int) -> Iterator[tuple[int, int, int, int | None]]:
        """(number, begin, end, value) of each field between two positions; the value of integers only, else None.

        Floating point numbers are passed over: nothing that is read here has their kinds, and protobuf ignores fields
        of another kind than the schema's.
        """
        data, seen = self._data, set()
        while position < end:
            self._spend()
            key, position = _varint(data, position, end)
            start, value, number, kind = position, None, key >> 3, key & 7
            match kind:
                case 0:
                    value, position = _varint(data, position, end)
                case 1:
                    position += 8
                case 2:
                    length, start = _varint(data, position, end)
                    position = start + length
                case 5:
                    position += 4
                case _:
                    raise _Malformed(f"field of unknown kind {kind} at byte {start}")
            if position > end:
                raise _Malformed(f"field at byte {start} ends {position - end} bytes too late")
            if not 0 < number < 2**29:
                raise _Malformed(f"field of impossible number {number} at byte {start}")
            if (message, number) in _REFUSED:
                raise _Refused(f"has {_REFUSED[message, number]}, which no generator needs; make it with catexport")
            if (message, number) in _ONCE:
                if number in seen:
                    raise _Malformed(f"{message} has field {number} twice")
                seen.add(number)
            if kind in (0, 2):
                yield number, start, position, value


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """The variable-length integer at ``position`` and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed(f"number without an end at byte {position}")


def _encoded(value: int) -> bytes:
    """A variable-length integer."""
    value %= 2**64
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3) + _encoded(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value


def _texts(*fields: tuple[int, str]) -> bytes:
    return b"".join(_bytes(number, text.encode()) for number, text in fields)


def _input(name: str, data_type: int, dims: list[int]) -> bytes:
    """A field of GraphProto: the input ``name``, a tensor of this shape."""
    shape = b"".join(_bytes(1, _number(1, dim)) for dim in dims)
    tensor = _number(1, data_type) + _bytes(2, shape)
    return _bytes(11, _texts((1, name)) + _bytes(2, _bytes(1, tensor)))

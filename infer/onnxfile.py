"""Reading an ONNX file that may come from anywhere, before onnxruntime sees it.

onnxruntime opens whatever files a model names for its weights; for a model given as bytes it looks in the working
directory (seen with 1.31.1). A generator is one self-contained file, so such models are refused here. The few
protobuf messages that lead to tensors are walked by hand: the ``onnx`` package is no dependency of inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from infer.command import UserError

MAX_BYTES = 2**31 - 1  # protobuf's own limit for one message

# Message -> field number -> message of that field, for every path to a TensorProto (onnx/onnx.proto, IR version 13).
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_MODEL_GRAPH = 7
_TENSOR_DATA_LOCATION = 14


class _Malformed(Exception):
    """The bytes do not follow protobuf's wire format."""


def read_model(path: Path) -> bytes:
    """The bytes of the self-contained ONNX file ``path``; a ``UserError`` for anything else."""
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; give the gen.onnx of a training run or of catexport")
        if not path.is_file():
            raise UserError(f"{path}: not a file; give the gen.onnx itself")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size / 2**30:.1f} GiB; a generator is one ONNX file below 2 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        external = _has_external_tensors(data)
    except _Malformed as error:
        raise UserError(f"{path}: not an ONNX model, or cut short ({error}); export or copy it again") from error
    if external:
        raise UserError(f"{path}: keeps weights in other files, which is refused; export it as one file")
    return data


def _has_external_tensors(data: bytes) -> bool:
    """Whether any tensor of the ModelProto ``data`` lies outside it; raises ``_Malformed`` for no ModelProto."""
    has_graph = False
    pending = [("Model", 0, len(data))]
    while pending:
        message, begin, end = pending.pop()
        for number, start, stop, value in _fields(data, begin, end):
            if message == "Tensor" and number == _TENSOR_DATA_LOCATION and value:
                return True
            if value is None and number in _NESTED[message]:
                pending.append((_NESTED[message][number], start, stop))
                has_graph |= message == "Model" and number == _MODEL_GRAPH
    if not has_graph:
        raise _Malformed("no graph inside")
    return False


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int | None]]:
    """(number, begin, end, value) of each field between two positions; the value of numbers only, else None."""
    while position < end:
        key, position = _varint(data, position, end)
        start, value = position, None
        match key & 7:
            case 0:
                value, position = _varint(data, position, end)
            case 1:
                position += 8
                value = 0
            case 2:
                length, start = _varint(data, position, end)
                position = start + length
            case 5:
                position += 4
                value = 0
            case kind:
                raise _Malformed(f"field of unknown kind {kind} at byte {start}")
        if position > end:
            raise _Malformed(f"field at byte {start} ends {position - end} bytes too late")
        yield key >> 3, start, position, value


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

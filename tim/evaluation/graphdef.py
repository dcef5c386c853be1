"""Constants of a frozen TensorFlow graph (a GraphDef file), read from protobuf's wire format without TensorFlow.

A message is a sequence of fields, each a number with a wire type and a value. The numbers used here are those of
TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto and tensor_shape.proto.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are out of use
VARINT_BYTES = 10  # a 64-bit number in groups of seven bits
DT_FLOAT = 1
MAX_SIZE = 1 << 31  # a message is smaller than that, and so is any dimension of its tensor
MAX_REPEATED = 1 << 24  # elements that one stored value may fill: a damaged shape must not take all memory

Fields = dict[int, list[int | memoryview]]  # values by field number, in the order of the file


@dataclass(frozen=True)
class Node:
    """An operation of a graph: its kind, the names of its inputs, and its attributes as messages yet to be read."""

    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Fields]


class Graph:
    """The nodes of a GraphDef file by name.

    Args:
        path: the file.

    Raises:
        ValueError: when the file is damaged or no graph; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.nodes: dict[str, Node] = {}
        try:
            for message in _messages(_parse(memoryview(self.path.read_bytes())), 1):
                name, node = _node(_parse(message))
                if name in self.nodes:
                    raise ValueError(f"two nodes are named {name!r}")
                self.nodes[name] = node
            if not self.nodes:
                raise ValueError("it holds no nodes")
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged or no frozen TensorFlow graph: {error}") from error

    def constant(self, name: str, dimensions: int) -> np.ndarray:
        """Value of a Const node, float32 with so many dimensions, read-only.

        Raises:
            ValueError: when there is none, or it is of another type or damaged.
        """
        node = self.nodes.get(name)
        if node is None or node.op != "Const":
            raise ValueError(f"{self.path} has no constant {name!r}")
        try:
            array = _tensor(_parse(_last(node.attributes.get("value", {}), 8)))
            if array.ndim != dimensions:
                raise ValueError(f"its shape is {array.shape}, expected {dimensions} dimensions")
        except ValueError as error:
            raise ValueError(f"{self.path}: constant {name!r} cannot be read: {error}") from error
        return array

    def flag(self, name: str, attribute: str) -> bool | None:
        """A boolean attribute of a node, None where it has none."""
        node = self.nodes.get(name)
        values = node.attributes.get(attribute, {}).get(5) if node else None
        return bool(values[-1]) if values else None


def _node(fields: Fields) -> tuple[str, Node]:
    attributes = {}
    for message in _messages(fields, 5):
        entry = _parse(message)
        attributes[_text(_last(entry, 1))] = _parse(_last(entry, 2))
    inputs = tuple(_text(value) for value in _messages(fields, 3))
    return _text(_last(fields, 1)), Node(_text(_last(fields, 2)), inputs, attributes)


def _tensor(fields: Fields) -> np.ndarray:
    """A float32 TensorProto: packed content, or a list of values, of which a single one fills the shape."""
    dtype = fields.get(1, [0])[-1]
    if dtype != DT_FLOAT:
        raise ValueError(f"TensorFlow type {dtype} is not float32 ({DT_FLOAT})")
    sizes = [_parse(dim).get(1, [0])[-1] for dim in _messages(_parse(_last(fields, 2)), 2)]
    if not all(isinstance(size, int) and 0 < size < MAX_SIZE for size in sizes):
        raise ValueError(f"its shape is {sizes}")
    shape, count = tuple(sizes), math.prod(sizes)
    content = b"".join(_messages(fields, 4 if 4 in fields else 5))
    if len(content) == 4 * count:
        return np.frombuffer(content, "<f4").reshape(shape)
    if len(content) == 4 and count <= MAX_REPEATED:
        return np.broadcast_to(np.frombuffer(content, "<f4"), shape)
    raise ValueError(f"it holds {len(content)} bytes for the shape {shape}")


def _parse(data: memoryview) -> Fields:
    """Fields of a message; the bytes of nested messages, texts and floats are views of `data`."""
    fields: Fields = {}
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
        elif kind in (BYTES, FIXED32, FIXED64):
            size, start = _varint(data, place) if kind == BYTES else ({FIXED32: 4, FIXED64: 8}[kind], place)
            place = start + size
            if place > len(data):
                raise ValueError("it ends in the middle of a value")
            value = data[start:place]
        else:
            raise ValueError(f"{kind} is no wire type")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = 0
    for k, byte in enumerate(data[place : place + VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value, place + k + 1
    raise ValueError("it ends in the middle of a number")


def _messages(fields: Fields, number: int) -> list[memoryview]:
    """All values of a field that holds bytes."""
    values = fields.get(number, [])
    if any(isinstance(value, int) for value in values):
        raise ValueError(f"field {number} holds a number instead of bytes")
    return values


def _last(fields: Fields, number: int) -> memoryview:
    """The value of a field that holds bytes; the last one counts."""
    values = _messages(fields, number)
    if not values:
        raise ValueError(f"field {number} is missing")
    return values[-1]


def _text(value: memoryview) -> str:
    return str(value, "utf-8")

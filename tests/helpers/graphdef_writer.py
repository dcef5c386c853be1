"""A small writer of TensorFlow's GraphDef in protobuf's wire format."""

import struct
from pathlib import Path

import numpy as np

DT_FLOAT = 1


def varint(value: int) -> bytes:
    """A number in groups of seven bits; negative ones as 64-bit two's complement."""
    value %= 1 << 64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields: tuple[int, int | float | str | bytes]) -> bytes:
    """Fields (number, value): int as varint, float as 32 bits, text and bytes with their length."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def tensor(array: np.ndarray, form: str = "content", dtype: int = DT_FLOAT) -> bytes:
    """TensorProto with its values as `content`, `packed` floats, a `list` of floats, or `one` float for all."""
    dims = message(*[(2, message((1, int(size)))) for size in array.shape])
    flat = array.astype("<f4").ravel()
    if form == "list":
        values = [(5, float(value)) for value in flat]
    else:
        values = {"content": [(4, flat.tobytes())], "packed": [(5, flat.tobytes())], "one": [(5, float(flat[0]))]}[form]
    return message((1, dtype), (2, dims), *values)


def attribute(key: str, value: bytes) -> tuple[int, bytes]:
    """Entry of a node's attribute map."""
    return 5, message((1, key), (2, value))


def constant(name: str, value: bytes) -> bytes:
    """A Const node of a TensorProto."""
    kind = attribute("dtype", message((6, DT_FLOAT)))
    return message((1, name), (2, "Const"), kind, attribute("value", message((8, value))))


def write_graph(path: Path, nodes: list[bytes]) -> Path:
    """Write a GraphDef with the version that the 2015 graph has, after its nodes."""
    path.write_bytes(b"".join(message((1, node)) for node in nodes) + message((4, message((1, 8)))))
    return path

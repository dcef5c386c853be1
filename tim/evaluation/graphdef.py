"""Constants of a frozen TensorFlow graph (a GraphDef file), read by the protobuf classes of tensorboard, without TensorFlow."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

DT_FLOAT = 1  # of TensorFlow's types.proto
MAX_REPEATED = 1 << 24  # elements that one stored value may fill: a damaged shape must not take all memory


class Graph:
    """The nodes of a GraphDef file by name.

    Args:
        path: the file.

    Raises:
        ValueError: when the file is damaged or no graph; the message names it. Also when tensorboard is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        graph = _parse(self.path)
        self.nodes = {node.name: node for node in graph.node}
        twice = [name for name, count in Counter(node.name for node in graph.node).items() if count > 1]
        if twice or not self.nodes:
            problem = f"two nodes are named {twice[0]!r}" if twice else "it holds no nodes"
            raise ValueError(f"{self.path} is damaged or no frozen TensorFlow graph: {problem}")

    def constant(self, name: str, dimensions: int) -> np.ndarray:
        """Value of a Const node, float32 with so many dimensions, read-only.

        Raises:
            ValueError: when there is none, or it is of another type or damaged.
        """
        node = self.nodes.get(name)
        if node is None or node.op != "Const":
            raise ValueError(f"{self.path} has no constant {name!r}")
        try:
            if not node.attr["value"].HasField("tensor"):
                raise ValueError("field 8 is missing, a tensor")
            array = _tensor(node.attr["value"].tensor)
            if array.ndim != dimensions:
                raise ValueError(f"its shape is {array.shape}, expected {dimensions} dimensions")
        except ValueError as error:
            raise ValueError(f"{self.path}: constant {name!r} cannot be read: {error}") from error
        return array

    def flag(self, name: str, attribute: str) -> bool | None:
        """A boolean attribute of a node, None where it has none."""
        node = self.nodes.get(name)
        return node.attr[attribute].b if node and node.attr[attribute].HasField("b") else None


def _parse(path: Path) -> "GraphDef":
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.graph_pb2 import GraphDef
    except ImportError as error:
        raise ValueError(f"reading {path} needs tensorboard: pip install tim-pytorch[eval]") from error
    try:
        return GraphDef.FromString(path.read_bytes())
    except (DecodeError, ValueError) as error:  # the latter for texts that are no UTF-8, from protobuf's Python parser
        raise ValueError(f"{path} is damaged or no frozen TensorFlow graph: {error}") from error


def _tensor(tensor: "TensorProto") -> np.ndarray:
    """A float32 tensor: packed content, or a list of values, of which a single one fills the shape."""
    if tensor.dtype != DT_FLOAT:
        raise ValueError(f"TensorFlow type {tensor.dtype} is not float32 ({DT_FLOAT})")
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if not all(size > 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    count, content = math.prod(shape), tensor.tensor_content
    values = np.frombuffer(content, "<f4") if content and len(content) % 4 == 0 else np.array(tensor.float_val, np.float32)
    if len(values) == count:
        return values.reshape(shape)
    if len(values) == 1 and count <= MAX_REPEATED:
        return np.broadcast_to(values, shape)
    raise ValueError(f"it holds {len(content) or values.nbytes} bytes for the shape {shape}")

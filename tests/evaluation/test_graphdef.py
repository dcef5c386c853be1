"""The reader of TensorFlow graphs: all forms of constants, and damage of any kind named instead of crashing."""

import gzip
import random
import sys

import numpy as np
import pytest
from helpers.graphdef_writer import attribute, constant, message, tensor, write_graph

from tim.evaluation.graphdef import Graph

KERNEL = np.random.default_rng(0).normal(size=(2, 1, 3, 2)).astype(np.float32)


def small_graph(path):
    """A kernel, a scale and a node that uses them."""
    use = message(
        (1, "conv/batchnorm"),
        (2, "BatchNormWithGlobalNormalization"),
        (3, "conv/kernel"),
        (3, "conv/scale"),
        (4, "/cpu:0"),
        attribute("variance_epsilon", message((4, 0.001))),
        attribute("scale_after_normalization", message((5, 0))),
        attribute("strides", message((1, message((3, 1), (3, 2))))),
    )
    nodes = [constant("conv/kernel", tensor(KERNEL)), constant("conv/scale", tensor(np.full(5, 0.5), "one")), use]
    return write_graph(path, nodes)


@pytest.mark.parametrize("form", ["content", "packed", "list"])
def test_values_come_back_in_every_form(tmp_path, form):
    graph = Graph(write_graph(tmp_path / "g.pb", [constant("w", tensor(KERNEL, form))]))
    value = graph.constant("w", 4)
    assert value.dtype == np.float32 and value.shape == KERNEL.shape
    assert np.array_equal(value, KERNEL)


def test_one_value_fills_the_shape_and_nodes_are_described(tmp_path):
    graph = Graph(small_graph(tmp_path / "g.pb"))
    assert np.array_equal(graph.constant("conv/scale", 1), np.full(5, 0.5))
    assert list(graph.nodes) == ["conv/kernel", "conv/scale", "conv/batchnorm"]
    node = graph.nodes["conv/batchnorm"]
    assert (node.op, tuple(node.input)) == ("BatchNormWithGlobalNormalization", ("conv/kernel", "conv/scale"))
    assert graph.flag("conv/batchnorm", "scale_after_normalization") is False
    assert graph.flag("conv/kernel", "scale_after_normalization") is None
    assert graph.flag("nowhere", "scale_after_normalization") is None


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (constant("v", tensor(KERNEL)), "has no constant 'w'"),
        (message((1, "w"), (2, "Placeholder")), "has no constant 'w'"),
        (message((1, "w"), (2, "Const")), "constant 'w' cannot be read: field 8 is missing"),
        (constant("w", tensor(KERNEL, dtype=3)), "TensorFlow type 3 is not float32"),
        (constant("w", tensor(KERNEL[0])), "expected 4 dimensions"),
        (constant("w", tensor(KERNEL) + message((2, message((2, message((1, -1))))))), "its shape is"),
        (constant("w", tensor(KERNEL) + message((2, message((2, message((1, 99))))))), "48 bytes for the shape"),
        (constant("w", message((1, 1), (2, message((2, message((1, 1 << 30))))), (5, 1.0))), "4 bytes for the shape"),
    ],
    ids=["absent", "placeholder", "no value", "integers", "rank", "negative size", "too few values", "huge repeat"],
)
def test_unusable_constants_are_named(tmp_path, node, problem):
    graph = Graph(write_graph(tmp_path / "g.pb", [node]))
    with pytest.raises(ValueError, match=problem) as error:
        graph.constant("w", 4)
    assert "g.pb" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><html>404</html>", b'{"error": "not found"}', gzip.compress(b"graph"), bytes(100), b"\xff" * 100],
    ids=["empty", "html", "json", "gzip", "zeros", "ones"],
)
def test_other_files_are_no_graphs(tmp_path, content):
    path = tmp_path / "other.pb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pb is damaged or no frozen TensorFlow graph"):
        Graph(path)


def test_a_name_counts_once(tmp_path):
    with pytest.raises(ValueError, match="two nodes are named 'w'"):
        Graph(write_graph(tmp_path / "g.pb", [constant("w", tensor(KERNEL))] * 2))


def test_a_graph_cut_anywhere_is_refused(tmp_path):
    whole = small_graph(tmp_path / "g.pb").read_bytes()
    path = tmp_path / "cut.pb"
    passed = []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            passed.append(list(Graph(path).nodes))
        except ValueError as error:
            assert "cut.pb" in str(error)
    names = ["conv/kernel", "conv/scale", "conv/batchnorm"]
    assert passed == [names[:1], names[:2], names]  # only cuts between two fields of the graph go unseen


def test_flipped_bits_never_crash_or_hang(tmp_path):
    whole = small_graph(tmp_path / "g.pb").read_bytes()
    path = tmp_path / "flipped.pb"
    rng, refused = random.Random(0), 0
    damages = [{place: bits} for place in range(len(whole)) for bits in (0x01, 0x80, 0xFF)]
    damages += [{rng.randrange(len(whole)): rng.randrange(1, 256) for _ in range(4)} for _ in range(500)]
    for damage in damages:
        flipped = bytearray(whole)
        for place, bits in damage.items():
            flipped[place] ^= bits
        path.write_bytes(flipped)
        try:
            graph = Graph(path)
            for name, dimensions in (("conv/kernel", 4), ("conv/scale", 1)):
                assert graph.constant(name, dimensions).nbytes < 1 << 27
            graph.flag("conv/batchnorm", "scale_after_normalization")
        except ValueError as error:
            refused += 1
            assert "flipped.pb" in str(error)
    assert len(damages) / 4 < refused < len(damages)


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    path = small_graph(tmp_path / "g.pb")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.graph_pb2", None)
    with pytest.raises(ValueError, match=r"needs tensorboard: pip install tim-pytorch\[eval\]"):
        Graph(path)

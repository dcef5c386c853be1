"""Random weights of the real Inception network."""

import functools
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.graphdef_writer import attribute, constant, message, tensor, write_graph

# scopes of the convolutions of the 2015 graph, in its order, which is also the order of torch-fidelity's layers
KINDS = {
    "A": "conv tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_2/conv",
    "B": "conv tower/conv tower/conv_1 tower/conv_2",
    "C": "conv tower/conv tower/conv_1 tower/conv_2 "
    "tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3 tower_1/conv_4 tower_2/conv",
    "D": "tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3",
    "E": "conv tower/conv tower/mixed/conv tower/mixed/conv_1 "
    "tower_1/conv tower_1/conv_1 tower_1/mixed/conv tower_1/mixed/conv_1 tower_2/conv",
}
SCOPES = ["conv", "conv_1", "conv_2", "conv_3", "conv_4"] + [
    f"mixed_{k}/{scope}" if k else f"mixed/{scope}" for k, kind in enumerate("AAABCCCCDEE") for scope in KINDS[kind].split()
]


def save_random_inception(path: str | Path, seed: int = 0) -> Path:
    """Write `random_inception(seed)` as torch-fidelity's .pth; returns the path."""
    torch.save(random_inception(seed), path)
    return Path(path)


def save_graph(path: str | Path, state: dict[str, Tensor]) -> Path:
    """Write a state dict as the TensorFlow graph `classify_image_graph_def.pb`; returns the path.

    A batch norm whose scale is one is written as unscaled, with a gamma that must not count.
    """
    values = {name: value.numpy() for name, value in state.items()}
    layers = [name.removesuffix(".conv.weight") for name in values if name.endswith(".conv.weight")]
    nodes = [message((1, "DecodeJpeg/contents"), (2, "Placeholder"))]
    for scope, layer in zip(SCOPES, layers, strict=True):
        gamma = values[f"{layer}.bn.weight"]
        scaled = not (gamma == 1).all()
        constants = {
            "conv2d_params": values[f"{layer}.conv.weight"].transpose(2, 3, 1, 0),
            "batchnorm/beta": values[f"{layer}.bn.bias"],
            "batchnorm/gamma": gamma if scaled else gamma + 2,
            "batchnorm/moving_mean": values[f"{layer}.bn.running_mean"],
            "batchnorm/moving_variance": values[f"{layer}.bn.running_var"],
        }
        nodes += [constant(f"{scope}/{name}", tensor(value)) for name, value in constants.items()]
        norm = [
            (1, f"{scope}/batchnorm"),
            (2, "BatchNormWithGlobalNormalization"),
            *[(3, f"{scope}/{name}") for name in ("Conv2D", *list(constants)[1:])],
            attribute("variance_epsilon", message((4, 0.001))),
            attribute("scale_after_normalization", message((5, int(scaled)))),
        ]
        nodes.append(message(*norm))
    nodes.append(constant("softmax/weights", tensor(values["fc.weight"].T)))
    nodes.append(constant("softmax/biases", tensor(values["fc.bias"])))
    return write_graph(Path(path), nodes)


@functools.cache
def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights under torch-fidelity's names, with batch norms calibrated so that features differ from image to image.

    Every second batch norm has scales of one.
    """
    g = torch.Generator().manual_seed(seed)
    network = _blank_network()
    for k, (name, value) in enumerate(network.state_dict().items()):
        if value.ndim >= 2:
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=g)
        elif name.endswith(".bias"):
            value.normal_(std=0.1, generator=g)
        elif name.endswith(".bn.weight") and k % 12 < 6:  # six entries a layer
            value.uniform_(0.5, 1.5, generator=g)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # statistics of the one batch below
        norm.train()
    with torch.no_grad():
        x = _pictures(g)
        for name, block in network.named_children():
            x = block(x.flatten(1) if name == "fc" else x)
    return {name: value.clone() for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def _pictures(g: torch.Generator) -> Tensor:
    """From smooth to noisy, from pale to full contrast: random networks amplify what their batch norms have not seen."""
    pictures = []
    for side in (2, 8, 30, 139):
        coarse = torch.rand(2, 3, side, side, generator=g) * 2 - 1
        coarse[1] = coarse[1] * 0.3 + torch.rand(3, 1, 1, generator=g) - 0.5
        pictures.append(nn.functional.interpolate(coarse, size=(139, 139), mode="bilinear"))
    return torch.cat(pictures)


def _blank_network() -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):  # the constructor loads what it reads
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        return Blank("blank", ["2048"], nothing)

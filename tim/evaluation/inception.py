"""Inception-2015-12-05, the network behind FID, sFID and inception score: its weights and its features."""

import io
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from tim.evaluation.extract import FeatureExtractor
from tim.evaluation.graphdef import Graph
from tim.evaluation.inputs import Transform
from tim.files import sha256
from tim.models.loading import read_state_dict

POOL3, SPATIAL, CLASSES = 2048, 2023, 1008
SIDE = 299  # pixels of the network's input
TAPPED = 7  # channels of mixed_6/conv that count as spatial features: 7 x 17 x 17 = 2023
FOLDER = Path("checkpoints")
FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
    "classify_image_graph_def.pb",
)
TENSORFLOW_RESIZE = "tensorflow bilinear 299x299"  # its name in results
DOWNLOAD = "bash tools/download_benchmarks.sh --only inception fetches it"

SCOPES = Path(__file__).with_name("inception_scopes.yaml")
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


class InceptionV3(nn.Module):
    """Frozen Inception with three outputs, computed by the layers of torch-fidelity, which follow the TensorFlow graph.

    Products are as exact as the caller's settings: see `tim.distributed.set_tf32` for TF32 on CUDA.

    Args:
        network: torch-fidelity's.
        weights_sha256: of the file of its weights.
        precision: bfloat16 runs the convolutions under autocast.
    """

    def __init__(self, network: nn.Module, weights_sha256: str, precision: str = "float32") -> None:
        super().__init__()
        layers = dict(network.named_children())  # in the order of use
        self.fc = layers.pop("fc")
        tap = list(layers).index("Mixed_6d") + 1
        self.stem = nn.Sequential(*list(layers.values())[:tap])
        self.head = nn.Sequential(*list(layers.values())[tap:])
        self.weights_sha256, self.precision = weights_sha256, precision
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, H, W) of any size, resized as the TensorFlow graph does.

        Returns:
            float32 `pool3` (B, 2048), `spatial` (B, 2023) and `probs` (B, 1008).

        Raises:
            ValueError: for other tensors.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        return self.features_299(_resize(images))

    def identity(self, resize: str, outputs: str) -> dict[str, Any]:
        """What these outputs of the network depend on, for `FeatureExtractor`."""
        return {
            "network": f"inception-2015-12-05, {outputs}",
            "weights_sha256": self.weights_sha256,
            "resize": resize,
            "precision": self.precision,
        }

    def features_299(self, images: Tensor) -> dict[str, Tensor]:
        """Features of float images (B, 3, 299, 299) in [0, 255]; returns the same as `forward`.

        Raises:
            ValueError: for other sizes.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"Inception takes resized images (B, 3, {SIDE}, {SIDE}), got {tuple(images.shape)}")
        rough = torch.autocast(images.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()
        with rough:
            x = self.stem((images - 128) / 128)
            pool3 = self.head(x).flatten(1).float()
        # a block joins its branches, the 1x1 convolution first: these channels are mixed_6/conv; TensorFlow has channels last
        spatial = x[:, :TAPPED].permute(0, 2, 3, 1).flatten(1).float()
        with torch.autocast(pool3.device.type, enabled=False):
            probs = (pool3 @ self.fc.weight.T).softmax(1)  # without bias, as in ADM's evaluation
        return {"pool3": pool3, "spatial": spatial, "probs": probs}


def load_inception(path: str | Path | None, device: torch.device, precision: str = "float32") -> InceptionV3:
    """The network with weights from a file: torch-fidelity's .pth, or the TensorFlow graph `classify_image_graph_def.pb`.

    Args:
        path: weights file; None takes the first of `FILES` in `checkpoints/`.
        precision: see `InceptionV3`.

    Raises:
        FileNotFoundError: when there is no such file; says which tool fetches it.
        ValueError: when the file is damaged or holds another network's weights, or torch-fidelity is missing.
    """
    if path is None:
        path = next((FOLDER / name for name in FILES if (FOLDER / name).is_file()), FOLDER / FILES[0])
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights {path}; {DOWNLOAD}")
    digest = sha256(path)
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.startswith(named[1]):
        raise ValueError(f"{path} is damaged: its sha256 begins with {digest[:8]}, not {named[1]}; delete it, {DOWNLOAD}")
    state = read_graph_weights(path) if path.suffix == ".pb" else read_state_dict(path)
    try:
        network = _fill_network(state)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:400]
        raise ValueError(f"{path} does not hold the weights of Inception-2015-12-05: {problem}") from error
    return InceptionV3(network, digest, precision).to(device)


def pool3_extractor(network: InceptionV3, transform: Transform, resize: str) -> FeatureExtractor:
    """pool3 alone, of images that `transform` resizes; `resize` names how."""
    return FeatureExtractor(
        "Inception-2015-12-05 pool3",
        network.identity(resize, "pool3"),
        transform,
        lambda images: {"features": network.features_299(images)["pool3"]},
    )


def read_graph_weights(path: Path) -> dict[str, Tensor]:
    """Weights of `classify_image_graph_def.pb` under the names of torch-fidelity's network.

    Raises:
        ValueError: when the file is damaged or another graph; names it and the missing constant.
    """
    graph = Graph(path)
    state = {}
    scopes: Any = OmegaConf.to_container(OmegaConf.load(SCOPES))
    for layer, scope in scopes.items():
        kernel = graph.constant(f"{scope}/conv2d_params", 4)  # height, width, in, out
        state[f"{layer}.conv.weight"] = torch.tensor(kernel.transpose(3, 2, 0, 1))
        for ours, theirs in NORM.items():
            state[f"{layer}.bn.{ours}"] = torch.tensor(graph.constant(f"{scope}/batchnorm/{theirs}", 1))
        if graph.flag(f"{scope}/batchnorm", "scale_after_normalization") is False:  # TensorFlow then leaves gamma out
            state[f"{layer}.bn.weight"].fill_(1)
    state["fc.weight"] = torch.tensor(graph.constant("softmax/weights", 2).T)
    state["fc.bias"] = torch.tensor(graph.constant("softmax/biases", 1))
    return state


def tensorflow_resize(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float (3, 299, 299) in [0, 255], as the TensorFlow graph resizes."""
    return _resize(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]


def _resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, 299, 299): TensorFlow 1's bilinear rule, corners not aligned, bit for bit."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)


def _fill_network(state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's network with these weights.

    Its constructor unpickles a file, whatever is in it, or downloads one: here it gets tensors that were read safely.

    Raises:
        ValueError: when torch-fidelity is not installed.
        RuntimeError: when the weights are another network's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("Inception features need torch-fidelity: pip install torch-fidelity") from error
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.random.fork_rng(devices=[]):
        return FeatureExtractorInceptionV3("inception", ["2048"], file)

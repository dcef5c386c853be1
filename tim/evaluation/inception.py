"""Inception-2015-12-05, the network behind FID, sFID and inception score: its weights and its features."""

import io
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tim.evaluation.graphdef import Graph
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
DOWNLOAD = "bash tools/download_benchmarks.sh --only inception fetches it"

# names of convolutions in the TensorFlow graph and in torch-fidelity: within a block of each kind, then of the blocks
_A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
_B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
_C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
_D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
_E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_BLOCKS = {
    "mixed": ("Mixed_5b", _A),
    "mixed_1": ("Mixed_5c", _A),
    "mixed_2": ("Mixed_5d", _A),
    "mixed_3": ("Mixed_6a", _B),
    "mixed_4": ("Mixed_6b", _C),
    "mixed_5": ("Mixed_6c", _C),
    "mixed_6": ("Mixed_6d", _C),
    "mixed_7": ("Mixed_6e", _C),
    "mixed_8": ("Mixed_7a", _D),
    "mixed_9": ("Mixed_7b", _E),
    "mixed_10": ("Mixed_7c", _E),
}
LAYERS = _STEM | {f"{block}/{a}": f"{module}.{b}" for block, (module, kind) in _BLOCKS.items() for a, b in kind.items()}


class InceptionV3(nn.Module):
    """Frozen Inception with three outputs, computed by the layers of torch-fidelity, which follow the TensorFlow graph.

    Products are as exact as the caller's settings: see `tim.distributed.set_tf32` for TF32 on CUDA.

    Args:
        state: weights under torch-fidelity's names.
        source: their file, named when they do not fit.
        weights_sha256: of that file.

    Raises:
        ValueError: names missing or unknown keys, or says how to install torch-fidelity.
    """

    def __init__(self, state: dict[str, Tensor], source: str | Path, weights_sha256: str) -> None:
        super().__init__()
        layers = dict(_torch_fidelity_network(state, source).named_children())  # in the order of use
        self.fc = layers.pop("fc")
        tap = list(layers).index("Mixed_6d") + 1
        self.stem = nn.Sequential(*list(layers.values())[:tap])
        self.head = nn.Sequential(*list(layers.values())[tap:])
        self.weights_sha256 = weights_sha256
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

    def features_299(self, images: Tensor) -> dict[str, Tensor]:
        """Features of float images (B, 3, 299, 299) in [0, 255]; returns the same as `forward`.

        Raises:
            ValueError: for other sizes.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"Inception takes resized images (B, 3, {SIDE}, {SIDE}), got {tuple(images.shape)}")
        x = self.stem((images - 128) / 128)
        # a block joins its branches, the 1x1 convolution first: these channels are mixed_6/conv; TensorFlow has channels last
        spatial = x[:, :TAPPED].permute(0, 2, 3, 1).flatten(1).float()
        pool3 = self.head(x).flatten(1).float()
        with torch.autocast(pool3.device.type, enabled=False):
            probs = (pool3 @ self.fc.weight.T).softmax(1)  # without bias, as in ADM's evaluation
        return {"pool3": pool3, "spatial": spatial, "probs": probs}


def load_inception(path: str | Path | None, device: torch.device) -> InceptionV3:
    """The network with weights from a file: torch-fidelity's .pth, or the TensorFlow graph `classify_image_graph_def.pb`.

    Args:
        path: weights file; None takes the first of `FILES` in `checkpoints/`.

    Raises:
        FileNotFoundError: when there is no such file; says which tool fetches it.
        ValueError: when the file is damaged or holds another network's weights.
    """
    path = _default_file() if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights {path}; {DOWNLOAD}")
    digest = sha256(path)
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.startswith(named[1]):
        raise ValueError(f"{path} is damaged: its sha256 begins with {digest[:8]}, not {named[1]}; delete it, {DOWNLOAD}")
    state = read_graph_weights(path) if path.suffix == ".pb" else read_state_dict(path)
    return InceptionV3(state, path, digest).to(device)


def read_graph_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights of `classify_image_graph_def.pb` under torch-fidelity's names.

    Raises:
        ValueError: when the file is damaged or another graph; names it and the missing constant.
    """
    graph = Graph(path)
    state = {}
    for scope, layer in LAYERS.items():
        kernel = graph.constant(f"{scope}/conv2d_params", 4)  # height, width, in, out
        state[f"{layer}.conv.weight"] = torch.tensor(kernel.transpose(3, 2, 0, 1))
        norm = f"{scope}/batchnorm"
        names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        for ours, theirs in names.items():
            state[f"{layer}.bn.{ours}"] = torch.tensor(graph.constant(f"{norm}/{theirs}", 1))
        if graph.flag(norm, "scale_after_normalization") is False:  # TensorFlow then leaves gamma out
            state[f"{layer}.bn.weight"].fill_(1)
    state["fc.weight"] = torch.tensor(graph.constant("softmax/weights", 2).T)
    state["fc.bias"] = torch.tensor(graph.constant("softmax/biases", 1))
    return state


def tensorflow_resize(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float (3, 299, 299) in [0, 255], as the TensorFlow graph resizes."""
    return _resize(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]


def _resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, 299, 299): TensorFlow 1's bilinear rule, corners not aligned, bit for bit."""
    return _stretch(_stretch(images.float(), 3), 2)


def _stretch(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    scale = torch.tensor(size / SIDE, dtype=torch.float32, device=x.device)
    place = torch.arange(SIDE, dtype=torch.float32, device=x.device) * scale
    low = place.long()
    first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
    weight = (place - low).view(SIDE, *[1] * (x.ndim - 1 - dim))
    return first + (second - first) * weight  # torch.lerp rounds otherwise


def _default_file() -> Path:
    found = next((FOLDER / name for name in FILES if (FOLDER / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no Inception weights in {FOLDER}/ ({' or '.join(FILES)}); {DOWNLOAD}")
    return found


def _torch_fidelity_network(state: dict[str, Tensor], source: str | Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("Inception features need torch-fidelity: pip install torch-fidelity") from error
    # its constructor unpickles a file, and downloads one when it gets none: give it checked tensors in memory
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            return FeatureExtractorInceptionV3("inception", ["2048"], file)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:400]
        raise ValueError(f"{source} does not hold the weights of Inception-2015-12-05: {problem}") from error

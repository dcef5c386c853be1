"""Inception features: torch-fidelity's, with the spatial tap, from a .pth or a TensorFlow graph; bad files are named."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from helpers.graphdef_writer import constant, tensor, write_graph
from helpers.inception_weights import random_inception, save_graph, save_random_inception
from helpers.networks import relative_error

from tim.evaluation.inception import CLASSES, POOL3, SPATIAL, load_inception, tensorflow_resize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights, CPU)


@pytest.fixture(scope="module")
def images():
    """Three pictures of 48x64: noise, a gradient, a photograph."""
    from sklearn.datasets import load_sample_images

    noise = torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    gradient = torch.linspace(0, 255, 64).expand(3, 48, 64).to(torch.uint8)
    photograph = torch.from_numpy(load_sample_images().images[0][:384:8, :512:8].copy()).permute(2, 0, 1)
    return torch.stack([noise, gradient, photograph])


@pytest.fixture(scope="module")
def features(network, images):
    return network(images)


@pytest.fixture(scope="module")
def reference(weights, images):
    """torch-fidelity's own features of the same file, and the activation that is mixed_6/conv in the graph."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(weights)).eval()
    tapped = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: tapped.append(output.clone()))
    pool3, logits = extractor(images)
    return {"pool3": pool3, "logits": logits, "tapped": tapped[0]}


def test_features_equal_torch_fidelity(features, reference):
    assert features["pool3"].shape == (3, POOL3) and features["probs"].shape == (3, CLASSES)
    assert relative_error(features["pool3"], reference["pool3"]) < 1e-6
    assert relative_error(features["probs"], reference["logits"].softmax(1)) < 1e-6
    assert all(value.dtype == torch.float32 for value in features.values())
    assert features["pool3"].std(0).mean() > 0.1  # the images are told apart


def test_spatial_features_are_seven_channels_of_the_tapped_activation(features, reference):
    tapped = reference["tapped"]
    assert tapped.shape == (3, 192, 17, 17) and tapped.min() == 0  # after the ReLU
    direct = [[tapped[b, c, y, x] for y in range(17) for x in range(17) for c in range(7)] for b in range(3)]
    assert features["spatial"].shape == (3, SPATIAL)
    assert relative_error(features["spatial"], torch.tensor(direct)) < 1e-6


@pytest.mark.parametrize("size", [(256, 256), (32, 32), (512, 300), (299, 299), (1, 7)])
def test_resize_is_tensorflows_bit_for_bit(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    image = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        image.permute(2, 0, 1)[None].float(), size=(299, 299), align_corners=False
    )
    assert torch.equal(tensorflow_resize(image.numpy()), expected[0])


def test_an_image_resized_beforehand_has_the_same_features(network, images, features):
    resized = torch.stack([tensorflow_resize(image.permute(1, 2, 0).numpy()) for image in images])
    again = network.features_299(resized)
    assert all(torch.equal(again[name], value) for name, value in features.items())


def test_an_images_features_do_not_depend_on_its_batch(network, images, features):
    for k in (0, 2):
        alone = network(images[k : k + 1])
        for name, value in features.items():
            # float32 sums in another order; random weights amplify that to 2e-5
            assert (alone[name][0] - value[k]).abs().max() < 1e-4 * value.abs().max(), name


def test_bfloat16_gives_float32_features_nearby(network, images, features):
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(images[:1])
    assert all(value.dtype == torch.float32 for value in rough.values())
    error = relative_error(rough["pool3"], features["pool3"][:1])
    assert 1e-4 < error < 0.2


def test_the_network_is_frozen_and_leaves_the_random_state_alone(weights):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = load_inception(str(weights), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_other_tensors_are_refused(network, images):
    with pytest.raises(ValueError, match=r"uint8 images \(B, 3, H, W\), got torch.float32 \(3, 3, 48, 64\)"):
        network(images.float())
    with pytest.raises(ValueError, match=r"got torch.uint8 \(3, 48, 64, 3\)"):
        network(images.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"\(B, 3, 299, 299\), got \(3, 3, 48, 64\)"):
        network.features_299(images.float())


def test_a_tensorflow_graph_gives_the_same_features(tmp_path, network, images, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    graph = save_graph(folder / "classify_image_graph_def.pb", random_inception())
    monkeypatch.chdir(tmp_path)
    converted = load_inception(None, CPU)  # found in checkpoints/
    assert converted.weights_sha256 == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in converted.state_dict().items())
    expected = network(images[:1])
    assert all(torch.equal(value, expected[name]) for name, value in converted(images[:1]).items())


def test_graphs_of_other_networks_and_damaged_ones_are_named(tmp_path):
    path = write_graph(tmp_path / "other.pb", [constant("conv/conv2d_params", tensor(np.ones((3, 3, 3, 32))))])
    with pytest.raises(ValueError, match=r"other\.pb has no constant 'conv/batchnorm/gamma'"):
        load_inception(path, CPU)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"other\.pb is damaged or no frozen TensorFlow graph"):
        load_inception(path, CPU)


def test_a_file_must_match_the_hash_in_its_name(tmp_path, weights):
    wrong = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    wrong.write_bytes(weights.read_bytes())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"6726825d\.pth is damaged: its sha256 begins with {digest[:8]}, not 6726825d"):
        load_inception(wrong, CPU)
    right = wrong.rename(tmp_path / f"pt_inception-2015-12-05-{digest[:8]}.pth")
    assert load_inception(right, CPU).weights_sha256 == digest


def test_weights_of_other_networks_name_what_is_missing(tmp_path):
    state = {name: value for name, value in random_inception().items() if name != "Mixed_7b.branch_pool.bn.bias"}
    counters = {f"{name.removesuffix('weight')}num_batches_tracked": torch.tensor(0) for name in state if ".bn.weight" in name}
    torch.save(state | counters, tmp_path / "short.pth")  # counters may be in the file or not
    with pytest.raises(ValueError, match=r"short\.pth does not hold .* Missing key.*Mixed_7b\.branch_pool\.bn\.bias") as error:
        load_inception(tmp_path / "short.pth", CPU)
    assert "num_batches_tracked" not in str(error.value)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold .*Conv2d_1a_3x3") as error:
        load_inception(tmp_path / "other.pth", CPU)
    assert len(str(error.value)) < 600


def test_missing_files_say_which_tool_fetches_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, "nowhere.pth"):
        with pytest.raises(FileNotFoundError, match=r"bash tools/download_benchmarks\.sh --only inception fetches it"):
            load_inception(path, CPU)


def test_a_missing_package_says_how_to_install_it(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_inception(weights, CPU)
